"""The code blocks of README and docs run, page by page, in one namespace and one folder; or say why they do not."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from polar_deploy import cli
from tests.conftest import ROOT, called
from tests.docs.blocks import PAGES, Block, blocks

LANGUAGES = ("python", "bash", "text", "diff", "yaml", "toml")
REASONS = ("needs a GPU", "needs a finished run", "needs the device's compiler", "takes ", "installs ")
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [page for page in PAGES if any(b.language in ("python", "bash") and b.reason is None for b in blocks(page))]


def test_every_block_has_a_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


def test_a_block_that_is_not_run_has_a_good_reason() -> None:
    assert [str(block) for block in BLOCKS if block.reason is not None and not block.reason.startswith(REASONS)] == []


def test_no_code_hides_in_an_indented_block() -> None:
    """Apart from drawings; an indented line of a list continues it."""
    fenced = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        for line in fenced.sub("", page.read_text(encoding="utf-8")).splitlines():
            assert not re.match(r" {4,}(\$ |python|pip|make|from |import |docker)", line), (page.name, line)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
            monkeypatch.delitem(sys.modules, Path(block.file).stem, raising=False)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        elif block.language == "bash":
            for command in block.commands():
                _run(block, command)


def test_the_life_of_one_channel_is_as_its_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/examples/one_channel.py prints stands in docs/how-it-works.md, word for word."""
    runpy.run_path(str(ROOT / "docs" / "examples" / "one_channel.py"), run_name="__main__")
    shown = [block.code for block in blocks(ROOT / "docs" / "how-it-works.md") if block.language == "text"]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if re.match(r"\d\. ", line)] == shown[0].splitlines()


def _run(block: Block, command: list[str]) -> None:
    assert command[0] == "polar-deploy", f"{block}: say why {command[0]} is not run"
    outcome = called(cli.main, *command[1:])
    assert outcome.code == 0, f"{block}: {' '.join(command)}\n{outcome.err}"


class _Parsed(BaseException):
    """A command line was read, and that is enough."""


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash" and b.reason is not None], ids=str)
def test_commands_that_are_not_run_have_such_options(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, depth = argparse.ArgumentParser.parse_known_args, 0

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        found = whole(*args, **kwargs)
        depth -= 1
        if depth == 0 and not found[1]:
            raise _Parsed
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    for command in block.commands():
        if command[0] == "make":
            assert f"\n{command[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        elif command[:2] == ["python", "-m"]:
            assert (ROOT / command[2].replace(".", "/")).with_suffix(".py").is_file()
        elif command[0] == "polar-deploy":
            with pytest.raises(_Parsed):
                cli.main(command[1:])


def test_the_scripts_of_this_test_find_something() -> None:
    assert {page.name for page in RUN} >= {"README.md", "gates.md", "surgery.md", "own-network.md"}
