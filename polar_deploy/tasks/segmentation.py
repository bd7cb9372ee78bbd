"""Semantic segmentation: a class for each pixel of square RGB pictures, from a folder of pictures and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.config import Normalize, Training
from polar_deploy.data import normalise, readable
from polar_deploy.data.crops import DRAWS, crop_box
from polar_deploy.data.dataset import Pixels
from polar_deploy.data.folders import IMAGENET_MEAN, IMAGENET_STD
from polar_deploy.data.names import PAIRS, folder_of
from polar_deploy.data.pairs import IGNORED, LazyPairs, PairFolder, stretched
from polar_deploy.data.pictures import PictureCache
from polar_deploy.data.threads import parallel
from polar_deploy.errors import UsageError
from polar_deploy.limits import available_memory
from polar_deploy.tasks.data import Data, Indices
from polar_deploy.tasks.defaults import Defaults
from polar_deploy.tasks.mean_iou import MeanIoU
from polar_deploy.tasks.task import Batch, Task, Tensors
from polar_deploy.tensors import Arrays, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from polar_deploy.config import ResolvedSettings, Settings

# As torchvision's networks have it: a dictionary with "out" and, while they train, "aux".
NAME, INPUT, OUTPUT, AUXILIARY, TARGET = "segmentation", "input", "out", "aux", "mask"
DATA = ""  # one has to be named
_AUXILIARY_WEIGHT = 0.5  # as in torchvision's references/segmentation/train.py
_KEPT = 0.125  # of the available memory: what pictures may take that are kept, for training and for evaluation each
_STEPS, _BATCH = 4, 16  # of an epoch at least, however small the folder; and samples in a step at most


def defaults(settings: Settings) -> Defaults:
    """What suits a folder of pictures and masks."""
    folder = _folder(settings)
    with readable():
        pairs = len(folder.listed["train"])
    batch = 1 << int(math.log2(max(1, pairs * 0.9 / _STEPS)))  # a tenth validates
    return Defaults(
        data=settings.data or DATA,
        epochs=100,
        batch_size=max(2, min(_BATCH, batch)),
        input_size=256,
        normalize=Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        flip=True,
        crop_scale=0.35,
    )


def make(settings: ResolvedSettings) -> Task:
    """The task on the settings' folder, pictures of their size."""
    assert settings.input_size is not None
    if settings.training.cutout:
        raise UsageError("training.cutout is for classification", "leave it out")
    folder = _folder(settings)
    with readable():
        classes = folder.classes
    return segmenter(classes, settings.input_size, settings.training, lambda: _read(folder, settings))


def segmenter(classes: int, size: int, training: Training, data: Callable[[], Data]) -> Task:
    """Segmentation of pictures float32 [B, 3, size, size] by logits [B, classes, size, size].

    Args:
        training: label smoothing, and the temperature of distillation.
        data: reads pictures and masks; in the latter, `IGNORED` is no class.
    """

    def loss(outputs: Tensors, batch: Batch) -> Tensor:
        from polar_deploy.tasks.losses import pixel_cross_entropy

        def of(name: str) -> Tensor:
            return pixel_cross_entropy(outputs[name], batch.targets[TARGET], IGNORED, training.label_smoothing)

        return of(OUTPUT) + _AUXILIARY_WEIGHT * of(AUXILIARY) if AUXILIARY in outputs else of(OUTPUT)

    def distill(outputs: Tensors, wanted: Tensors) -> Tensor:
        from polar_deploy.tasks.losses import divergence

        return divergence(outputs[OUTPUT], wanted[OUTPUT], training.distill_temperature)

    return Task(
        name=NAME,
        inputs={INPUT: TensorSpec((3, size, size))},
        outputs={OUTPUT: TensorSpec((classes, size, size))},
        data=data,
        loss=loss,
        metric=MeanIoU(classes, OUTPUT, TARGET, IGNORED),
        distill=distill,
        classes=classes,
    )


