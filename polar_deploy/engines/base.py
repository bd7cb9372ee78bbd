"""What every engine can do, and what every backend offers. A backend is a module; `ort.py` is the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError

if TYPE_CHECKING:
    from polar_deploy.targets import Target

Array = npt.NDArray[np.float32]
Timer = Callable[[int], float]  # n -> milliseconds of one inference, the mean of n back to back


class Engine(Protocol):
    """A classifier that is loaded and ready to run."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        ...

    def infer(self, images: Array) -> Array:
        """Normalised images [B,C,H,W] -> logits [B,classes]. ContentError if the shape does not fit."""
        ...

    def timer(self, images: Array) -> Timer:
        """Bind `images` [B,C,H,W] once (transfers stay outside of what is timed) and give the clock that suits here."""
        ...

    def duplicate(self) -> Engine:
        """Load the same engine a second time, sharing nothing with this one: the control of a time measurement."""
        ...


class Backend(Protocol):
    """A runtime: how its engines are made and loaded."""

    def build(self, source: Path, folder: Path, name: str, target: Target) -> dict[str, Any]:
        """Make `folder/name.*` from the ONNX file `source` and return its entry in build.json.

        Raises:
            ContentError: the file is not a valid network, or the backend cannot run it in the target's precision.
        """
        ...

    def load(self, folder: Path, name: str) -> Engine:
        """Load what `build` made. UsageError if it is missing, ContentError if it is damaged."""
        ...


def require_shape(images: Array, input_shape: tuple[int, int, int], place: str) -> None:
    """Raise ContentError, naming both shapes, unless `images` is [B,C,H,W] with B >= 1 and the engine's C, H, W."""
    if images.ndim == 4 and len(images) > 0 and images.shape[1:] == input_shape:
        return
    expected = " x ".join(str(size) for size in input_shape)
    found = " x ".join(str(size) for size in images.shape)
    raise ContentError(
        f"{place} takes images of batch x {expected}, but got {found}",
        "give it the data and the input size that the network was exported for",
    )
