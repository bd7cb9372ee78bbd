"""What every engine can do, and what the module of a runtime, such as `ort.py`, offers.

What can be told of a backend without importing its library is in `polar_deploy.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from polar_deploy.documents.build import EngineFacts, Plan
from polar_deploy.documents.parity import Conditions
from polar_deploy.errors import ContentError
from polar_deploy.tensors import Arrays, TensorSpec, count, joined, take

if TYPE_CHECKING:
    from polar_deploy.config import Build
    from polar_deploy.precision.proof import Kernels
    from polar_deploy.targets import Target

Array = npt.NDArray[Any]
Timer = Callable[[int], float]  # n -> milliseconds of one inference, the mean of n back to back


class Engine(Protocol):
    """A network that is loaded and ready to run.

    It takes and gives float32 wherever its inputs and outputs are of a float type, whatever that is; other types are
    taken and given as they are.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What it takes, by name: shapes of one sample, all of it known."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What it gives, by name."""
        ...

    @property
    def batches(self) -> tuple[int, int | None]:
        """Smallest and largest batch of one inference; None: no upper bound."""
        ...

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs [B, …] for inputs [B, …], both by name; further arrays are ignored. ContentError if one is missing
        or does not fit."""
        ...

    def timer(self, inputs: Arrays) -> Timer:
        """Bind `inputs` once (transfers stay outside of what is timed) and give the clock that suits here."""
        ...

    def duplicate(self) -> Engine:
        """Load the same engine a second time, sharing nothing with this one: the control of a time measurement."""
        ...

    def conditions(self) -> Conditions | None:
        """What state the device is in now: name, clocks, power, temperature, throttling; None for a CPU."""
        ...


@dataclass(frozen=True)
class Made:
    """What a runtime made.

    Attributes:
        engine: its part of build.json.
        found: element type -> layers that run in it.
        files: the names of all files.
    """

    engine: EngineFacts
    found: dict[str, int]
    files: tuple[str, ...]


class Runtime(Protocol):
    """The half of a backend that imports its library: how its engines are made, checked and loaded."""

    def build(self, onnx_path: Path, folder: Path, name: str, target: Target, options: Build) -> Made:
        """Make an engine of `folder/NAME.onnx`, whose types are already those of the target.

        Writes `folder/NAME.layers.json` and what else the backend has.

        Raises:
            ContentError: the backend cannot run the network in the target's precision.
        """
        ...

    def kernels(self, target: Target) -> Kernels | None:
        """How this runtime computes a typed graph, which has to be proven before it is built; None: not on a CPU."""
        ...

    def load(self, artefact: Path, target: Target, plan: Plan | None, *, tf32: bool) -> Engine:
        """Load what `build` made: the plan, or the typed ONNX file where that is the artefact.

        Args:
            artefact: the file that was built.
            target: what it was built for.
            plan: what it was built with and for, if it is a plan.
            tf32: whether FP32 may be computed as TF32.

        Raises:
            ContentError: it is damaged.
            MachineError: it was built for another machine.
        """
        ...

    def require_fit(self, artefact: Path, target: Target, plan: Plan | None) -> None:
        """Raise unless an artefact can be loaded on this machine, which has all that the target takes.

        Args:
            artefact: the file.
            target: what it was built for.
            plan: what it was built with and for, if it is a plan.

        Raises:
            MachineError: it is for another machine.
        """
        ...


def fitting(inputs: Arrays, engine: Engine, place: str) -> dict[str, Array]:
    """Those of `inputs` that the engine takes, in its order.

    Raises:
        ContentError: one is missing, or of another shape or type; their batches differ, or are none that it takes.
    """
    if missing := [name for name in engine.inputs if name not in inputs]:
        found = ", ".join(inputs) or "nothing"
        raise ContentError(f"{place} takes {missing[0]}, but got {found}", "name inputs as the network does")
    chosen = {name: np.asarray(inputs[name]) for name in engine.inputs}
    for name, spec in engine.inputs.items():
        values = chosen[name]
        both_float = values.dtype.kind == "f" and spec.dtype == "float32"
        if values.ndim == 0 or not spec.takes(values.shape[1:]) or not (both_float or values.dtype == spec.dtype):
            raise ContentError(
                f"{place} takes {name} as {spec}, but got {values.dtype} {list(values.shape)}",
                "give it the data and the input size that the network was exported for",
            )
    (batch, *others), (least, largest) = [len(values) for values in chosen.values()], engine.batches
    if any(other != batch for other in others):
        listed = ", ".join(f"{name}: {len(values)}" for name, values in chosen.items())
        raise ContentError(f"{place} got inputs of different batches ({listed})", "give as many samples of each")
    if batch < least or (largest is not None and batch > largest):
        raise ContentError(
            f"{place} was built for batches of {least} to {largest or 'any size'}, but got {batch} samples",
            "split the batch, or build again with --batch MIN,OPT,MAX",
        )
    return chosen


def specs(kind: str, values: Mapping[str, tuple[str | None, Sequence[Any]]], path: Path) -> dict[str, TensorSpec]:
    """Inputs or outputs of a network, from what its runtime tells of them.

    Args:
        kind: "input" or "output".
        values: name -> (numpy's name of its type, float32 for any float, None for one that engines do not take; its
            shape with the batch, where only positive ints are lengths and all else is of any length).
        path: of the network, for messages.

    Raises:
        ContentError: there is none, or one without a batch, or an input whose batch is fixed or other sizes are not.
    """
    found = {}
    for name, (dtype, shape) in values.items():
        known = tuple(size if isinstance(size, int) and size > 0 else None for size in shape)
        if dtype is None or not known or (kind == "input" and (known[0] is not None or None in known[1:])):
            break
        found[name] = TensorSpec(known[1:], dtype)
    if found and len(found) == len(values):
        return found
    listed = ", ".join(f"{name} {dtype or 'of another type'} {list(shape)}" for name, (dtype, shape) in values.items())
    sizes = "of any size as first axis and fixed sizes behind it" if kind == "input" else "as first axis"
    raise ContentError(
        f"{path}: each {kind} must have a batch {sizes}, but there is: {listed or 'none'}",
        "export the network with a dynamic batch, and with nothing else dynamic",
    )


def infer_all(engine: Engine, inputs: Arrays, at_once: int = 128) -> dict[str, Array]:
    """Outputs of any number of samples, in batches that the engine takes.

    Where its smallest batch is larger than what is left, the last sample is repeated and the surplus dropped.
    """
    least, largest = engine.batches
    size, samples = max(least, min(at_once, largest or at_once)), count(inputs)
    parts = []
    for start in range(0, samples, size):
        held = min(size, samples - start)
        rows = np.minimum(np.arange(start, start + max(held, least)), samples - 1)
        found = engine.infer(take(inputs, rows if held < least else slice(start, start + held)))
        parts.append(take(found, slice(held)))
    return joined(parts)
