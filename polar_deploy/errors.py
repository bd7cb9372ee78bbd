"""One exception per kind of failure, each with the exit code that the command line returns for it.

A verdict is not a failure: parity failed (exit 1) and undecided (exit 5) are results, see `polar_deploy.parity`.
"""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError

# As in a regular expression's []: control signs, and signs that turn the direction of writing. On a terminal they can
# say something else than what is written.
CONTROL = "\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069"
INTERNAL = 70  # exit code of any other exception, which is a defect of this package or of a library (sysexits.h)
_CONTROL = re.compile(f"[{CONTROL}]")
_LONGEST_LINE = 300  # characters of a library's message that are told


class PolarDeployError(Exception):
    """What went wrong (where, with which value) and what the user can do about it.

    Args:
        what: one sentence that names the place (file, layer, node, line of the YAML) and the value found there.
        todo: what to do next, an imperative sentence.
    """

    exit_code: ClassVar[int] = 4

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what)
        self.what = what
        self.todo = todo

    def __str__(self) -> str:
        return f"{self.what}\n  what to do: {self.todo}"


def first_problem(error: ValidationError, whole: str) -> str:
    """The first thing that pydantic found wrong, behind its place: "networks.full: Field required".

    Args:
        whole: what to say in place of the place where the whole is wrong.
    """
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {one_line(first['msg'])}"


def one_line(text: object) -> str:
    """A library's error or its text without line breaks and control signs, to be quoted in a message of ours."""
    return printable(" ".join(str(text).split()))


def first_line(error: BaseException) -> str:
    """The first line of a library's message, which may run over pages; the error's type where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:_LONGEST_LINE]


def innermost(error: BaseException, beside: tuple[str, ...]) -> traceback.FrameSummary | None:
    """Where an error was raised, outside of these files and folders: as a rule in code of the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in reversed(frames) if not frame.filename.startswith(beside)), None)


def printable(text: str) -> str:
    """A text without the signs of `CONTROL`, which may come from a stranger's file."""
    return _CONTROL.sub("?", text)


class UsageError(PolarDeployError):
    """The command line, a recipe, a missing path, or a budget that no network can reach."""

    exit_code = 2


class MachineError(PolarDeployError):
    """This machine lacks something: a GPU, a library, memory, disk space."""

    exit_code = 3


class OutOfMemoryError(MachineError):
    """A library asked for more memory than there is, or than its process may have."""


class ContentError(PolarDeployError):
    """The content of a file (data, weights, ONNX, plan) is not what it should be, or a stage failed on it."""

    exit_code = 4
