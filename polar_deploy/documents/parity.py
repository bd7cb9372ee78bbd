"""parity.json: accuracy and latency of the compressed engine against the full one, and the verdict."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from polar_deploy.config import Count, CountOrNone, NonNegative, Positive
from polar_deploy.documents.part import STRICT, Document, Open, Pair, Part

Result = Literal["pass", "fail", "undecided"]
Percent = Annotated[float, Field(ge=0, le=100)]
Percentiles = Literal["p90", "p95", "p99", "p99.9"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Reason = Annotated[str, Field(min_length=1)]

NOISE = 0.02  # share by which two copies of one engine may differ on a quiet machine
LOUD = 3  # how often noise above that counts: what they differ by is one draw, and the engines' copies are others

EXIT_CODES: dict[Result, int] = {"pass": 0, "fail": 1, "undecided": 5}


@dataclass(frozen=True, config=STRICT)
class Judgement:
    """One answer with its reason, one sentence."""

    result: Result
    reason: Reason


@dataclass(frozen=True, config=STRICT)
class Interval:
    """A median and its 95 % confidence interval."""

    median: Positive
    low: Positive
    high: Positive


@dataclass(frozen=True, config=STRICT)
class Percentile:
    """A percentile of single inferences, in milliseconds, with its 95 % interval.

    `high_ms` is None where there are too few for an upper end: of the 99th percentile, fewer than 368.
    """

    value_ms: Positive
    low_ms: Positive
    high_ms: Positive | None


@dataclass(frozen=True, config=STRICT)
class Latency:
    """Milliseconds an inference, over the samples of one round.

    `low_ms` and `high_ms` enclose the median with 95 %; `iqr_ms` is the 75th minus the 25th percentile. `tail` has
    percentiles of single inferences; {} where none were timed one by one.
    """

    median_ms: Positive
    low_ms: Positive
    high_ms: Positive
    iqr_ms: NonNegative
    tail: dict[Percentiles, Percentile] = Field(default_factory=dict)


class Machine(Part):
    """What measured."""

    cpu: str
    cores: Count
    architecture: str
    system: str


class Metric(Part):
    """What networks are compared by: higher is better. `unit`: of scores; differences of percentages are points."""

    name: str
    unit: str


class Accuracy(Open):
    """Scores of both networks on the same samples, and what else their metric tells.

    Attributes:
        full, compressed: the metric's scores; None: the samples do not say.
        drop: in points where the unit is %, else in the unit; below 0: the compressed network is better.
        interval: 95 % interval of the drop, from matched pairs.
        agreement: same answer, right or wrong, in percent.
        lost, gained: samples that one network alone is right on, the full or the compressed one.
        nonfinite: samples with NaN or Inf in an output.
    """

    samples: Count
    full: float | None
    compressed: float | None
    drop: float | None
    interval: tuple[float | None, float | None]
    agreement: Percent | None = None
    lost: CountOrNone | None = None
    gained: CountOrNone | None = None
    nonfinite: Pair[CountOrNone]


class ClassScore(Part):
    """One class, in the metric's unit."""

    label: CountOrNone = Field(alias="class")
    samples: Count
    full: float
    compressed: float
    drop: float


class LostSample(Open):
    """A sample that loses, as the metric tells it.

    Attributes:
        index: place in the test set.
        label, answer, confidence: of a classifier: what it is, what the compressed engine says, its softmax in percent.
        full, compressed: else the sample's own scores.
    """

    index: CountOrNone
    label: CountOrNone | None = None
    answer: CountOrNone | None = None
    confidence: Percent | None = None
    full: float | None = None
    compressed: float | None = None


class Difference(Part):
    """The output that differs most, and all of them, by name.

    `relative_difference` is the largest difference as a share of the output's largest value, which is `scale`; None
    where all values are 0, or none is finite.
    """

    relative_difference: NonNegative | None
    scale: NonNegative
    outputs: Annotated[dict[str, NonNegative | None], Field(min_length=1)]


class Loss(Difference):
    """One engine against its own FP32 graph. Drop and interval as of `Accuracy`, where the task has a metric.

    Samples with NaN or Inf are left out of the difference.
    """

    samples: Count
    drop: float | None = None
    interval: tuple[float | None, float | None] | None = None
    agreement: Percent | None = None
    nonfinite: CountOrNone


def known_drop(counted: Accuracy | Loss | None) -> tuple[float, float, float] | None:
    """A drop and the ends of its interval; None where nobody can tell."""
    drop, ends = (counted.drop, counted.interval) if counted else (None, None)
    if drop is None or ends is None or ends[0] is None or ends[1] is None:
        return None
    return drop, ends[0], ends[1]


class Export(Part):
    """ONNX against PyTorch's outputs: relative differences."""

    samples: Count
    full: NonNegative | None
    gated: NonNegative | None


class Conditions(Open):
    """The state of a GPU; None: it does not tell.

    Attributes:
        sm_mhz, memory_mhz: clocks.
        throttle: why it is slowed down; []: it is not, or does not tell.
        energy_mj: millijoules since the driver was loaded.
    """

    name: str | None
    driver: str | None = None
    sm_mhz: CountOrNone | None = None
    memory_mhz: CountOrNone | None = None
    power_w: NonNegative | None = None
    temperature_c: int | None = None
    throttle: list[str]
    energy_mj: NonNegative | None


