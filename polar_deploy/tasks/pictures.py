"""What tasks on a folder of pictures, each stretched to a square, have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from polar_deploy.config import Normalize
from polar_deploy.data.folders import IMAGENET_MEAN, IMAGENET_STD
from polar_deploy.data.names import folder_of
from polar_deploy.errors import UsageError
from polar_deploy.tasks.data import Indices
from polar_deploy.tasks.defaults import Defaults

if TYPE_CHECKING:
    from polar_deploy.config import ResolvedSettings, Settings

T = TypeVar("T")

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


def of_folder(settings: Settings, pictures: int) -> Defaults:
    """What suits so many training pictures, of which a tenth validates."""
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


def refuse_cutout(settings: ResolvedSettings) -> None:
    """UsageError where a square of each picture is to be hidden, which only classifiers bear."""
    if settings.training.cutout:
        raise UsageError("training.cutout is for classification", "leave it out")


def learned(parts: Mapping[str, Sequence[T]]) -> list[T]:
    """What networks learn from: "train", and behind it "validation", where that is there."""
    return [*parts["train"], *parts.get("validation", ())]


def validating(parts: Mapping[str, Sequence[T]]) -> Indices | None:
    """Which of the `learned` ones validate; None: the parts do not say."""
    held = parts.get("validation")
    return np.arange(len(parts["train"]), len(parts["train"]) + len(held)) if held else None


def preprocessing(size: int, normal: Normalize) -> dict[str, Any]:
    """How a device makes inputs of pictures, for the bundle's manifest."""
    return {
        "channels": "RGB",
        "filter": "bilinear",
        "stretch": [size, size],
        "scale": 1 / 255,
        **normal.model_dump(mode="json"),
    }
