"""How good outputs are: numbers for each sample, and the score of any weighting of the samples.

Two networks are compared on the same samples, so that the interval of their difference comes from resampling pairs.
With statistics that add up, a resample is a row of weights, and all of them together are one product of matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from polar_deploy.tensors import Arrays

Statistics: TypeAlias = npt.NDArray[np.float64]  # [N, K]: K numbers for each sample
Floats: TypeAlias = npt.NDArray[np.float64]

# how many times as many samples -> low and high end; 1: with those that there are
DropInterval: TypeAlias = Callable[[float], tuple[float, float]]

RESAMPLES = 2000
_AT_ONCE = 1 << 25  # weights held at once


class Metric(ABC):
    """A score of outputs, higher is better. It runs where engines are measured, so it needs no torch.

    A subclass says `name`, `statistics` and `score`. Where samples do not add up (mAP ranks the detections of all of
    them), it keeps in `statistics` what it needs of a sample and overrides `scores` instead.

    Attributes:
        name: as reports have it, such as "mean IoU".
        unit: of the score: "%", where differences are points; else "" or a unit.
    """

    name: str
    unit: str = "%"

    @abstractmethod
    def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
        """K numbers for each sample, float64 [B, K]; finite wherever the sample's outputs are.

        Args:
            outputs: the network's, by name, [B, …] each.
            targets: what the data set says of the same samples, by name, [B, …] each.
        """

    def score(self, totals: Floats) -> Floats:
        """Scores [R] of sums of statistics over samples, [R, K]; NaN where such a sum says nothing."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score nor scores")

    def scores(self, statistics: Statistics, weights: Floats) -> Floats:
        """Scores [R] of the samples [N, K], each counted as often as the rows of `weights` [R, N] say."""
        return self.score(weights @ statistics)

    def of_all(self, statistics: Statistics) -> float:
        """The score of all samples [N, K], each counted once."""
        return float(self.scores(statistics, np.ones((1, len(statistics))))[0])

    @property
    def difference_unit(self) -> str:
        """Of a difference of scores: points, where these are in percent."""
        return difference_unit(self.unit)

    def told(self, score: float, digits: int = 1) -> str:
        """A score as people read it, such as "accuracy 98.8 %"; `digits` behind the point of a percentage."""
        return f"{self.name} {self.shown(score, digits)}"

    def shown(self, score: float, digits: int = 1) -> str:
        """A score in its unit."""
        return f"{score:.{digits}f} %" if self.unit == "%" else f"{score:.4g} {self.unit}".rstrip()

    def drop_interval(self, full: Statistics, compressed: Statistics) -> DropInterval:
        """95 % interval of what the compressed network loses, in the score's unit, as a function of the sample size.

        A paired bootstrap over samples (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): the
        2.5th and 97.5th percentile of the drop in `RESAMPLES` resamples, the same ones for both networks. With more
        samples of the same kind it would be narrower by the square root of their number.

        Args:
            full, compressed: statistics [N, K] of the same samples.
        """
        if np.array_equal(full, compressed):  # as often of an engine and its graph
            return lambda times: (0.0, 0.0)
        drop = self.of_all(full) - self.of_all(compressed)
        low, high = np.nanpercentile(bootstrap(self, full, compressed), [2.5, 97.5]).tolist()
        return lambda times: (drop + (low - drop) / times**0.5, drop + (high - drop) / times**0.5)

    def chance(self, statistics: Statistics) -> tuple[float, float] | None:
        """What a network would score that knows nothing, and the standard error of such a score; None: not known."""
        return None

    def details(self, full: Statistics, compressed: Statistics) -> dict[str, Any]:
        """What else two networks tell of each other on the same samples, as JSON."""
        return {}

    def by_class(self, statistics: Statistics) -> dict[int, tuple[int, float]] | None:
        """Number of samples and score of each class that occurs; None where the metric knows no classes."""
        return None

    def worst(self, full: Statistics, compressed: Statistics, most: int) -> list[dict[str, Any]]:
        """The samples that lose most, worst first: {"index", "full", "compressed"}, with their own scores."""
        with np.errstate(divide="ignore", invalid="ignore"):  # of one sample alone, a score may say nothing
            own = [self._of_each(statistics) for statistics in (full, compressed)]
            drops = np.nan_to_num(own[0] - own[1], nan=0.0)
        order = [int(index) for index in np.argsort(-drops, kind="stable")[:most] if drops[index] > 0]
        return [{"index": index, "full": float(own[0][index]), "compressed": float(own[1][index])} for index in order]

    def _of_each(self, statistics: Statistics) -> Floats:
        """The score of each sample alone, [N]."""
        ones = np.ones((1, 1))
        return np.array([self.scores(statistics[index : index + 1], ones)[0] for index in range(len(statistics))])


def signed(value: float) -> str:
    """A difference with its sign; what rounds to zero has a plus: 1.875 -> "+1.88", -0.001 -> "+0.00"."""
    return f"{round(value, 2) + 0.0:+.2f}"


def difference_unit(unit: str) -> str:
    """Of a difference of scores that have a unit: points, where that is "%"."""
    return "points" if unit == "%" else unit


def bootstrap(metric: Metric, full: Statistics, compressed: Statistics, resamples: int = RESAMPLES) -> Floats:
    """The drop in each of `resamples` resamples of the same pairs, [R]; the same ones each time."""
    draw = np.random.default_rng(0)
    samples = len(full)
    at_once = max(1, min(resamples, _AT_ONCE // samples))
    shares = np.full(samples, 1 / samples)
    drops = []
    for start in range(0, resamples, at_once):
        weights = draw.multinomial(samples, shares, min(at_once, resamples - start)).astype(np.float64)
        drops.append(metric.scores(full, weights) - metric.scores(compressed, weights))
    return np.concatenate(drops)
