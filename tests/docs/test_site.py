"""The site is built without a warning, its generated parts are up to date, and no figure stands beside them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment
from tests.docs.blocks import PAGES

_GENERATED = re.compile(r"<!-- generated: .*?<!-- end -->", re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_MEASURED = re.compile(r"\d ?(ms|µs|MB|kB)\b|\d\.\d+ GB|\d (s|seconds|times as (fast|long|much))\b|\d\.\d+ %|\d×")
# Pages with figures that have no file: how each was measured stands beside it, in the same section.
_BY_HAND = re.compile(r"[Mm]easured (by hand )?on |`[\w/-]+\.json`|<!-- generated: ")


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install '.[docs]'")
    pytest.importorskip("furo", reason="furo is not installed: pip install '.[docs]'")
    pytest.importorskip("myst_parser", reason="myst-parser is not installed: pip install '.[docs]'")
    builder = "dummy"  # reads and resolves everything, and writes no page
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder, "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(traced=False), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generated_parts_are_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of settings, options, device files and results."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    main = import_module("generate").main
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_measured_figure_has_its_file(page: Path) -> None:
    """Outside of generated parts a figure is either measured by hand, which is said with it, or names its file."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        left = _GENERATED.sub("", section)
        if not _BY_HAND.search(section):
            assert _MEASURED.search(left) is None, section.splitlines()[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Those to files of this repository, for whoever reads the Markdown; the site has a check of its own."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_two_commands_of_a_fresh_machine_are_in_the_readme() -> None:
    """`make demo` and `make test`, which is what .ci/run calls."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo " in readme
    assert "make test " in readme
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