class RoundFigures(Part):
    """The figures of a `Round`."""

    pairs: Count
    inferences: Count
    singles: CountOrNone
    speedup: Interval
    control: Interval
    before: Conditions | None
    after: Conditions | None
    full: Latency
    compressed: Latency
    quantiles_ms: Pair[tuple[NonNegative, ...]]


class Round(RoundFigures):
    """One whole measurement of both engines.

    Attributes:
        pairs: samples of each; inferences: a sample is the mean of so many.
        singles: inferences of each engine that were timed one by one.
        speedup: time of the full engine / time of the compressed one. control: of the full one / of its own twin.
        before, after: None on a CPU.
        quantiles_ms: of the samples, evenly spaced from 0 to 100 %.
    """

    @property
    def throttled(self) -> list[str]:
        """Why the GPU slowed down, during or right after the round; [] if it did not."""
        reasons = [reason for state in (self.before, self.after) if state for reason in state.throttle]
        return list(dict.fromkeys(reasons))

    @property
    def noise(self) -> float:
        """How far off the control is, as a share: 0.01 = 1 %."""
        return abs(self.control.median - 1)

    @property
    def speedup_with_noise(self) -> Interval:
        """The speed-up, its interval widened by as much as two copies of one engine may differ here.

        That is the end of the control's interval which is farther from 1: what the machine, and not the engine, may
        have added to the ratio. On a machine that is not quiet it counts `LOUD` times.
        """
        bias = max(self.control.high, 1 / self.control.low, 1.0) ** (1 if self.noise <= NOISE else LOUD)
        return Interval(self.speedup.median, self.speedup.low / bias, self.speedup.high * bias)

    @property
    def speedup_over_both(self) -> float:
        """Over the mean of the full engine and its twin: where in memory a copy lies weighs half as much."""
        return self.speedup.median * (1 + 1 / self.control.median) / 2


class BatchLatency(Part):
    """One batch size.

    Attributes:
        decided: whether the machine was quiet, or the engines differ by far more than it may have made.
        different: the interval excludes a tie, and the ratio is off 1 by more than 2 %.
        chosen: index of the round that counts.
        energy_mj: of one inference; None where the device does not count it.
    """

    batch: Count
    decided: bool
    different: bool
    chosen: CountOrNone
    rounds: Annotated[list[Round], Field(min_length=1)]
    images_per_second: Pair[Positive]
    energy_mj: Pair[NonNegative | None]

    @property
    def best(self) -> Round:
        """The round that counts."""
        return self.rounds[self.chosen]


class Judged(Part):
    """What was asked, as the settings `accept` have it, and the answers."""

    max_drop: NonNegative
    accuracy_rule: Literal["interval", "point"]
    min_speedup: Positive
    max_latency_ms: Positive | None
    latency_percentile: Literal["p50"] | Percentiles
    batch: Count
    accuracy: Judgement
    latency: Judgement
    overall: Judgement

    def asked(self) -> dict[str, float | str | None]:
        """The settings `accept`."""
        return self.model_dump(mode="json", exclude={"accuracy", "latency", "overall"})

    def parts_that(self, result: Result) -> list[str]:
        """Which of "accuracy" and "latency" came out so."""
        return [part for part in ("accuracy", "latency") if getattr(self, part).result == result]

    @property
    def exit_code(self) -> int:
        """The command's: 0 passed, 1 failed, 5 undecided."""
        return EXIT_CODES[self.overall.result]


class Compared(Document):
    """What two engines are worth. None where nothing was compared.

    Attributes:
        not_run: why the engines could not run here; then nothing of them is claimed.
        metric: what `accuracy` is a score of; None: the task has none, and outputs alone are compared.
        classes: in the order of the labels. worst_classes: labels of those that lose most, the largest drop first.
        worst_samples: that lose most; of a classifier those that only the full engine gets right, the surest wrong
            answer first.
        precision: what it costs each engine.
        graphs: the FP32 graphs in ONNX Runtime: what pruning costs, whatever the precision.
        outputs: the compressed engine's against the full one's.
        surgery: compressed ONNX against gated ONNX.
    """

    schema_version: Literal[1] = Field(alias="schema")
    machine: Machine
    not_run: str | None
    metric: Metric | None
    accuracy: Accuracy | None
    classes: list[ClassScore] | None
    worst_classes: Annotated[list[CountOrNone], Field(max_length=10)] | None
    worst_samples: Annotated[list[LostSample], Field(max_length=12)] | None
    precision: Pair[Loss] | None
    graphs: Accuracy | None
    outputs: Difference | None
    export: Export | None
    surgery: Difference | None
    latency: list[BatchLatency]
    verdict: Judged


class Parity(Compared):
    """The file: `files` are the graphs and engines that were judged, by their sha256; class names go by label."""

    files: Annotated[dict[str, Sha256], Field(min_length=1)]
    class_names: list[str]
