"""When gates learn: shares of the gated run, and the target on the way down."""

from __future__ import annotations

from dataclasses import dataclass

RAMP = 0.7  # share of the learning phase in which the target falls; the rest lets the gates settle at the budget


@dataclass(frozen=True)
class Schedule:
    """`done` is the share of the gated run that is over, in [0, 1]; `start` < `freeze` are such shares too."""

    start: float
    freeze: float
    temperatures: tuple[float, float]

    def progress(self, done: float) -> float:
        """Share of the learning phase that is over, in [0, 1]."""
        return min(1.0, max(0.0, (done - self.start) / (self.freeze - self.start)))

    def target(self, done: float) -> float:
        """Excess over the budget aimed at (`cost.Constraint`): 1 at the start, 0 from the ramp's end on.

        Cubic as in Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1: fast while there is plenty to
        remove, slow where each cut hurts.
        """
        return (1.0 - min(1.0, self.progress(done) / RAMP)) ** 3

    def temperature(self, done: float) -> float:
        """Temperature of the gates' sigmoid, geometric from the first to the last."""
        first, last = self.temperatures
        return float(first * (last / first) ** self.progress(done))
