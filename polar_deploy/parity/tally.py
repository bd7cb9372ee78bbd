"""What two engines answered to the same images: accuracies, their paired difference, agreement, classes, logits."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from polar_deploy.engines import Array

Z95 = 1.959964  # 97.5th percentile of the normal distribution
_WORST = 10  # classes
_BILLION = 10**9
_WORST_SAMPLES = 12


@dataclass(frozen=True)
class Lost:
    """A sample that only the full engine gets right.

    Attributes:
        index: its place among the samples that were counted.
        label: its class.
        answer: what the compressed engine takes it for.
        confidence: the probability that it gives that answer, its softmax in percent.
    """

    index: int
    label: int
    answer: int
    confidence: float


@dataclass
class Tally:
    """What both engines answered over a data set. A sample with NaN or Inf in its logits counts as wrong."""

    samples: int = 0
    full_right: int = 0
    compressed_right: int = 0
    lost: int = 0  # right in the full engine alone
    gained: int = 0  # right in the compressed engine alone
    agreed: int = 0  # same answer, right or wrong
    full_nonfinite: int = 0  # samples
    compressed_nonfinite: int = 0
    seen_of: Counter[int] = field(default_factory=Counter)  # class -> samples; the next two: those that are right
    full_right_of: Counter[int] = field(default_factory=Counter)
    compressed_right_of: Counter[int] = field(default_factory=Counter)
    worst_samples: list[Lost] = field(default_factory=list)  # the surest wrong answers first, a dozen at most

    def add(self, full: Array, compressed: Array, labels: npt.NDArray[np.int64]) -> None:
        """Count a batch: logits [B,classes] of both engines, labels [B]."""
        answers, others = _answers(full), _answers(compressed)
        right, other_right = answers == labels, others == labels
        self._keep_worst(compressed, labels, others, np.flatnonzero(right & ~other_right & (others >= 0)))
        self.samples += len(labels)
        self.full_right += int(right.sum())
        self.compressed_right += int(other_right.sum())
        self.lost += int((right & ~other_right).sum())
        self.gained += int((~right & other_right).sum())
        self.agreed += int(((answers == others) & (answers >= 0)).sum())
        self.full_nonfinite += int((answers < 0).sum())
        self.compressed_nonfinite += int((others < 0).sum())
        self.seen_of.update(labels.tolist())
        self.full_right_of.update(labels[right].tolist())
        self.compressed_right_of.update(labels[other_right].tolist())

    def _keep_worst(
        self, logits: Array, labels: npt.NDArray[np.int64], answers: npt.NDArray[np.int64], lost: npt.NDArray[np.intp]
    ) -> None:
        """Look for the surest wrong answers among the rows `lost` of a batch that is not counted yet."""
        wide = logits[lost].astype(np.float64)
        odds = np.exp(wide - wide.max(axis=1, keepdims=True))
        sure = 100 * odds.max(axis=1) / odds.sum(axis=1)
        self.worst_samples += [
            Lost(self.samples + row, int(labels[row]), int(answers[row]), round(confidence, 2))
            for row, confidence in zip(lost.tolist(), sure.tolist(), strict=True)
        ]
        self.worst_samples = sorted(self.worst_samples, key=lambda each: -each.confidence)[:_WORST_SAMPLES]

    @property
    def drop(self) -> float:
        """Accuracy lost, in percentage points; below 0: gained."""
        return 100 * (self.lost - self.gained) / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """The drop's 95 % interval, in percentage points."""
        return drop_interval(self.lost, self.gained, self.samples)

    def samples_to_decide(self, max_drop: float) -> int | None:
        """How many samples would put the whole interval on one side of `max_drop`, if the shares stay as they are.

        None: no number below a billion would.
        """

        def decides(samples: int) -> bool:
            scale = samples / self.samples
            low, high = drop_interval(self.lost * scale, self.gained * scale, samples)
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

    def as_dict(self) -> dict[str, Any]:
        """Accuracies and agreement in percent, drop and its paired 95 % interval in percentage points, counts."""
        share = 100 / self.samples
        return {
            "samples": self.samples,
            "full": self.full_right * share,
            "compressed": self.compressed_right * share,
            "drop": self.drop,
            "interval": list(self.interval),
            "agreement": self.agreed * share,
            "lost": self.lost,
            "gained": self.gained,
            "nonfinite": {"full": self.full_nonfinite, "compressed": self.compressed_nonfinite},
        }

    def classes(self) -> list[dict[str, Any]]:
        """Each class's samples, accuracies in percent and drop in points, in the order of the labels."""
        found = []
        for label, seen in sorted(self.seen_of.items()):
            full, compressed = (100 * right[label] / seen for right in (self.full_right_of, self.compressed_right_of))
            found.append(
                {"class": label, "samples": seen, "full": full, "compressed": compressed, "drop": full - compressed}
            )
        return found

    def worst(self) -> list[int]:
        """The labels of the (at most ten) classes that lose most, those that lose nothing left out."""
        losing = [each for each in self.classes() if each["drop"] > 0]
        return [each["class"] for each in sorted(losing, key=lambda each: -each["drop"])[:_WORST]]


