"""How far a run is: a bar on a terminal, one plain line an epoch elsewhere. All on stderr.

Every stage leaves one line with the time that it took. Colours follow NO_COLOR, as rich does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from rich.text import Text


_BAR = 8  # characters


def console(least: int = 0, **options: Any) -> Console:
    """A console of rich; of its own it ends a process whose reader has enough with exit code 1, "parity failed".

    Args:
        least: columns that are written even where the terminal has fewer: it breaks the lines of a table of figures, in
            which rich would cut off digits.
        options: of rich's own console.
    """
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    made = Quiet(**options)
    if made.width < least:
        made.width = least
    return made


class Progress:
    """Display of a run, as a context manager.

        with Progress() as progress:
            progress.plan({"full": 30, "gates": 30})
            progress.stage("full", total_epochs=30, done=3)
            progress.step(0.5)
            progress.epoch(epoch=4, loss=0.31, score="val 97.0%")

    Args:
        console: where to write; None: stderr.
        quiet: show nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bar: Bar | None = None  # None when not on a terminal
        self._task: TaskID | None = None
        self._name = ""  # of the stage
        self._facts: list[str] = []  # what its last epoch told, the first thing first
        self._total: int | None = None  # epochs of the stage; None: it has none
        self._ahead: dict[str, int] = {}  # stages that are still to come, and their epochs
        self._first = self._done = 0.0  # epochs done when the stage began, and now
        self._began = self._paced_since = 0.0  # the stage, and its epochs: seconds on the monotonic clock

    def __enter__(self) -> Progress:
        if self._quiet:
            return self
        from rich.progress import BarColumn, RenderableColumn
        from rich.progress import Progress as Bar

        self._console = self._console or console(stderr=True)
        if self._console.is_terminal:
            bar, line = BarColumn(bar_width=_BAR), RenderableColumn(self)
            self._bar = Bar(bar, line, console=self._console, transient=True, redirect_stdout=False)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._end_stage()
        if self._bar is not None:
            self._bar.stop()

    def plan(self, epochs: Mapping[str, int]) -> None:
        """Tell which stages are to come that have epochs, for the time that the whole run will take."""
        self._ahead = dict(epochs)

    def stage(self, name: str, total_epochs: int | None = None, done: int = 0) -> None:
        """Begin a stage, which ends the one before; or tell the length of the one that has begun.

        A resumed stage begins with `done` epochs behind it.
        """
        begun = name == self._name
        if not begun:
            self._end_stage()
            self._began = time.monotonic()
        self._ahead.pop(name, None)
        self._name, self._facts, self._total = name, [], total_epochs
        self._first = self._done = float(done)
        self._paced_since = time.monotonic()
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("")
            self._bar.update(self._task, total=total_epochs, completed=done)
        elif done or not begun:
            self.note(f"{name}: goes on after epoch {done} of {total_epochs}" if done else name)

    def up_to_date(self, name: str) -> None:
        """Tell that a stage has nothing to do."""
        self._end_stage()
        self._ahead.pop(name, None)
        self.note(f"{name}: up to date")

    def detail(self, text: str) -> None:
        """Tell what the stage is at: beside the bar for as long as it is so, or on a line of its own."""
        self._facts = [text]
        if self._bar is None:
            self.note(text)

    def step(self, fraction: float) -> None:
        """Tell which fraction (0 to 1) of the current epoch is done."""
        self._done = int(self._done) + min(fraction, 0.999)  # a whole epoch is for `epoch` to tell
        self._show()

    def epoch(
        self,
        *,
        epoch: int,
        loss: float,
        score: str | None,
        cost: float | None = None,
        budget: float | None = None,
        undecided: float | None = None,
    ) -> None:
        """Tell how an epoch ended.

        Args:
            epoch: number of epochs done, from 1.
            loss: mean training loss.
            score: of the validation samples, such as "val 97.0%"; None: there is none.
            cost: cost of the network as its gates stand, as a share of the full network's.
            budget: what the cost has to come down to.
            undecided: share of gates on which the samples do not agree yet.
        """
        facts = []
        if score is not None:
            facts.append(score)
        if cost is not None:
            facts.append(f"cost {cost:.2f}" + (f"/{budget:.2f}" if budget is not None else ""))
        facts.append(f"loss {loss:.3f}")
        if undecided is not None:
            facts.append(f"undecided {undecided:.0%}")
        self._facts, self._done = facts, float(epoch)
        if self._bar is not None:
            self._show()
        else:
            self.note(self._line())

    def note(self, text: str) -> None:
        """Write one line, above the bar where there is one."""
        if not self._quiet:
            self._console = self._console or console(stderr=True)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> Text:
        """The line beside the bar, as much of it as there is room for: the stage's name stands out."""
        from rich.text import Text

        assert self._console
        line = Text(self._line(self._console.width - _BAR - 1), no_wrap=True, overflow="ellipsis")
        line.stylize("bold cyan", 0, len(self._name))
        return line

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)

    def _end_stage(self) -> None:
        """Leave one line: how the stage ended, and how long it took."""
        if self._name:
            took = _clock(time.monotonic() - self._began)
            epochs = f" {int(self._done)}/{self._total}" if self._total is not None else ""
            # Without a bar, the line above has them.
            facts = "".join(f" {each}" for each in self._facts) if self._total and self._bar is not None else ""
            if self._bar is not None and self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
                self._bar.refresh()  # else the bar of what has ended stays below the next line
            self.note(f"{self._name}{epochs}: {took}{facts}")
        self._name = ""

    def _line(self, width: int | None = None) -> str:
        """What there is to tell, in `width` characters: what matters least is left out first."""
        parts = [self._name, _clock(time.monotonic() - self._began)]
        if self._total is not None:
            parts = [f"{self._name} {int(self._done)}/{self._total}", self._eta()]
        parts += self._facts
        while width is not None and len(parts) > 2 and len(" ".join(parts)) > width:
            parts.pop()
        return " ".join(parts)

    def _eta(self) -> str:
        """Time to the end of the stage, at the pace since it began, and of the stages with epochs behind it."""
        passed = self._done - self._first
        if self._total is None or passed <= 0:
            return "ETA -:--"
        pace = (time.monotonic() - self._paced_since) / passed
        left = pace * (self._total - self._done)
        run = f" (run {_clock(left + pace * sum(self._ahead.values()))})" if self._ahead else ""
        return f"ETA {_clock(left)}{run}"


def _clock(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
