"""Mean average precision of object detection, as COCO has it, with what a bootstrap over pictures needs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from polar_deploy.tasks.boxes import MOST, Detections, decode
from polar_deploy.tasks.metric import Floats, Metric, Statistics
from polar_deploy.tensors import Arrays

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_IOUS = 10  # thresholds: 0.50, 0.55, …, 0.95
_RECALLS = np.linspace(0, 1, 101)  # at which precision is read, as pycocotools has them
NO_OBJECT = -1  # label of what fills up the boxes of a picture
_KIND, _SCORE, _CODE = range(3)  # of a detection in the statistics
_AT_ONCE = 1 << 23  # weights of detections held at once


class _Entry(TypedDict):
    """An object or a detection as COCO has it: left, top, width, height in pixels; objects have no score."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    score: float | None


class _Document(TypedDict):
    """Objects, or detections, of some pictures."""

    images: list[dict[str, int]]
    categories: list[dict[str, int]]
    annotations: Sequence[_Entry]


class _Evaluated(TypedDict):
    """What pycocotools says of the detections of a class in a picture, in D of them and T thresholds."""

    image_id: int
    category_id: int
    dtScores: list[float]  # [D]
    dtMatches: npt.NDArray[np.float64]  # [T, D], the number of the object, or 0
    dtIgnore: npt.NDArray[np.bool_]  # [T, D]


