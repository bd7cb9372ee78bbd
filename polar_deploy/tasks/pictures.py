"""What tasks on a folder of pictures, each stretched to a square, have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.config import Normalize
from polar_deploy.data import readable
from polar_deploy.data.folders import IMAGENET_MEAN, IMAGENET_STD
from polar_deploy.data.names import folder_of
from polar_deploy.data.parts import One, PartedFolder
from polar_deploy.errors import UsageError
from polar_deploy.tasks.data import Data, Samples
from polar_deploy.tasks.defaults import Defaults

if TYPE_CHECKING:
    from polar_deploy.config import Settings
    from polar_deploy.resolved import ResolvedSettings

_STEPS, _BATCH = 4, 16  # of an epoch at least, however small the folder; and samples in a step at most


def folder(settings: Settings, task: str, kind: str, holds: str) -> Path:
    """The folder that "kind:DIR" names.

    Args:
        task: that needs it.
        kind: the word before the colon.
        holds: what is in it.

    Raises:
        UsageError: the data is none of that kind.
    """
    found = None if settings.data is None else folder_of(settings.data, kind)
    if found is None:
        given = f"not '{settings.data}'" if settings.data else "and none is given"
        raise UsageError(
            f"the task {task} takes a folder of {holds}, {given}",
            f"give --data {kind}:DIR, or a task of your own as package.module:function",
        )
    return (settings.data_dir or Path()) / found


def of_folder(settings: Settings, source: PartedFolder[One]) -> Defaults:
    """What suits the training pictures of a folder, of which a tenth validates."""
    with readable():
        pictures = len(source.listed["train"])
    batch = 1 << int(math.log2(max(1, pictures * 0.9 / _STEPS)))
    return Defaults(
        data=settings.data or "",
        epochs=100,
        batch_size=max(2, min(_BATCH, batch)),
        input_size=256,
        normalize=Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
        flip=True,
        crop_scale=0.35,
    )


def stretched_to(settings: ResolvedSettings) -> tuple[int, Normalize]:
    """Pixels a side, and normalisation; UsageError where squares of pictures are to be hidden as for classifiers."""
    assert settings.input_size is not None
    assert settings.normalize is not None
    if settings.training.cutout:
        raise UsageError("training.cutout is for classification", "leave it out")
    return settings.input_size, settings.normalize


def read(source: PartedFolder[One], settings: ResolvedSettings, samples: Callable[[Sequence[One]], Samples]) -> Data:
    """The pictures of a folder, of which `samples` makes what is trained on and tested by.

    Networks learn from "train", and behind it "validation", where that is there.
    """
    with readable():
        parts, notes = source.parts, source.notes
    learned, held = parts["train"], parts.get("validation", [])
    validating = np.arange(len(learned), len(learned) + len(held)) if held else None
    train, test = samples([*learned, *held]), samples(parts["test"])
    return Data(train, test, validating, notes, source.class_names, preprocessing(*stretched_to(settings)))


def preprocessing(size: int, normal: Normalize) -> dict[str, Any]:
    """How a device makes inputs of pictures, for the bundle's manifest."""
    return {
        "channels": "RGB",
        "filter": "bilinear",
        "stretch": [size, size],
        "scale": 1 / 255,
        **normal.model_dump(mode="json"),
    }
