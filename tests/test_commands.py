"""The dispatcher of sub-commands: only the one that is asked for is imported, and every error has its exit code."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import types

import pytest

from polar_deploy import commands
from polar_deploy.errors import ContentError
from tests.conftest import ROOT, Outcome, called

_MODULES = {"do": ("a_command_of_a_test", "does it")}


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
    return called(lambda argv: commands.dispatch("package", _MODULES, argv), "do")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 5, ""),
        (ContentError("bad", "mend it"), 4, "error: bad\n  what to do: mend it\n"),
        (MemoryError("12 GB"), 3, "error: out of memory: 12 GB"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_end_has_its_exit_code(
    error: BaseException | None, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = outcome(monkeypatch, error)
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith(words)


def test_a_reader_that_has_enough_is_no_error() -> None:
    code = "import sys; from polar_deploy.bundle.__main__ import main; sys.exit(main(['schema']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as writer:
        assert writer.stdout
        assert writer.stderr
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait() == 128 + signal.SIGPIPE


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(monkeypatch, ZeroDivisionError())


@pytest.mark.parametrize("package", ["polar_deploy.bundle", "polar_deploy.engines"])
def test_help_imports_nothing_heavy(package: str) -> None:
    code = (
        f"import sys; from {package}.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'onnx', 'pydantic', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"usage: python -m {package}")
    assert package == "polar_deploy.engines" or done.stderr == "[]\n"
