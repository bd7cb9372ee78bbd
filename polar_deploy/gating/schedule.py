"""When gates learn: shares of the run, and the target on the way down."""

from __future__ import annotations

from dataclasses import dataclass

RAMP = 0.7  # share of the learning phase in which the target falls; the rest lets the network settle at the budget
PLANS = 16  # how often what is to stay is chosen anew while gates learn


@dataclass(frozen=True)
class Schedule:
    """Of a run of `steps` steps: gates are watched from the first one, close from `start` on, are fixed at `freeze`.

    start, freeze: shares of the run, 0 <= start < freeze <= 1.
    """

    steps: int
    start: float = 0.05
    freeze: float = 0.3

    def progress(self, step: int) -> float:
        """Share of the learning phase that is over, in [0, 1]."""
        return min(1.0, max(0.0, (step / self.steps - self.start) / (self.freeze - self.start)))

    def target(self, step: int) -> float:
        """Share of the way from the full cost to the budget that is still to go: 1 at the start, 0 from the ramp's end.

        Cubic as in Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1: fast while there is plenty to
        remove, slow where each cut hurts.
        """
        return (1.0 - min(1.0, self.progress(step) / RAMP)) ** 3

    @property
    def interval(self) -> int:
        """Steps from one plan to the next."""
        return max(1, round((self.freeze - self.start) * self.steps / PLANS))

    def plans(self, step: int) -> bool:
        """Whether a plan is made after `step` steps."""
        first = round(self.start * self.steps)
        return first <= step < self.frozen_at and (step - first) % self.interval == 0

    @property
    def frozen_at(self) -> int:
        """The step after which the gates are fixed."""
        return max(1, round(self.freeze * self.steps))
