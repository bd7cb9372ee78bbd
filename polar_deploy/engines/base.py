"""What every engine can do, and what the module of a runtime, such as `ort.py`, offers.

What can be told of a backend without importing its library is in `polar_deploy.backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError

if TYPE_CHECKING:
    from polar_deploy.config import Build
    from polar_deploy.precision.proof import Kernels
    from polar_deploy.targets import Target

Array = npt.NDArray[np.float32]
Timer = Callable[[int], float]  # n -> milliseconds of one inference, the mean of n back to back


class Engine(Protocol):
    """A classifier that is loaded and ready to run."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        ...

    @property
    def batches(self) -> tuple[int, int | None]:
        """Smallest and largest batch of one inference; None: no upper bound."""
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

    def conditions(self) -> dict[str, Any] | None:
        """What state the device is in now: name, clocks, power, temperature, throttling; None for a CPU."""
        ...


class Runtime(Protocol):
    """The half of a backend that imports its library: how its engines are made, checked and loaded."""

    def build(self, onnx_path: Path, folder: Path, name: str, target: Target, options: Build) -> dict[str, Any]:
        """Make an engine of `folder/NAME.onnx`, whose types are already those of the target.

        Writes `folder/NAME.layers.json` and what else the backend has, and returns its part of build.json: "provider",
        "versions", "found" (element type -> layers), "files" (the names of all files) and "plan".

        Raises:
            ContentError: the backend cannot run the network in the target's precision.
        """
        ...

    def kernels(self, target: Target) -> Kernels | None:
        """How this runtime computes a typed graph, which has to be proven before it is built; None: not on a CPU."""
        ...

    def load(self, artefact: Path, target: Target, entry: dict[str, Any]) -> Engine:
        """Load what `build` made: the plan, or the typed ONNX file where that is the artefact.

        Args:
            artefact: the file; its hash is the one in the entry.
            target: what it was built for.
            entry: its entry of build.json.

        Raises:
            ContentError: it is damaged.
            MachineError: it was built for another machine.
        """
        ...

    def require_fit(self, artefact: Path, target: Target, described: Any) -> None:
        """Raise unless an artefact can be loaded on this machine, which has all that the target takes.

        Args:
            artefact: the file.
            target: what it was built for.
            described: "plan" of its entry in build.json.

        Raises:
            MachineError: it is for another machine. ContentError: its description does not say.
        """
        ...


def require_shape(images: Array, engine: Engine, place: str) -> None:
    """Raise ContentError unless `images` is [B,C,H,W] with the engine's C, H, W and a B that it takes."""
    shape, (least, largest) = images.shape, engine.batches
    if len(shape) != 4 or shape[0] == 0 or shape[1:] != engine.input_shape:
        expected = " x ".join(str(size) for size in engine.input_shape)
        found = " x ".join(str(size) for size in shape)
        raise ContentError(
            f"{place} takes images of batch x {expected}, but got {found}",
            "give it the data and the input size that the network was exported for",
        )
    if shape[0] < least or (largest is not None and shape[0] > largest):
        raise ContentError(
            f"{place} was built for batches of {least} to {largest}, but got {shape[0]} images",
            "split the batch, or build again with --batch SMALLEST,USUAL,LARGEST",
        )


def infer_all(engine: Engine, images: Array, at_once: int = 128) -> Array:
    """Logits [N,classes] of any number of images [N,C,H,W], in batches that the engine takes.

    Where its smallest batch is larger than what is left, the last image is repeated and the surplus dropped.
    """
    least, largest = engine.batches
    size = max(least, min(at_once, largest or at_once))
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = max(0, least - len(part))
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(engine.infer(padded)[: len(part)])
    return np.concatenate(parts)
