"""Semantic segmentation: a class for each pixel of square RGB pictures, from a folder of pictures and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.config import Normalize, Training
from polar_deploy.data import normalise, readable
from polar_deploy.data.dataset import Pixels
from polar_deploy.data.moves import Mover
from polar_deploy.data.names import PAIRS
from polar_deploy.data.pairs import IGNORED, LazyPairs, PairFolder, stretched
from polar_deploy.tasks import drawing
from polar_deploy.tasks.data import Data, Indices
from polar_deploy.tasks.defaults import Defaults
from polar_deploy.tasks.mean_iou import MeanIoU
from polar_deploy.tasks.pictures import folder, of_folder, read, stretched_to
from polar_deploy.tasks.task import Batch, Task, Tensors
from polar_deploy.tensors import Arrays, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from polar_deploy.config import Settings
    from polar_deploy.resolved import ResolvedSettings

# As torchvision's networks have it: a dictionary with "out" and, while they train, "aux".
NAME, INPUT, OUTPUT, AUXILIARY, TARGET = "segmentation", "input", "out", "aux", "mask"
DATA = ""  # one has to be named
_AUXILIARY_WEIGHT = 0.5  # as in torchvision's references/segmentation/train.py


def defaults(settings: Settings) -> Defaults:
    """What suits a folder of pictures and masks."""
    return of_folder(settings, _folder(settings))


def make(settings: ResolvedSettings) -> Task:
    """The task on the settings' folder, pictures of their size."""
    size, normal = stretched_to(settings)
    pairs = _folder(settings)
    with readable():
        classes = pairs.classes
    return segmenter(classes, size, settings.training, lambda: _read(pairs, settings), normal)


def segmenter(classes: int, size: int, training: Training, data: Callable[[], Data], normal: Normalize) -> Task:
    """Segmentation of pictures float32 [B, 3, size, size] by logits [B, classes, size, size].

    Args:
        training: label smoothing, and the temperature of distillation.
        data: reads pictures and masks; in the latter, `IGNORED` is no class.
        normal: how the pictures are normalised.
    """

    def loss(outputs: Tensors, batch: Batch) -> Tensor:
        from polar_deploy.tasks.losses import pixel_cross_entropy

        def of(name: str) -> Tensor:
            return pixel_cross_entropy(outputs[name], batch.targets[TARGET], IGNORED, training.label_smoothing)

        return of(OUTPUT) + _AUXILIARY_WEIGHT * of(AUXILIARY) if AUXILIARY in outputs else of(OUTPUT)

    def distill(outputs: Tensors, wanted: Tensors) -> Tensor:
        from polar_deploy.tasks.losses import divergence

        return divergence(outputs[OUTPUT], wanted[OUTPUT], training.distill_temperature)

    def show(inputs: Arrays, targets: Arrays, outputs: Mapping[str, Arrays]) -> Pixels:
        answers = [outputs[name][OUTPUT].argmax(axis=1) for name in ("full", "compressed")]
        colours = [drawing.masks(each, classes) for each in (targets[TARGET].astype(np.int64), *answers)]
        return drawing.side_by_side([drawing.pictures(inputs[INPUT], normal), *colours])

    return Task(
        name=NAME,
        inputs={INPUT: TensorSpec((3, size, size))},
        outputs={OUTPUT: TensorSpec((classes, size, size))},
        data=data,
        loss=loss,
        metric=MeanIoU(classes, OUTPUT, TARGET, IGNORED),
        distill=distill,
        classes=classes,
        show=show,
        panels=("picture", "mask", "full network", "compressed network"),
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
        mover = self._mover
        pairs = np.stack(mover.plain(rows) if draw is None else [each.pixels for each in mover.moved(rows, draw)])
        pictures = normalise(pairs[..., :3], self.normal.mean, self.normal.std)
        return {INPUT: pictures}, {TARGET: np.ascontiguousarray(pairs[..., 3])}

    def fingerprint(self) -> str:
        """Of names and lengths of the files."""
        return self.source.fingerprint()

    @cached_property
    def _mover(self) -> Mover:
        """What is shifted in has the mean colour, and is ignored."""
        return Mover(self.source, self.training, stretched, self.normal, beyond=(IGNORED,))


def _folder(settings: Settings) -> PairFolder:
    return PairFolder(folder(settings, NAME, PAIRS, "pictures and masks"), settings.skip_broken)


def _read(pairs: PairFolder, settings: ResolvedSettings) -> Data:
    size, normal = stretched_to(settings)
    return read(
        pairs, settings, lambda part: MaskedPictures(LazyPairs(pairs.root, part, size), normal, settings.training)
    )
