"""Classification of square RGB pictures: the task that is meant where none is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy import data
from polar_deploy.config import Normalize, Training
from polar_deploy.data import Dataset, LazyImages, Split, normalise, split_validation
from polar_deploy.errors import UsageError
from polar_deploy.tasks import drawing
from polar_deploy.tasks.accuracy import Accuracy
from polar_deploy.tasks.data import Data, Indices
from polar_deploy.tasks.defaults import Defaults
from polar_deploy.tasks.task import Batch, Task, Tensors
from polar_deploy.tensors import Arrays, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from polar_deploy.config import Settings
    from polar_deploy.resolved import ResolvedSettings

NAME, INPUT, OUTPUT, TARGET = "classification", "input", "logits", "label"
DATA = "cifar10"  # where none is named


def defaults(settings: Settings) -> Defaults:
    """What suits the data set."""
    name = settings.data or DATA
    spec = data.spec(name, settings.data_dir)
    return Defaults(
        data=name,
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        input_size=spec.input_size,
        normalize=Normalize(mean=spec.mean, std=spec.std),
        flip=spec.flip,
        crop_padding=spec.crop_padding,
        crop_scale=spec.crop_scale,
    )


def make(settings: ResolvedSettings) -> Task:
    """The task on the settings' data, pictures of their size."""
    assert settings.input_size is not None
    classes = data.spec(settings.data, settings.data_dir).classes
    return classifier(classes, settings.input_size, settings.training, lambda: _read(settings), settings.normalize)


def listed(settings: ResolvedSettings) -> dict[str, Any] | None:
    """Names of the classes, and number of pictures of each part, of a folder that is not read; None: no folder.

    Raises:
        ContentError: it is not what a run takes.
    """
    dataset = data.listed(settings.data, settings.data_dir)
    if dataset is None:
        return None
    validation = dataset.validation if dataset.validation is not None else split_validation(dataset, settings.seed)[1]
    learned = len(dataset.train.labels) - len(validation)
    pictures = {"train": learned, "validation": len(validation), "test": len(dataset.test.labels)}
    return {"classes": list(dataset.class_names), "pictures": pictures}


def no_data() -> Data:
    """That of a task which is only to say what a network takes and gives."""
    raise UsageError("this task has no data", "name a data set")


def classifier(
    classes: int,
    size: int,
    training: Training | None = None,
    data: Callable[[], Data] = no_data,
    normal: Normalize | None = None,
) -> Task:
    """Classification of pictures float32 [B, 3, size, size] by logits [B, classes].

    Args:
        training: label smoothing, and the temperature of distillation.
        data: reads the pictures.
        normal: how they are normalised, so that they can be shown.
    """
    training = training or Training()

    def loss(outputs: Tensors, batch: Batch) -> Tensor:
        from polar_deploy.tasks.losses import cross_entropy

        return cross_entropy(outputs[OUTPUT], batch.targets[TARGET], training.label_smoothing)

    def distill(outputs: Tensors, wanted: Tensors) -> Tensor:
        from polar_deploy.tasks.losses import divergence

        return divergence(outputs[OUTPUT], wanted[OUTPUT], training.distill_temperature)

    def monitor(outputs: Tensors, batch: Batch) -> Tensor:
        from polar_deploy.tasks.losses import percent_right

        return percent_right(outputs[OUTPUT], batch.targets[TARGET])

    return Task(
        name=NAME,
        inputs={INPUT: TensorSpec((3, size, size))},
        outputs={OUTPUT: TensorSpec((classes,))},
        data=data,
        loss=loss,
        metric=Accuracy(OUTPUT, TARGET),
        distill=distill,
        classes=classes,
        monitor=monitor,
        show=None if normal is None else lambda inputs, targets, outputs: drawing.pictures(inputs[INPUT], normal),
    )


@dataclass(frozen=True, eq=False)
class Pictures:
    """`Samples` of a split, normalised; training augments them on its own device."""

    split: Split
    normal: Normalize

    def __len__(self) -> int:
        return len(self.split.labels)

    def read(self, rows: Indices, draw: np.random.Generator | None = None) -> tuple[Arrays, Arrays]:
        """Pictures float32 [B, 3, H, W] and labels [B]."""
        pictures = normalise(self.split.images[rows], self.normal.mean, self.normal.std)
        return {INPUT: pictures}, {TARGET: self.split.labels[rows]}

    def fingerprint(self) -> str:
        """That of the data set counts."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PictureData(Data):
    """A data set of pictures as `polar_deploy.data` reads it."""

    dataset: Dataset = field(kw_only=True)

    def split(self, seed: int) -> tuple[Indices, Indices]:
        """The same share of every class validates."""
        return split_validation(self.dataset, seed)

    def fingerprint(self) -> str:
        """Of images, labels and class names."""
        return self.dataset.fingerprint()


def _read(settings: ResolvedSettings) -> PictureData:
    normal = settings.normalize
    assert normal is not None
    dataset = data.load(
        settings.data, settings.data_dir, input_size=settings.input_size, skip_broken=settings.skip_broken
    )
    images = dataset.test.images
    preprocessing = {
        "channels": "RGB",
        "filter": "bilinear",
        # Pictures that are read lazily may be resized to more than is cut out.
        "shorter_side": images.shorter if isinstance(images, LazyImages) else settings.input_size,
        "crop": settings.input_size,
        "scale": 1 / 255,
        **normal.model_dump(mode="json"),
    }
    return PictureData(
        train=Pictures(dataset.train, normal),
        test=Pictures(dataset.test, normal),
        validation=dataset.validation,
        notes=dataset.notes,
        class_names=dataset.class_names,
        preprocessing=preprocessing,
        dataset=dataset,
    )
