"""What suits a task's data where the settings leave it open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polar_deploy.config import Normalize


@dataclass(frozen=True)
class Defaults:
    """Settings of one task and data set.

    Attributes:
        data: name of the data set.
        epochs: length of a training run.
        batch_size: samples in a step.
        input_size: pixels a side; None, like `normalize`: the task has no pictures.
        normalize: of pictures.
        flip, crop_padding, crop_scale: how training moves pictures, see `config.Training`.
    """

    data: str
    epochs: int
    batch_size: int
    input_size: int | None = None
    normalize: Normalize | None = None
    flip: bool = False
    crop_padding: int = 0
    crop_scale: float = 1.0
