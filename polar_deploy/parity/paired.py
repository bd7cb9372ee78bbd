"""What two networks are worth on the same samples: scores, their paired difference, and how far outputs are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from polar_deploy.documents.parity import Accuracy, ClassScore, Difference, Loss, LostSample
from polar_deploy.documents.part import Pair
from polar_deploy.errors import ContentError
from polar_deploy.tasks.metric import DropInterval, Metric, Statistics
from polar_deploy.tensors import Arrays, count, finite

_WORST_CLASSES = 10
_WORST_SAMPLES = 12
_BILLION = 10**9


@dataclass(frozen=True)
class Paired:
    """Statistics of a full and a compressed network, or of any two, on the same samples.

    Attributes:
        metric: what they are statistics of.
        full, compressed: float64 [N, K] each.
        nonfinite: "full" and "compressed": of how many samples an output holds NaN or Inf.
    """

    metric: Metric
    full: Statistics
    compressed: Statistics
    nonfinite: dict[str, int] = field(default_factory=lambda: {"full": 0, "compressed": 0})

    @property
    def samples(self) -> int:
        """How many."""
        return len(self.full)

    @cached_property
    def scores(self) -> tuple[float, float]:
        """Scores of both; NaN where the samples say nothing."""
        return self.metric.of_all(self.full), self.metric.of_all(self.compressed)

    @property
    def drop(self) -> float:
        """What the compressed network loses, in points where the unit is %, else in the unit; below 0: it gains."""
        return self.scores[0] - self.scores[1]

    @cached_property
    def _interval(self) -> DropInterval:
        return self.metric.drop_interval(self.full, self.compressed)

    @property
    def interval(self) -> tuple[float, float]:
        """The drop's 95 % interval."""
        return self._interval(1.0)

    def samples_to_decide(self, max_drop: float) -> int | None:
        """How many samples would put the whole interval on one side of `max_drop`, if all else stays as it is.

        None: no number below a billion would.
        """

        def decides(samples: int) -> bool:
            low, high = self._interval(samples / self.samples)
            return high <= max_drop or low > max_drop

        most = self.samples
        while not decides(most):
            most *= 2
            if most > _BILLION:
                return None
        least = most // 2
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (least, middle) if decides(middle) else (middle, most)
        return most

    def accuracy(self) -> Accuracy:
        """Scores, the drop and its paired 95 % interval, and what else the metric tells of two networks."""
        full, compressed = self.scores
        low, high = self.interval
        return Accuracy(
            samples=self.samples,
            full=_number(full),
            compressed=_number(compressed),
            drop=_number(self.drop),
            interval=(_number(low), _number(high)),
            nonfinite=Pair(**self.nonfinite),
            **self.metric.details(self.full, self.compressed),
        )

    def classes(self) -> list[ClassScore] | None:
        """Each class's samples, scores and drop, in the order of the labels; None: the metric knows no classes."""
        full, compressed = (self.metric.by_class(each) for each in (self.full, self.compressed))
        if full is None or compressed is None:
            return None
        return [
            ClassScore(
                **{"class": label},
                samples=samples,
                full=score,
                compressed=compressed[label][1],
                drop=score - compressed[label][1],
            )
            for label, (samples, score) in sorted(full.items())
            if label in compressed
        ]

    def worst_classes(self) -> list[int] | None:
        """The labels of the (at most ten) classes that lose most, those that lose nothing left out."""
        classes = self.classes()
        losing = sorted((each for each in classes or () if each.drop > 0), key=lambda each: -each.drop)
        return None if classes is None else [each.label for each in losing[:_WORST_CLASSES]]

    def worst_samples(self) -> list[LostSample]:
        """A dozen samples at most, as the metric tells them."""
        return [LostSample(**each) for each in self.metric.worst(self.full, self.compressed, _WORST_SAMPLES)]


