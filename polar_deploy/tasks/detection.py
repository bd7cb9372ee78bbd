"""Object detection: boxes of objects in square RGB pictures, by a dense detector, from a folder that COCO lays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.config import Normalize, Training
from polar_deploy.data import normalise, readable
from polar_deploy.data.coco import Boxed, CocoFolder, LazyBoxed
from polar_deploy.data.dataset import Pixels
from polar_deploy.data.moves import Moved, Mover, stretched
from polar_deploy.data.names import COCO
from polar_deploy.tasks import drawing
from polar_deploy.tasks.boxes import CENTRENESS, DISTANCES, LOGITS, Detections, cells, decode
from polar_deploy.tasks.data import Data, Indices
from polar_deploy.tasks.defaults import Defaults
from polar_deploy.tasks.mean_ap import NO_OBJECT, MeanAveragePrecision
from polar_deploy.tasks.pictures import folder, of_folder, read, stretched_to
from polar_deploy.tasks.task import Batch, Task, Tensors
from polar_deploy.tensors import Arrays, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from polar_deploy.config import Settings
    from polar_deploy.resolved import ResolvedSettings

NAME, INPUT = "detection", "input"
BOXES, LABELS, CROWD = "boxes", "labels", "crowd"  # targets
DATA = ""  # one has to be named
PACKAGES = (("pycocotools", "detection"),)  # what the metric needs, and the extra that brings it


def defaults(settings: Settings) -> Defaults:
    """What suits a folder of pictures and boxes."""
    return of_folder(settings, _folder(settings))


def make(settings: ResolvedSettings) -> Task:
    """The task on the settings' folder, pictures of their size."""
    size, normal = stretched_to(settings)
    coco = _folder(settings)
    with readable():
        classes = coco.classes
    return detector(classes, size, lambda: _read(coco, settings), normal)


def detector(classes: int, size: int, data: Callable[[], Data], normal: Normalize) -> Task:
    """Detection in pictures float32 [B, 3, size, size] by what torchvision's `FCOSHead` gives; see `tasks.boxes`.

    Args:
        data: reads pictures and boxes.
        normal: how the pictures are normalised.
    """

    def loss(outputs: Tensors, batch: Batch) -> Tensor:
        from polar_deploy.tasks.detection_losses import detection_loss

        boxes, labels, crowd = (batch.targets[name] for name in (BOXES, LABELS, CROWD))
        return detection_loss(outputs, boxes, labels, crowd, size)

    def distill(outputs: Tensors, wanted: Tensors) -> Tensor:
        from polar_deploy.tasks.detection_losses import detection_divergence

        return detection_divergence(outputs, wanted)

    def show(inputs: Arrays, targets: Arrays, outputs: Mapping[str, Arrays]) -> Pixels:
        seen = drawing.pictures(inputs[INPUT], normal)
        objects = [
            Detections(boxes[labels != NO_OBJECT], np.ones((labels != NO_OBJECT).sum()), labels[labels != NO_OBJECT])
            for boxes, labels in zip(targets[BOXES], targets[LABELS], strict=True)
        ]
        found = [objects, *(decode(outputs[name], size) for name in ("full", "compressed"))]
        return drawing.side_by_side(
            [np.stack([drawing.with_boxes(*each) for each in zip(seen, boxes, strict=True)]) for boxes in found]
        )

    def require(outputs: Mapping[str, TensorSpec]) -> None:
        cells(size, outputs[LOGITS].sizes[0])

    return Task(
        name=NAME,
        inputs={INPUT: TensorSpec((3, size, size))},
        outputs={
            LOGITS: TensorSpec((None, classes)),
            DISTANCES: TensorSpec((None, 4)),
            CENTRENESS: TensorSpec((None, 1)),
        },
        data=data,
        loss=loss,
        metric=MeanAveragePrecision(classes, size, BOXES, LABELS, CROWD),
        distill=distill,
        classes=classes,
        show=show,
        panels=("objects", "full network", "compressed network"),
        require=require,
    )


@dataclass(frozen=True, eq=False)
class BoxedPictures:
    """`Samples` of pictures and boxes; both are moved alike in training.

    Args:
        source: decodes the pictures.
        most: boxes that the targets of a picture have room for.
        normal: normalisation of the pictures.
        training: how they are moved: `flip`, `crop_scale`, and without such crops `crop_padding`.
    """

    source: LazyBoxed
    most: int
    normal: Normalize
    training: Training

    def __len__(self) -> int:
        return len(self.source.boxed)

    def read(self, rows: Indices, draw: np.random.Generator | None = None) -> tuple[Arrays, Arrays]:
        """Pictures float32 [B, 3, size, size]; boxes float32 [B, M, 4] in pixels, labels int64 [B, M], crowd bool.

        Of a picture that is moved, boxes with their middle in what is seen stay, cut off at its edges.
        """
        if draw is None:
            moved = [Moved(pixels, (0.0, 0.0, 1.0, 1.0), False) for pixels in self._mover.plain(rows)]
        else:
            moved = self._mover.moved(rows, draw)
        boxes = np.zeros((len(rows), self.most, 4), np.float32)
        labels = np.full((len(rows), self.most), NO_OBJECT, np.int64)
        crowd = np.zeros((len(rows), self.most), bool)
        for row, (index, each) in enumerate(zip(rows.tolist(), moved, strict=True)):
            boxed = self.source.boxed[index]
            seen, kept = _seen(boxed, each)
            count = len(kept)
            boxes[row, :count] = self.source.size * seen
            labels[row, :count], crowd[row, :count] = boxed.labels[kept], boxed.crowd[kept]
        pictures = normalise(np.stack([each.pixels for each in moved]), self.normal.mean, self.normal.std)
        return {INPUT: pictures}, {BOXES: boxes, LABELS: labels, CROWD: crowd}

    def fingerprint(self) -> str:
        """Of names and lengths of the files, and of the boxes."""
        return self.source.fingerprint()

    @cached_property
    def _mover(self) -> Mover:
        return Mover(self.source, self.training, stretched, self.normal)


def _seen(boxed: Boxed, moved: Moved) -> tuple[np.ndarray, Indices]:
    """The boxes of a picture after it was moved, as shares of what is seen, and which ones these are."""
    left, top, right, bottom = moved.part
    boxes = (boxed.boxes - (left, top, left, top)) / (right - left, bottom - top, right - left, bottom - top)
    if moved.mirrored:
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = np.flatnonzero(((middles >= 0) & (middles <= 1)).all(axis=1))
    return boxes[kept].clip(0, 1), kept


def _folder(settings: Settings) -> CocoFolder:
    return CocoFolder(folder(settings, NAME, COCO, "pictures and boxes"), settings.skip_broken)


def _read(coco: CocoFolder, settings: ResolvedSettings) -> Data:
    size, normal = stretched_to(settings)

    def samples(part: Sequence[Boxed]) -> BoxedPictures:
        return BoxedPictures(LazyBoxed(coco.root, part, size), coco.most, normal, settings.training)

    return read(coco, settings, samples)
