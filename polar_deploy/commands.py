"""The end of every command: one exit code and one sentence, whatever is raised."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

from polar_deploy.disk import DISK_FULL
from polar_deploy.errors import INTERNAL, MachineError, PolarDeployError, UsageError, one_line

_STREAMS = 3  # the first number of a file that is none of the standard streams
INTERRUPTED = "interrupted"  # what is said after Ctrl-C


def guarded(command: Callable[[], int], argv: Sequence[str] | None, *, interrupted: str = INTERRUPTED) -> int:
    """Run a command and return its exit code (see docs/cli.md), whatever it raises; SystemExit passes through.

    Args:
        command: parses the command line and does what it says.
        argv: the command line; None: this process's own. With `--debug` in it, errors come with their traceback.
        interrupted: what to say after Ctrl-C.
    """
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any name, on a terminal that knows ASCII only
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it ends
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - none may end a command with 1, "parity failed"
        if "--debug" in (sys.argv[1:] if argv is None else argv):
            traceback.print_exc()
        code, text = _told(error)
        print(f"error: {text}", file=sys.stderr)
        return code


def _open_streams() -> None:
    """Lead standard streams nowhere that whoever started this process has closed: the next file that is opened would
    get the number of one of them, and what libraries print would end in it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < _STREAMS:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process is


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with an error, whatever it is."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else INTERNAL
    return _told(error)[0] if isinstance(error, Exception) else 128 + signal.SIGINT


def _told(error: Exception) -> tuple[int, str]:
    """Exit code and text of an error."""
    if isinstance(error, PolarDeployError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        what = f"out of memory: {error}"
        return MachineError.exit_code, f"{what}\n  what to do: use a smaller batch, image size or network"
    if isinstance(error, OSError) and error.strerror:  # of files that nobody opened with more care
        place = f"{error.filename}: " if error.filename else ""
        code = (MachineError if error.errno in DISK_FULL else UsageError).exit_code
        return code, f"{place}{error.strerror}\n  what to do: check path, permissions and free space"
    what = f"unexpected {type(error).__name__}: {one_line(error)}"
    return INTERNAL, f"{what}\n  what to do: run the same command with --debug to see where, and report it"


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the option that `guarded` looks for."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
