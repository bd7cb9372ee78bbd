"""From a dense detector's outputs to boxes, in numpy: what a device does behind the engine, and every metric here.

The outputs are those of torchvision's `FCOSHead`, for all cells of its feature maps, one behind the other: the finest
map first, row by row. A network with maps of strides 8, 16 and 32 has 1600 + 400 + 100 cells on pictures of 320 pixels:

- `cls_logits` [B, cells, classes]: whether an object of each class has its middle near the cell, as a logit;
- `bbox_regression` [B, cells, 4]: from the cell's middle to the left, top, right and bottom side of that object's box,
  in strides of its map, 0 or more;
- `bbox_ctrness` [B, cells, 1]: how near the cell is to the middle of the box, as a logit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError
from polar_deploy.tensors import Arrays, finite

Floats = npt.NDArray[np.float64]

LOGITS, DISTANCES, CENTRENESS = "cls_logits", "bbox_regression", "bbox_ctrness"
MOST = 100  # boxes that are kept of a picture, as COCO's metric counts them
_LEAST_SCORE, _OVERLAP = 0.05, 0.6  # of a box that is kept, and of two of one class (Tian et al., 2019, section 4)
_CANDIDATES = 1000  # best scores of a picture that are looked at, as in torchvision


class Detections(NamedTuple):
    """What is found in a picture, best first.

    Attributes:
        boxes: float64 [D, 4]: left, top, right, bottom, in pixels of the input.
        scores: float64 [D], from 0 to 1.
        labels: int64 [D].
    """

    boxes: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]


class Cells(NamedTuple):
    """Where the cells of all feature maps lie.

    Attributes:
        middles: float64 [cells, 2]: x and y in pixels of the input.
        strides: float64 [cells]: pixels between neighbours in a cell's map.
    """

    middles: Floats
    strides: Floats


@lru_cache(maxsize=8)
def cells(size: int, count: int) -> Cells:
    """The cells of a network that answers pictures of `size` pixels a side with `count` of them.

    Feature maps have strides of s, 2s, 4s, …, where s is a power of 2, and as many cells a side as fit, rounded up. How
    many maps there are, and s, follows from the count: the finest map alone has more cells than all coarser ones.

    Raises:
        ContentError: no such maps have so many cells.
    """
    strides = _strides(size, count)
    if strides is None:
        some = ", ".join(
            str(sum((-(-size // stride)) ** 2 for stride in each)) for each in ((8,), (8, 16), (8, 16, 32))
        )
        raise ContentError(
            f"the network answers for {count} cells, and no feature maps of strides s, 2s, 4s, … have so many on "
            f"{size} pixels",
            f"give one answer a cell and the finest map first, as torchvision's FCOSHead does ({some} for strides of "
            "8; 8, 16; 8, 16, 32), and an input_size that the largest stride divides",
        )
    middles = []
    for stride in strides:
        axis = (np.arange(-(-size // stride)) + 0.5) * stride
        middles.append(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    return Cells(np.concatenate(middles), np.repeat(strides, [len(each) for each in middles]).astype(np.float64))


def _strides(size: int, count: int) -> list[int] | None:
    first = 1
    while first <= size:
        strides, left, stride = [], count, first
        while left > 0 and stride < 2 * size:
            left -= (-(-size // stride)) ** 2
            strides.append(stride)
            stride *= 2
        if left == 0:
            return strides
        first *= 2
    return None


def decode(outputs: Arrays, size: int) -> list[Detections]:
    """The boxes of each picture; none where an output is NaN or Inf.

    A score is the geometric mean of the probabilities of class and centre. Those of at least 0.05 are taken, the best
    1,000 of them; of boxes of one class that overlap by an IoU of more than 0.6 the best one stays; of all these, the
    best 100.

    Args:
        outputs: `cls_logits`, `bbox_regression` and `bbox_ctrness` of B pictures.
        size: pixels a side of the network's input, beyond which no box reaches.
    """
    logits, distances, centre = (outputs[name].astype(np.float64) for name in (LOGITS, DISTANCES, CENTRENESS))
    where, whole = cells(size, logits.shape[1]), finite(outputs)
    scores = np.sqrt(_probability(logits) * _probability(centre))
    return [
        _decoded(scores[row], distances[row], where, size) if whole[row] else _nothing() for row in range(len(logits))
    ]


def _decoded(scores: Floats, distances: Floats, where: Cells, size: int) -> Detections:
    flat = np.flatnonzero(scores >= _LEAST_SCORE)
    flat = flat[np.argsort(-scores.ravel()[flat], kind="stable")][:_CANDIDATES]
    at, labels = np.divmod(flat, scores.shape[1])
    reach = distances[at].clip(0) * where.strides[at, None]
    middles = where.middles[at]
    boxes = np.concatenate([middles - reach[:, :2], middles + reach[:, 2:]], axis=1).clip(0, size)
    kept = _suppress(boxes, labels)[:MOST]
    return Detections(boxes[kept], scores.ravel()[flat][kept], labels[kept])


def _suppress(boxes: Floats, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices of the boxes, best first, that no better one of their class overlaps too much."""
    kept: list[int] = []
    left = np.arange(len(boxes))
    while len(left) and len(kept) < MOST:
        best, left = left[0], left[1:]
        kept.append(int(best))
        left = left[(labels[left] != labels[best]) | (iou(boxes[best : best + 1], boxes[left])[0] <= _OVERLAP)]
    return np.array(kept, np.int64)


def iou(one: Floats, other: Floats) -> Floats:
    """Intersection over union of boxes [M, 4] and [N, 4] (left, top, right, bottom), [M, N]; 0 where both are empty."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    both = (np.minimum(one[:, None, 2:], other[None, :, 2:]) - low).clip(0).prod(axis=2)
    areas = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (one, other)]
    union = areas[0][:, None] + areas[1][None] - both
    shares: Floats = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return shares


def _probability(logits: Floats) -> Floats:
    with np.errstate(over="ignore"):
        shares: Floats = 1 / (1 + np.exp(-logits))
    return shares


def _nothing() -> Detections:
    return Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
