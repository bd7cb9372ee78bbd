"""Rounds of a comparison on the clock, from the figures that a test is about."""

from __future__ import annotations

from polar_deploy.documents.parity import Interval, Latency, Round
from polar_deploy.documents.part import Pair


def round_of(full: Latency, compressed: Latency, speedup: Interval, control: Interval, singles: int = 0) -> Round:
    """A round on a CPU whose samples nobody looks at."""
    return Round(
        pairs=204,
        inferences=1,
        singles=singles,
        speedup=speedup,
        control=control,
        before=None,
        after=None,
        full=full,
        compressed=compressed,
        quantiles_ms=Pair(full=(), compressed=()),
    )
