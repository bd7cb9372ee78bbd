"""Top-1 accuracy, with an interval that holds where few answers differ between two networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from polar_deploy.tasks.metric import DropInterval, Floats, Metric, Statistics
from polar_deploy.tensors import Arrays, finite

Z95 = 1.959964  # 97.5th percentile of the normal distribution
_RIGHT, _ONE, _LABEL, _ANSWER, _CONFIDENCE = range(5)
NO_ANSWER = -1  # where a logit is NaN or Inf: wrong


class Accuracy(Metric):
    """Share of the samples whose largest logit is that of their label, in percent.

    The statistics of a sample are: whether it is right, 1, and for reports its label, the answer, and the probability
    that the network gives it, its softmax in percent.

    Args:
        output: name of the logits, [B, classes].
        target: name of the labels, [B].
    """

    name = "accuracy"

    def __init__(self, output: str = "logits", target: str = "label") -> None:
        self.output, self.target = output, target

    def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
        """[B, 5]."""
        logits, labels = outputs[self.output].astype(np.float64), targets[self.target]
        whole = finite({self.output: logits})
        logits = np.where(whole[:, None], logits, 0)
        answers = np.where(whole, logits.argmax(axis=1), NO_ANSWER)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        sure = 100 * odds.max(axis=1) / odds.sum(axis=1)
        return np.stack([answers == labels, np.ones(len(labels)), labels, answers, sure], axis=1).astype(np.float64)

    def score(self, totals: Floats) -> Floats:
        """Percent right."""
        return 100 * totals[:, _RIGHT] / totals[:, _ONE]

    def drop_interval(self, full: Statistics, compressed: Statistics) -> DropInterval:
        """Tango's, see `drop_interval`."""
        (lost, gained), samples = self._unlike(full, compressed), len(full)
        return lambda times: drop_interval(lost * times, gained * times, samples * times)

    def chance(self, statistics: Statistics) -> tuple[float, float]:
        """Of the commonest class, named every time."""
        samples = len(statistics)
        share = int(np.bincount(statistics[:, _LABEL].astype(np.int64)).max()) / samples
        return 100 * share, 100 * math.sqrt(share * (1 - share) / samples)

    def details(self, full: Statistics, compressed: Statistics) -> dict[str, Any]:
        """Same answers, right or wrong, in percent; and how many samples one network alone is right on."""
        lost, gained = self._unlike(full, compressed)
        agreed = (full[:, _ANSWER] == compressed[:, _ANSWER]) & (full[:, _ANSWER] >= 0)
        return {"agreement": 100 * float(agreed.mean()), "lost": lost, "gained": gained}

    @staticmethod
    def _unlike(full: Statistics, compressed: Statistics) -> tuple[int, int]:
        right, other = full[:, _RIGHT] > 0, compressed[:, _RIGHT] > 0
        return int((right & ~other).sum()), int((~right & other).sum())

    def by_class(self, statistics: Statistics) -> dict[int, tuple[int, float]]:
        """Each label's samples, and percent right of them."""
        labels = statistics[:, _LABEL].astype(np.int64)
        seen, right = np.bincount(labels).tolist(), np.bincount(labels, statistics[:, _RIGHT]).tolist()
        return {label: (count, 100 * right[label] / count) for label, count in enumerate(seen) if count}

    def worst(self, full: Statistics, compressed: Statistics, most: int) -> list[dict[str, Any]]:
        """What only the full network gets right, the surest wrong answer first: {"index", "label", "answer",
        "confidence"}, the last one in percent."""
        lost = np.flatnonzero((full[:, _RIGHT] > 0) & (compressed[:, _RIGHT] == 0) & (compressed[:, _ANSWER] >= 0))
        order = lost[np.argsort(-compressed[lost, _CONFIDENCE], kind="stable")][:most]
        return [
            {
                "index": int(index),
                "label": int(compressed[index, _LABEL]),
                "answer": int(compressed[index, _ANSWER]),
                "confidence": round(float(compressed[index, _CONFIDENCE]), 2),
            }
            for index in order
        ]


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
