"""When gates are chosen, close, and are fixed: shares of the run; and how far each has closed on the way."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from polar_deploy.config import CLOSING, fixed_at
from polar_deploy.costs import Floats
from polar_deploy.errors import UsageError
from polar_deploy.surgery.facts import Bools

RAMP = 0.7  # share of the closing phase in which gates close; the rest lets the network settle
SPAN = 0.1  # share of all that close: so many are on their way at the same time


def is_number(value: object) -> bool:
    """Whether an argument is a number, as Python or NumPy has them."""
    return isinstance(value, Real)


@dataclass(frozen=True)
class Schedule:
    """A run of `steps` steps: gates are watched until `close_from`; then they close, and are fixed at `freeze_at`.

    close_from, freeze_at: shares of the run, 0 <= close_from < freeze_at <= 1.

    Raises:
        UsageError: they are not.
    """

    steps: int
    close_from: float
    freeze_at: float

    def __post_init__(self) -> None:
        if not is_number(self.steps) or not self.steps >= 1:
            raise UsageError(f"steps={self.steps!r}", "say how often `step` will be called in the whole run")
        shares = (self.close_from, self.freeze_at)
        if not all(map(is_number, shares)) or not 0 <= self.close_from < self.freeze_at <= 1:
            raise UsageError(
                f"close_from={self.close_from!r}, freeze_at={self.freeze_at!r}",
                "give shares of the run between 0 and 1, close_from before freeze_at",
            )

    @classmethod
    def of(cls, steps: int, close_from: float, freeze_at: float | None, mode: str) -> Schedule:
        """With the end of the mode, where none is given.

        Raises:
            UsageError: there is no such mode.
        """
        if mode not in tuple(CLOSING):
            raise UsageError(f"mode={mode!r}", f"choose one of {', '.join(CLOSING)}")
        end: Any = fixed_at(close_from, freeze_at, CLOSING[mode]) if is_number(close_from) else freeze_at
        return cls(steps, close_from, end)

    @property
    def chosen_at(self) -> int:
        """The step after which it is chosen what is to close."""
        return max(1, round(self.close_from * self.steps))

    @property
    def frozen_at(self) -> int:
        """The step after which the gates are fixed."""
        return max(1, round(self.freeze_at * self.steps))

    def require_fixed(self, phase: str, step: int) -> None:
        """Warn where all gates are open: nothing would be removed.

        Raises:
            UsageError: gates are closing, so that masks are neither 0 nor 1.
        """
        done = f"step() was called {step} times, of {self.steps}, and fixes them at {self.frozen_at}"
        if phase == "learning":
            raise UsageError(f"the gates are closing: {done}", "go on until they are fixed, or call freeze()")
        if phase == "open":
            warnings.warn(f"all gates are open, so that nothing will be removed: {done}", stacklevel=3)

    def progress(self, step: int) -> float:
        """Share of the closing phase that is over, in [0, 1]."""
        return min(1.0, max(0.0, (step - self.chosen_at) / max(1, self.frozen_at - self.chosen_at)))

    def closed(self, step: int) -> float:
        """Share of what is to close that has closed.

        Cubic as in Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1: fast while there is plenty to
        remove, slow where each cut hurts.
        """
        return 1.0 - (1.0 - min(1.0, self.progress(step) / RAMP)) ** 3


def closing(stay: Bools, worth: Floats, closed: float) -> Floats:
    """Masks [gates] between 1 and 0 when the share `closed` of all that do not `stay` has closed, the worthless first.

    stay: bool [gates]. worth: float [gates].
    """
    going = np.flatnonzero(~stay)
    order = going[np.argsort(worth[going], kind="stable")]
    turn = np.arange(1, len(order) + 1) / max(1, len(order))  # share that has closed when this one has
    values = np.ones(len(stay))
    values[order] = np.clip((turn + SPAN - closed * (1 + SPAN)) / SPAN, 0.0, 1.0)
    return values