@dataclass
class Gap:
    """Largest difference between two sets of logits, and the largest logit: what "relative" is measured by."""

    difference: float = 0.0
    scale: float = 0.0
    nonfinite: int = 0  # samples left out
    compared: int = 0

    def add(self, reference: Array, other: Array) -> None:
        """Take in two arrays [B,classes]. Samples that are not finite in both are counted, and left out."""
        finite = np.isfinite(reference).all(axis=1) & np.isfinite(other).all(axis=1)
        self.compared += int(finite.sum())
        self.nonfinite += int((~finite).sum())
        reference, other = reference[finite].astype(np.float64), other[finite].astype(np.float64)
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


@dataclass
class Comparison:
    """A reference and another engine on the same images: answers and logits."""

    tally: Tally = field(default_factory=Tally)
    gap: Gap = field(default_factory=Gap)

    def add(self, reference: Array, other: Array, labels: npt.NDArray[np.int64]) -> None:
        """Take in logits [B,classes] of both, labels [B]."""
        self.tally.add(reference, other, labels)
        self.gap.add(reference, other)

    def as_dict(self) -> dict[str, Any]:
        """Drop against the reference in points with its interval, agreement in percent, largest relative difference."""
        counted = self.tally.as_dict()
        return {
            **{key: counted[key] for key in ("samples", "drop", "interval", "agreement")},
            "relative_difference": self.gap.relative,
            "scale": self.gap.scale,
            "nonfinite": self.gap.nonfinite,
        }


def drop_interval(lost: float, gained: float, samples: float) -> tuple[float, float]:
    """95 % interval of the drop in percentage points, from the pairs that only one engine gets right.

    Tango's score interval for the difference of paired proportions (Statistics in Medicine 17, 1998, pp. 891-908): the
    true drop lies above its upper end with 2.5 %, also where there are few such pairs or none. (Wald intervals, the
    adjusted ones too, are passed by in up to 13 % there.)

    Args:
        lost: samples that only the reference is right on; the three numbers may be shares of samples, scaled.
        gained: samples that only the other is right on.
        samples: all of them, at least 1.
    """
    return -100 * _upper_end(gained, lost, samples), 100 * _upper_end(lost, gained, samples)


def _upper_end(lost: float, gained: float, samples: float) -> float:
    """The largest drop, as a share, that the counts do not reject: where the score falls to -z, by bisection."""
    low, high = (lost - gained) / samples, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _score(lost, gained, samples, middle) > -Z95 else (low, middle)
    return high


def _score(lost: float, gained: float, samples: float, drop: float) -> float:
    """How many standard deviations the counts lie above a drop (a share), under the likeliest shares with that drop."""
    a = 2 * samples
    b = (2 * samples - lost + gained) * drop - lost - gained
    c = -gained * drop * (1 - drop)
    share_gained = max(0.0, (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a))
    variance = samples * (2 * share_gained + drop * (1 - drop))
    distance = lost - gained - samples * drop
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _answers(logits: Array) -> npt.NDArray[np.int64]:
    """Class of each sample [B]; -1 where a logit is NaN or Inf."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
