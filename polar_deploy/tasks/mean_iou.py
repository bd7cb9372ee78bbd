"""Mean intersection over union, of semantic segmentation."""

from __future__ import annotations

import math

import numpy as np

from polar_deploy.tasks.metric import Floats, Metric, Statistics
from polar_deploy.tensors import Arrays


class MeanIoU(Metric):
    """Mean over the classes of intersection over union (Everingham et al., IJCV 88, 2010, section 4.4), in percent.

    The statistics of a sample are three counts of pixels for each class: where answer and mask both have it, where the
    answer has it, and where the mask has it. So the union of a class is that over all samples, and classes that occur
    neither in an answer nor in a mask have no part in the mean. Pixels that are ignored count nowhere; where a logit is
    NaN or Inf, the answer is no class.

    Args:
        classes: how many there are.
        output: name of the logits, [B, classes, H, W].
        target: name of the masks, integers [B, H, W].
        ignored: number in the masks of pixels without a class.
    """

    name = "mean IoU"

    def __init__(self, classes: int, output: str, target: str, ignored: int) -> None:
        self.classes, self.output, self.target, self.ignored = classes, output, target, ignored

    def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
        """[B, 3 · classes]: intersections, answers, masks."""
        logits, masks = outputs[self.output], targets[self.target]
        answers = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), self.classes)
        return np.stack([self._counts(*each) for each in zip(answers, masks.astype(np.int64), strict=True)])

    def _counts(self, answer: np.ndarray, mask: np.ndarray) -> Floats:
        judged = mask != self.ignored
        answer, mask = answer[judged], mask[judged]
        counted = (mask[answer == mask], answer[answer < self.classes], mask)
        return np.concatenate([np.bincount(each, minlength=self.classes) for each in counted]).astype(np.float64)

    def score(self, totals: Floats) -> Floats:
        """Percent; NaN where no pixel is judged."""
        iou = self._iou(totals)
        occurs = ~np.isnan(iou)
        with np.errstate(invalid="ignore"):
            mean: Floats = np.where(occurs, iou, 0).sum(axis=1) / occurs.sum(axis=1)
        return mean

    def _iou(self, totals: Floats) -> Floats:
        """Percent of each class, [R, classes]; NaN where it does not occur."""
        both, answers, masks = np.split(totals, 3, axis=1)
        with np.errstate(invalid="ignore"):
            iou: Floats = 100 * both / (answers + masks - both)
        return iou

    def by_class(self, statistics: Statistics) -> dict[int, tuple[int, float]]:
        """Of each class in the masks: in how many of them, and its IoU in percent."""
        iou = self._iou(statistics.sum(axis=0, keepdims=True))[0].tolist()
        seen = np.count_nonzero(statistics[:, 2 * self.classes :], axis=0).tolist()
        return {label: (count, iou[label]) for label, count in enumerate(seen) if count}

    def chance(self, statistics: Statistics) -> tuple[float, float]:
        """Of the commonest class in every pixel: its share of the pixels, over the number of classes in the masks."""
        masks = statistics[:, 2 * self.classes :]
        totals, pixels = masks.sum(axis=0), masks.sum(axis=1)
        commonest, present = int(totals.argmax()), max(1, int(np.count_nonzero(totals)))
        share = totals[commonest] / max(1.0, pixels.sum())
        error = math.sqrt(float(((masks[:, commonest] - share * pixels) ** 2).sum())) / max(1.0, pixels.sum())
        return 100 * share / present, 100 * error / present