@dataclass(frozen=True, eq=False)
class MaskedPictures:
    """`Samples` of pictures and masks; both are moved alike in training.

    Args:
        source: decodes them.
        normal: normalisation of the pictures.
        training: how they are moved: `flip`, `crop_scale`, and without such crops `crop_padding`.
    """

    source: LazyPairs
    normal: Normalize
    training: Training

    def __len__(self) -> int:
        return len(self.source.pairs)

    def read(self, rows: Indices, draw: np.random.Generator | None = None) -> tuple[Arrays, Arrays]:
        """Pictures float32 [B, 3, size, size] and masks uint8 [B, size, size]."""
        pairs = np.stack(self._plain(rows) if draw is None else self._moved(rows, draw))
        pictures = normalise(pairs[..., :3], self.normal.mean, self.normal.std)
        return {INPUT: pictures}, {TARGET: np.ascontiguousarray(pairs[..., 3])}

    def fingerprint(self) -> str:
        """Of names and lengths of the files."""
        return self.source.fingerprint()

    @cached_property
    def _plain(self) -> Callable[[Indices], list[Pixels]]:
        return PictureCache(self.source.plain, int(_KEPT * available_memory()))

    @cached_property
    def _whole(self) -> Callable[[Indices], list[Pixels]]:
        return PictureCache(self.source.whole, int(_KEPT * available_memory()))

    def _moved(self, rows: Indices, draw: np.random.Generator) -> list[Pixels]:
        """Pictures with masks for a training batch, all random numbers drawn first."""
        size, least, padding = self.source.size, self.training.crop_scale or 1.0, self.training.crop_padding or 0
        crops = draw.random((len(rows), DRAWS), np.float32)
        shifts = draw.integers(-padding, padding + 1, (len(rows), 2)).tolist()
        flips = (draw.random(len(rows)) < (0.5 if self.training.flip else 0)).tolist()
        if least < 1:
            boxes = [
                (pair, crop_box(pair.shape[1], pair.shape[0], least, crop))
                for pair, crop in zip(self._whole(rows), crops, strict=True)
            ]
            moved = parallel(lambda each: stretched(each[0], size, each[1]), boxes)
        else:
            moved = [self._shifted(pair, *shift) for pair, shift in zip(self._plain(rows), shifts, strict=True)]
        return [pair[:, ::-1] if flip else pair for pair, flip in zip(moved, flips, strict=True)]

    def _shifted(self, pair: Pixels, down: int, right: int) -> Pixels:
        """Moved by some pixels; what comes in is the mean colour, and ignored."""
        outside = [*(round(255 * mean) for mean in self.normal.mean), IGNORED]
        result = np.empty_like(pair)
        result[:] = outside
        height, width = pair.shape[:2]
        result[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = pair[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
        return result


def _folder(settings: Settings) -> PairFolder:
    folder = None if settings.data is None else folder_of(settings.data, PAIRS)
    if folder is None:
        given = f"not '{settings.data}'" if settings.data else "and none is given"
        raise UsageError(
            f"the task {NAME} takes a folder of pictures and masks, {given}",
            "give --data pairs:DIR, or a task of your own as package.module:function",
        )
    return PairFolder((settings.data_dir or Path()) / folder, settings.skip_broken)


def _read(folder: PairFolder, settings: ResolvedSettings) -> Data:
    normal, size = settings.normalize, settings.input_size
    assert normal is not None
    assert size is not None
    with readable():
        parts, notes = folder.parts, folder.notes
    learned = [*parts["train"], *(validating := parts.get("validation", []))]
    held = np.arange(len(parts["train"]), len(learned)) if validating else None
    train, test = (
        MaskedPictures(LazyPairs(folder.root, pairs, size), normal, settings.training)
        for pairs in (learned, parts["test"])
    )
    preprocessing = {
        "channels": "RGB",
        "filter": "bilinear",
        "stretch": [size, size],
        "scale": 1 / 255,
        **normal.model_dump(mode="json"),
    }
    return Data(train, test, held, notes, folder.class_names, preprocessing)
