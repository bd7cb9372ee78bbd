"""What a manifest says of the measurements where the bundle was made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polar_deploy.config import Count, Text
from polar_deploy.documents.part import Part

Milliseconds = Annotated[float, Field(ge=0)]


class Accuracy(Part):
    """Scores on the test set; `drop` and its 95 % `interval` in points, or in the metric's unit where that is not %."""

    samples: Count
    full: float
    compressed: float
    drop: float
    interval: tuple[float, float]

    @model_validator(mode="after")
    def _consistent(self) -> Accuracy:
        low, high = self.interval
        rounding = 1e-6 * max(1.0, abs(self.full), abs(self.compressed))
        outside = not low - rounding <= self.drop <= high + rounding
        if outside or abs(self.full - self.compressed - self.drop) > rounding:
            raise ValueError(f"a drop of {self.drop} contradicts its interval, or the accuracies")
        return self


class Percentile(Part):
    """Of single inferences, with its 95 % interval; None: too few for an upper end."""

    value_ms: Milliseconds
    low_ms: Milliseconds
    high_ms: Milliseconds | None


class Quantiles(Part):
    """Milliseconds an inference: median with its 95 % interval, interquartile range, upper percentiles."""

    median_ms: Milliseconds
    low_ms: Milliseconds
    high_ms: Milliseconds
    iqr_ms: Milliseconds
    tail: dict[Literal["p90", "p95", "p99", "p99.9"], Percentile]


class Ratio(Part):
    """A ratio of latencies with its 95 % interval."""

    median: Annotated[float, Field(gt=0)]
    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _ordered(self) -> Ratio:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"a median of {self.median} is not within {self.low} to {self.high}")
        return self


class Latency(Part):
    """One batch size: both networks in turn, and the full one against its own twin as `control`."""

    batch: Count
    decided: bool
    pairs: Count
    speedup: Ratio
    control: Ratio
    before: dict[Text, Any] | None
    after: dict[Text, Any] | None
    full: Quantiles
    compressed: Quantiles


class Metrics(Part):
    """What was measured where the bundle was made. `accuracy` is None where the engines did not run there."""

    machine: dict[Text, Any]
    not_run: Text | None
    accuracy: Accuracy | None
    fp32_graphs: Accuracy | None
    latency: list[Latency]
