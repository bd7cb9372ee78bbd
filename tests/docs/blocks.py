"""The code in README and docs: what a page shows, and how it is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_NOT_RUN, _FILE = "not run: ", "file: "
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line of code, in the page.
        reason: why it is not run here, from `<!-- not run: REASON -->` above it; None: it is.
        file: what it is written to, from `<!-- file: NAME -->` above it, instead of being run.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None
    file: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The commands of a shell block, split into words; comments and placeholders in brackets are left out."""
        for line in self.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order; those that tell MyST what to do are none."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in _FENCE.finditer(text):
        mark, language = fence["mark"] or "", fence["language"]
        if language.startswith("{"):
            continue
        line = text.count("\n", 0, fence.start("code")) + 1
        reason = mark.removeprefix(_NOT_RUN) if mark.startswith(_NOT_RUN) else None
        file = mark.removeprefix(_FILE) if mark.startswith(_FILE) else None
        found.append(Block(page, line, language, fence["code"], reason, file))
    return found
