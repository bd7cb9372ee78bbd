"""Is a graph with new types still the network? Its outputs, as written and as its runtime runs it, beside FP32's.

Where they are too far off, single nodes that stay in the wider type are looked for, by bisection: each one that is
found is named, and the fewer the better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from polar_deploy.documents.build import WiderLayer
from polar_deploy.errors import ContentError
from polar_deploy.precision import calibration, norms
from polar_deploy.precision.calibration import Array
from polar_deploy.precision.rounding import computed_wide
from polar_deploy.tensors import Arrays, count, take

SAMPLES = 16  # spread over those of the calibration: an error to within about 10 % of itself, which a bound needs
# How far each output may be off: RMS of the difference, as a share of the RMS in FP32. Roundings of a network with
# a hundred layers come to 0.005 and 0.04; what is above these bounds is an overflow, or a sum of very unequal parts.
BOUNDS = {"fp16": 0.02, "bf16": 0.15}
# A runtime's integer kernels beside the same graph computed in FP32: they differ by single steps of a rounding.
FUSED = 0.02
MOST = 16  # nodes that are looked for: a network of which more have to stay wide is one for another target
_LAYERS_AT_ONCE = 3.0  # INT8: nine layers at the bound of one come to three times that, as squares add up


def int8_bound(max_layer_error: float) -> float:
    """How far each output of an INT8 network may be off, as a share of its RMS."""
    return _LAYERS_AT_ONCE * max_layer_error


@dataclass(frozen=True)
class Kernels:
    """How a runtime computes a typed graph: fused, in the kernels that this machine has.

    Attributes:
        library: its name, for messages.
        outputs: (graph, samples by input, [N, …], the graph's file for messages) -> its outputs by name, [N, …].
    """

    library: str
    outputs: Callable[[onnx.ModelProto, Arrays, Path], Mapping[str, npt.NDArray[np.float64]]]


@dataclass(frozen=True)
class Reference:
    """What a network gives in FP32 for some samples.

    Attributes:
        samples: by input, [N, …].
        outputs: by name, [N,...].
        path: the network's file, for messages.
    """

    samples: Arrays
    outputs: Mapping[str, npt.NDArray[np.float64]]
    path: Path

    @classmethod
    def of(cls, model: onnx.ModelProto, samples: Arrays, path: Path) -> Reference:
        """Run the network in FP32 on samples."""
        return cls(samples, calibration.outputs(model, samples, path), path)

    def error(self, model: onnx.ModelProto, kernels: Kernels | None = None) -> float:
        """How far the worst output of a graph with new types is off, see `relative_error`.

        Args:
            model: the graph.
            kernels: what computes it; None: it is computed as it is written, FP16 and BF16 in FP32 and rounded after
                each node.
        """
        if kernels is None:
            found = calibration.outputs(computed_wide(model), self.samples, self.path)
        else:
            found = dict(kernels.outputs(model, self.samples, self.path))
        return self.apart(found)

    def apart(self, found: Arrays) -> float:
        """How far the worst of some outputs [N, …] is off, see `relative_error`."""
        return max(relative_error(np.asarray(found[name], np.float64), exact) for name, exact in self.outputs.items())


def spread(inputs: Arrays) -> dict[str, Array]:
    """`SAMPLES` of the samples of a calibration."""
    samples = count(inputs)
    return take(inputs, np.linspace(0, samples - 1, min(SAMPLES, samples)).astype(int))


def normal_samples(model: onnx.ModelProto) -> dict[str, Array] | None:
    """Standard normal samples for a network: what normalised inputs look like.

    None: it has an input of another type than FP32, or of sizes that are not known.
    """
    draw, samples = np.random.default_rng(0), {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        if kind.elem_type != TensorProto.FLOAT or not sizes or not all(sizes[1:]):
            return None
        samples[value.name] = draw.standard_normal((sizes[0] or SAMPLES, *sizes[1:]), np.float32)
    return samples or None


def relative_error(found: npt.NDArray[np.float64], exact: npt.NDArray[np.float64]) -> float:
    """RMS difference of an output [N,...] over the RMS of the exact one; infinite where a finite number is lost.

    Of logits [N,classes] each sample's mean is taken off first: softmax sees differences only. An exact output that
    is 0 everywhere, or not finite, is compared with nothing.
    """
    finite = np.isfinite(exact)
    if not np.isfinite(found[finite]).all():
        return float("inf")
    found, exact = (np.where(finite, each, 0.0) for each in (found, exact))
    if exact.ndim == 2 and exact.shape[-1] > 1:
        found, exact = (each - each.mean(axis=-1, keepdims=True) for each in (found, exact))
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(found - exact)) / size if size else 0.0


def culprits(candidates: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
    """A few candidates without which all is well, found by bisection.

    Each round looks for the shortest run of candidates, from the first on, that has to be left out beside those found
    already; its last one is one of those that matter.

    Args:
        candidates: the likely ones last.
        holds: whether all is well when some are left out. The more, the better, or bisection finds more than it needs.

    Raises:
        LookupError: it does not hold without all of them, or more than `MOST` matter.
    """
    found: list[str] = []
    while not holds(found):
        low, high = 0, len(candidates)
        if len(found) == MOST or not holds([*found, *candidates]):
            raise LookupError
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds([*found, *candidates[:middle]]) else (middle, high)
        found.append(candidates[low])
        candidates = [*candidates[:low], *candidates[high:]]
    return found


def kept_wide(
    model: onnx.ModelProto,
    convert: Callable[[Sequence[str]], onnx.ModelProto],
    reference: Reference | None,
    bound: float,
    kernels: Kernels | None,
) -> tuple[onnx.ModelProto, list[WiderLayer]]:
    """Convert a network, and leave as few nodes as possible in FP32 so that its error is within a bound.

    Norms that are written out are wide in any case.

    Args:
        model: the network before.
        convert: writes the types, but for the nodes of these names.
        reference: what is right; None: the result is not compared.
        bound: on the error of each output.
        kernels: of the runtime that it is for, if they can be asked here: the bound holds for them, too.

    Returns:
        The typed graph, and the nodes that stay wide, as build.json lists them.

    Raises:
        ContentError: it is off whatever stays wide.
    """
    typed: dict[tuple[str, ...], onnx.ModelProto] = {}
    always, of_norms = norms.written_out(model)
    if reference is None:
        return convert([*always]), of_norms

    def error(wide: Sequence[str]) -> float:
        typed.clear()
        model = typed[tuple(wide)] = convert([*always, *wide])
        as_written = reference.error(model)
        return as_written if kernels is None else max(as_written, reference.error(model, kernels))

    before = error(())
    if before <= bound:
        return typed[()], of_norms
    left = [node for node in model.graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    floats = [node.name for node in left if node.name not in always]
    try:
        wide = culprits(floats, lambda names: error(names) <= bound)
    except LookupError:
        raise ContentError(
            f"{reference.path}: the typed graph is off by {before:.2g} of its outputs' size, {bound:g} are allowed, "
            f"and no {MOST} nodes that stay wider mend it",
            "build for a target of fp32 for this network, and report it",
        ) from None
    error(wide)
    nodes = {node.name: node for node in model.graph.node}
    return typed[tuple(wide)], [*of_norms, *(entry(nodes[name], "fp32", _lost(before)) for name in wide)]


def entry(node: onnx.NodeProto, wider: str, why: str, error: float | None = None) -> WiderLayer:
    """A node that stays wider, as build.json lists it."""
    share = None if error is None else round(error, 6)
    return WiderLayer(layer=node.name, operator=node.op_type, error=share, type=wider, why=why)


def _lost(error: float) -> str:
    return f"narrower, the outputs would be off by {error:.2g} of their size" if np.isfinite(error) else "it overflows"