class MeanAveragePrecision(Metric):
    """Mean over classes and IoU thresholds 0.50:0.05:0.95 of the average precision (COCO's AP, cocodataset.org), in %.

    Which detection finds which object is decided by pycocotools, once a picture: `COCOeval.evaluateImg`, all areas,
    100 detections a picture. IoU does not change when pictures are stretched, so that boxes are compared as the network
    sees them. The statistics of a picture are how many objects of each class it has, and for each of its 100 best
    detections a class, a score, and two sets of thresholds: where it finds an object, and where it is not judged,
    because it lies in a crowd.

    mAP is no mean of the pictures' own: `scores` ranks the detections of all pictures, each as often as the picture's
    weight says, as `COCOeval.accumulate` would those of a data set that has the picture so often. So the drop's
    interval is the paired bootstrap over pictures that any metric has here (`Metric.drop_interval`).

    Args:
        classes: how many there are.
        size: pixels a side of the network's input.
        boxes, labels, crowd: names of the targets: float [B, M, 4] in pixels (left, top, right, bottom), integers
            [B, M], of which `NO_OBJECT` fills up, and bool [B, M].
    """

    name = "mAP"

    def __init__(self, classes: int, size: int, boxes: str, labels: str, crowd: str) -> None:
        self.classes, self.size, self.boxes, self.labels, self.crowd = classes, size, boxes, labels, crowd

    def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
        """[B, classes + 3 · 100]; a class is kept as its label + 1, so that 0 is no detection."""
        found = decode(outputs, self.size)
        evaluated = _evaluate(*self._as_coco(found, targets))
        statistics = np.zeros((len(found), self.classes + 3 * MOST))
        for row in range(len(found)):
            statistics[row, : self.classes] = np.bincount(self._judged(targets, row), minlength=self.classes)
        powers = 1 << np.arange(_IOUS)
        filled = np.zeros(len(found), np.int64)
        for each in evaluated:
            row, count = each["image_id"] - 1, len(each["dtScores"])
            codes = powers @ ((each["dtMatches"] > 0) & ~each["dtIgnore"])
            codes = codes + (powers @ each["dtIgnore"]) * (1 << _IOUS)
            start = self.classes + 3 * filled[row]
            values = np.stack([np.full(count, each["category_id"]), each["dtScores"], codes], axis=1)
            statistics[row, start : start + 3 * count] = values.ravel()
            filled[row] += count
        return statistics

    def _judged(self, targets: Arrays, row: int) -> npt.NDArray[np.int64]:
        """The labels of the objects in a picture that are no crowds."""
        labels = targets[self.labels][row]
        judged: npt.NDArray[np.int64] = labels[(labels != NO_OBJECT) & ~targets[self.crowd][row].astype(bool)]
        return judged

    def _as_coco(self, found: Sequence[Detections], targets: Arrays) -> tuple[_Document, _Document]:
        """Objects and detections of some pictures as COCO's documents; ids count from 1, since 0 means none there."""
        objects: list[_Entry] = []
        answers: list[_Entry] = []
        for row, detections in enumerate(found):
            boxes, labels, crowd = (targets[name][row] for name in (self.boxes, self.labels, self.crowd))
            for box, label, many in zip(boxes, labels, crowd, strict=True):
                if label != NO_OBJECT:
                    objects.append(_entry(row, box, label, len(objects), crowd=many))
            for box, score, label in zip(*detections, strict=True):
                answers.append(_entry(row, box, label, len(answers), score=float(score)))
        return _document(objects, len(found)), _document(answers, len(found))

    def scores(self, statistics: Statistics, weights: Floats) -> Floats:
        """Percent; NaN where no picture that counts has an object."""
        precisions = self._average_precision(statistics, weights)
        occurs = ~np.isnan(precisions)
        with np.errstate(invalid="ignore"):
            mean: Floats = 100 * np.where(occurs, precisions, 0).sum(axis=1) / occurs.sum(axis=1)
        return mean

    def _average_precision(self, statistics: Statistics, weights: Floats) -> Floats:
        """Of each class, over all thresholds, from 0 to 1, [R, classes]; NaN where it does not occur."""
        objects, detections = statistics[:, : self.classes], statistics[:, self.classes :].reshape(-1, 3)
        pictures = np.repeat(np.arange(len(statistics)), MOST)
        order = np.argsort(-detections[:, _SCORE], kind="stable")
        order = order[detections[order, _KIND] > 0]
        kinds, codes = detections[order, _KIND].astype(np.int64) - 1, detections[order, _CODE].astype(np.int64)
        result = np.full((len(weights), self.classes), np.nan)
        for label in np.flatnonzero(objects.sum(axis=0)).tolist():
            chosen, total = kinds == label, weights @ objects[:, label]
            places, at_once = pictures[order[chosen]], max(1, _AT_ONCE // max(1, int(chosen.sum())))
            for start in range(0, len(weights), at_once):
                rows = slice(start, start + at_once)
                result[rows, label] = _precision(weights[rows].T[places], codes[chosen], total[rows])
            result[total == 0, label] = np.nan
        return result

    def by_class(self, statistics: Statistics) -> dict[int, tuple[int, float]]:
        """Of each class that occurs: in how many pictures, and its average precision in percent."""
        found = 100 * self._average_precision(statistics, np.ones((1, len(statistics))))[0]
        seen = np.count_nonzero(statistics[:, : self.classes], axis=0).tolist()
        return {label: (count, float(found[label])) for label, count in enumerate(seen) if count}

    def chance(self, statistics: Statistics) -> tuple[float, float]:
        """Of no detection at all: nothing, always."""
        return 0.0, 0.0


def _precision(weights: Floats, codes: npt.NDArray[np.int64], objects: Floats) -> Floats:
    """Average precision of one class over all thresholds, [R].

    Between two detections that find an object, precision only falls. So it is read at those alone, which are fewer than
    the objects; what is not found there counts by running sums over all detections.

    Args:
        weights: how often each detection counts, best first, [D, R].
        codes: in which thresholds it finds an object (bits 0 to 9), and is not judged (bits 10 to 19), [D].
        objects: how many there are to find, [R].
    """
    everything, total = np.cumsum(weights, axis=0), np.zeros(weights.shape[1])
    for threshold in range(_IOUS):
        hits, ignored = (np.flatnonzero(codes >> threshold + shift & 1) for shift in (0, _IOUS))
        if not len(hits):
            continue
        right, judged = np.cumsum(weights[hits], axis=0), everything[hits]
        if len(ignored):
            before = np.cumsum(np.vstack([np.zeros_like(objects), weights[ignored]]), axis=0)
            judged -= before[np.searchsorted(ignored, hits)]
        with np.errstate(divide="ignore", invalid="ignore"):  # detections that do not count; no object to find
            precision, recall = np.nan_to_num(right / judged), right / objects
        best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        reached = np.searchsorted(_RECALLS, recall, side="right")
        total += (np.diff(reached, axis=0, prepend=0) * best).sum(axis=0)
    return total / (len(_RECALLS) * _IOUS)


def _document(entries: Sequence[_Entry], pictures: int) -> _Document:
    return {
        "images": [{"id": row + 1} for row in range(pictures)],
        "categories": [{"id": kind} for kind in sorted({each["category_id"] for each in entries})],
        "annotations": entries,
    }


def _entry(
    row: int, box: Floats, label: int, number: int, *, crowd: bool = False, score: float | None = None
) -> _Entry:
    left, top, right, bottom = map(float, box)
    width, height = right - left, bottom - top
    return {
        "id": number + 1,
        "image_id": row + 1,
        "category_id": int(label) + 1,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": int(crowd),
        "score": score,
    }


def _evaluate(objects: _Document, answers: _Document) -> list[_Evaluated]:
    """What pycocotools says of each picture and class that has any; it prints, which nobody wants."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(objects), _coco(answers), "bbox")
        evaluation.params.catIds = sorted(each["id"] for each in answers["categories"])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
    return [each for each in evaluation.evalImgs if each is not None]


def _coco(document: _Document) -> COCO:
    from pycocotools.coco import COCO

    made = COCO()
    made.dataset = document
    made.createIndex()
    return made