@dataclass
class Gap:
    """Largest difference between two sets of outputs, and the largest value: what "relative" is measured by."""

    difference: float = 0.0
    scale: float = 0.0
    nonfinite: int = 0  # samples left out
    compared: int = 0

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Take in two arrays [B, …]. Samples that are not finite in both are counted, and left out."""
        whole = finite({"reference": reference, "other": other})
        self.compared += int(whole.sum())
        self.nonfinite += int((~whole).sum())
        reference, other = reference[whole].astype(np.float64), other[whole].astype(np.float64)
        self.difference = max(self.difference, float(np.abs(reference - other).max(initial=0.0)))
        self.scale = max(self.scale, float(np.abs(reference).max(initial=0.0)))

    @property
    def relative(self) -> float | None:
        """Difference as a share of the scale; None where nothing is finite, or the scale alone is 0."""
        if self.nonfinite and not self.compared:
            return None
        if self.difference == 0:
            return 0.0
        return self.difference / self.scale if self.scale else None


class Comparison:
    """A reference and another engine on the same samples, batch after batch: statistics, and gaps between outputs.

    Args:
        metric: None: outputs are compared, and nothing else.
    """

    def __init__(self, metric: Metric | None) -> None:
        self.metric = metric
        self.gaps: dict[str, Gap] = {}
        self._parts: list[tuple[Statistics, Statistics]] = []
        self._nonfinite = {"full": 0, "compressed": 0}

    def add(self, reference: Arrays, other: Arrays, targets: Arrays) -> None:
        """Take in outputs of both, and targets, [B, …] each."""
        for name, values in reference.items():
            self.gaps.setdefault(name, Gap()).add(values, other[name])
        for name, outputs in (("full", reference), ("compressed", other)):
            self._nonfinite[name] += int((~finite(outputs)).sum())
        if self.metric is not None:
            self._parts.append((_statistics(self.metric, reference, targets), _statistics(self.metric, other, targets)))

    @cached_property
    def paired(self) -> Paired | None:
        """All statistics, once nothing more is added; None without a metric."""
        if self.metric is None:
            return None
        full, compressed = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        return Paired(self.metric, full, compressed, self._nonfinite)

    def difference(self) -> Difference:
        """The largest relative difference of an output, that output's scale, and the differences of all of them."""
        worst = max(self.gaps.values(), key=lambda gap: math.inf if gap.relative is None else gap.relative)
        outputs = {name: gap.relative for name, gap in self.gaps.items()}
        return Difference(relative_difference=worst.relative, scale=worst.scale, outputs=outputs)

    def loss(self) -> Loss:
        """Drop against the reference with its interval, and differences of outputs."""
        counted, gaps = self.paired.accuracy().entries() if self.paired else {}, self.gaps.values()
        return Loss(
            **self.difference().entries(),
            samples=max(gap.compared + gap.nonfinite for gap in gaps),
            nonfinite=max(gap.nonfinite for gap in gaps),
            **{key: counted[key] for key in ("drop", "interval", "agreement") if key in counted},
        )


def _statistics(metric: Metric, outputs: Arrays, targets: Arrays) -> Statistics:
    """Of a batch. What a sample with NaN or Inf in its outputs cannot say is 0; it fails the verdict by itself.

    Raises:
        ContentError: the metric gives no numbers for outputs that have some.
    """
    found, samples, whole = metric.statistics(outputs, targets), count(outputs), finite(outputs)
    values: Statistics = np.asarray(found, np.float64)
    if values.ndim != 2 or len(values) != samples:
        problem = f"the statistics of {metric.name} have the shape {list(values.shape)}, for {samples} samples"
        raise ContentError(problem, f"return [{samples}, K]: K numbers for each sample")
    if len(bad := np.flatnonzero(whole & ~np.isfinite(values).all(axis=1))):
        problem = f"the statistics of {metric.name} hold NaN or Inf for {len(bad)} samples whose outputs are finite"
        raise ContentError(problem, "return sums, and divide in `score` only")
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
