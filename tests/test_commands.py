"""The end of every command: each error has its exit code and its sentence, whatever command it was."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence

import pytest

from polar_deploy import cli, pipeline, surgery
from polar_deploy.cli import Command, Group
from polar_deploy.errors import ContentError
from polar_deploy.surgery import __main__ as surgery_shim
from tests.conftest import ROOT, Outcome, called

_TREE = Group("for tests", {"do": Command("package.a_command_of_a_test", "does it", "interrupted; go on")})


def outcome(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> Outcome:
    """How `do` ends when it raises `error`."""

    def run(arguments: object) -> int:
        if error is not None:
            raise error
        return 5

    module = types.ModuleType("package.a_command_of_a_test", "What it does.")
    module.__dict__.update(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "package", types.ModuleType("package"))
    monkeypatch.setitem(sys.modules, "package.a_command_of_a_test", module)
    return called(lambda argv: cli.run(_TREE, "package", argv), "do")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 5, ""),
        (ContentError("bad", "mend it"), 4, "error: bad\n  what to do: mend it\n"),
        (MemoryError("12 GB"), 3, "error: out of memory: 12 GB"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; go on\n"),
        (OSError("no errno"), 70, "error: unexpected OSError: no errno"),
    ],
)
def test_every_end_has_its_exit_code(
    error: BaseException | None, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = outcome(monkeypatch, error)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(words)


@pytest.mark.parametrize(
    "command",
    [
        ["polar_deploy.bundle", "schema"],
        ["polar_deploy.engines", "doctor"],  # printed by rich, which has a mind of its own about it: exit code 1
        ["polar_deploy.pipeline", "--help"],
        ["polar_deploy.surgery", "--help"],
        ["polar_deploy", "settings"],
        ["polar_deploy", "--help"],
    ],
)
def test_a_reader_that_has_enough_is_no_error(command: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as writer:
        assert writer.stdout
        assert writer.stderr
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait() == (0 if "--help" in command else 128 + signal.SIGPIPE)  # argparse says nothing of it


def failing(command: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], int]:
    """The `main` of a command in which something divides by zero, past all checks."""

    def divide(*_: object, **__: object) -> int:
        return 1 // 0

    if command == "pipeline":
        monkeypatch.setattr(pipeline, "_settings", divide)
        return pipeline.main
    if command == "surgery":
        monkeypatch.setattr(surgery, "compress_file", divide)
        return lambda argv: surgery_shim.main([*argv, "in.onnx", "out.onnx"])
    module = types.ModuleType("package.a_command_of_a_test", "What it does.")
    module.__dict__.update(add_arguments=lambda parser: None, run=divide)
    monkeypatch.setitem(sys.modules, "package", types.ModuleType("package"))
    monkeypatch.setitem(sys.modules, "package.a_command_of_a_test", module)
    return lambda argv: cli.run(_TREE, "package", ["do", *argv])


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("arguments", "code"), [("settings", 0), ("run --recipe nope", 2)])
def test_streams_that_are_closed_from_the_start_are_no_defect(arguments: str, code: int, closed: str) -> None:
    command = f"exec {sys.executable} -m polar_deploy {arguments} {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "unexpected" not in done.stdout + done.stderr
    assert not (code and done.stdout)  # an error is none of the results


@pytest.mark.parametrize("command", ["pipeline", "surgery", "do"])
def test_what_nobody_foresaw_is_one_sentence_and_a_code_of_its_own(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = failing(command, monkeypatch)
    ended, detailed = called(main), called(main, "--debug")
    assert (ended.code, ended.out, detailed.code) == (70, "", 70)  # never 1, which is "parity failed"
    assert ended.err == (
        "error: unexpected ZeroDivisionError: integer division or modulo by zero\n"
        "  what to do: run the same command with --debug to see where, and report it\n"
    )
    assert "Traceback" in detailed.err
    assert "in divide" in detailed.err
    assert detailed.err.endswith(ended.err)
