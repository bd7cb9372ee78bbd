"""Quantised numbers: how they round, and the constants of layers that are stored as integers.

A stored integer stands for `(integer - zero point) * scale`. Integers are cut by index and never rounded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.arrays import all_of, frozen
from polar_deploy.surgery.dtype_limits import is_whole
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.standins import MICROSOFT, STANDARD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Floats, Step
    from polar_deploy.surgery.graph import Graph
    from polar_deploy.surgery.ir import Node, Tensor

ONE = frozen(np.ones(1))  # the scale of numbers that are stored as they are
INPUT, SCALE, ZERO = 0, 1, 2  # inputs of QuantizeLinear and DequantizeLinear


@dataclass(frozen=True)
class Scheme:
    """A scale and a zero point, as the node `node` reads them.

    scale, zero: [1], or [n] with an entry for every index of `axis`; zero in the type of the integers.
    vectors: the inputs of `node` that hold n > 1 entries.
    """

    scale: Floats
    zero: Array
    axis: int | None
    vectors: tuple[int, ...]

    @property
    def offset(self) -> Floats:
        """The zero point as a number."""
        return self.zero.astype(np.float64)


def scheme(graph: Graph, node: Node, scale: int | None, zero: int, axis: int, dtype: np.dtype[Any]) -> Scheme:
    """The scheme at two inputs of a node; without a zero point it is 0, as `dtype` writes it.

    Raises:
        Unsupported: it is computed, has a value for every block of several numbers, or its parts have different sizes.
    """
    parts: dict[int, Array] = {}
    for index, what in ((scale, "scale"), (zero, "zero point")):
        if index is not None and index < len(node.inputs) and node.inputs[index].name:
            values = graph.constant(node, index)
            if values is None:
                raise Unsupported(f"its {what} is computed")
            if node.attrs.get("block_size", 0) or values.size != max(values.shape, default=1):
                raise Unsupported("it is quantised in blocks")
            parts[index] = values
    vectors = tuple(index for index, values in parts.items() if values.size > 1)
    if len({parts[index].size for index in vectors}) > 1:
        raise Unsupported("its scale and zero point have different sizes")
    scales = parts[scale].astype(np.float64).ravel() if scale is not None else np.ones(1)
    zeros = parts[zero].ravel() if zero in parts else np.zeros(1, dtype)
    return Scheme(scales, zeros, axis if vectors else None, vectors)


def doubt(dtype: np.dtype[Any]) -> float:
    """The share by which runtimes may differ in a number of that type, before it is rounded."""
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype.name, 0.0)
    return max(1e-4, 10 * eps)


def quantize(values: Floats, scale: Floats, zero: Array, doubt: float) -> tuple[Floats, Bools]:
    """Numbers as stored in the type of `zero`, and which of them every runtime rounds to the same one.

    doubt: share that a number may be off by; what is between two integers is not certain then.
    """
    with np.errstate(all="ignore"):
        steps, name = values / scale, zero.dtype.name
    if name.lstrip("u").startswith("int"):
        low, high = (_integer(steps * factor, zero) for factor in (1 - doubt, 1 + doubt))
    elif name.startswith("float8") and not zero.astype(np.float64).any():
        low, high = (_float8(steps * factor, zero.dtype) for factor in (1 - doubt, 1 + doubt))
    else:  # of other types only zero is known
        low, high = zero.astype(np.float64), np.where(steps == 0, zero.astype(np.float64), np.nan)
    certain: Bools = (low == high) & np.isfinite(low)
    return np.where(certain, low, 0.0), certain


def _integer(steps: Floats, zero: Array) -> Floats:
    """Rounded half to even, shifted and saturated."""
    name = zero.dtype.name
    bits = int(name.lstrip("uint"))
    low = 0 if name[0] == "u" else -(2 ** (bits - 1))
    stored: Floats = np.clip(np.rint(steps) + zero.astype(np.float64), low, low + 2**bits - 1)
    return stored


def _float8(steps: Floats, dtype: np.dtype[Any]) -> Floats:
    """Rounded; NaN or infinite above the largest number, where runtimes saturate or not."""
    with np.errstate(all="ignore"):
        stored: Floats = steps.astype(np.float32).astype(dtype).astype(np.float64)
    return stored


def smallest(dtype: np.dtype[Any]) -> float:
    """The smallest number of an integer type; minus infinity for others."""
    signed, unsigned = (dtype.name.startswith(kind) for kind in ("int", "uint"))
    return 0.0 if unsigned else -(2.0 ** (int(dtype.name[3:]) - 1)) if signed else -np.inf


@dataclass(eq=False, slots=True)
class Weight:
    """A constant of a layer as the model stores it, be it at the layer itself or before a DequantizeLinear.

    values: what the layer reads, stored at input `index` of `node`.
    order: where the axes of `values` are stored, of what a Transpose turns before the layer; None: as they are.
    scale, zero: [1] or [outputs]: the numbers are `(values - zero) * scale`; zero in the type of `values`.
    vectors: (node, input) of every scale and zero point with an entry an output.
    plain: the numbers are stored as they are.
    """

    node: Node
    index: int
    values: Array
    scale: Floats
    zero: Array
    vectors: tuple[tuple[Node, int], ...] = ()
    plain: bool = True
    order: Sequence[int] | None = None

    @property
    def unsure(self) -> str | None:
        """Why sums over these weights are not known beforehand, in words; None: they are."""
        return "integer arithmetic" if self.plain and is_whole(self.values.dtype) else None

    @property
    def numbers(self) -> Floats:
        """What the values of a vector over the outputs stand for."""
        if self.plain:
            return self.values.astype(np.float64)
        return (self.values.astype(np.float64) - self.zero.astype(np.float64)) * self.scale

    def write(self, graph: Graph, values: Array | None, kept: Bools) -> None:
        """Stores other values for the outputs that are `kept`; None: they stay."""
        if values is not None:
            stored = values if self.order is None else values.transpose(np.argsort(self.order))
            graph.set_constant(self.node, self.index, stored)
        for node, index in self.vectors if not all_of(kept) else ():
            old = graph.constant(node, index)
            assert old is not None
            graph.set_constant(node, index, old.compress(kept, axis=int(np.argmax(old.shape))))


def weight(step: Step, index: int, what: str, axis: int = 0) -> Weight:
    """The constant at an input, where quantised with a scale for all, or one for every index of `axis`, the outputs'.

    Raises:
        Unsupported: it is computed, or quantised in a way that a cut does not go along with.
    """
    graph, values = step.graph, step.constant(index)
    if values is not None:
        return Weight(step.node, index, values, ONE, _nothing(values.dtype))
    turn, node = _makers(step.node.inputs[index])
    values = None if node is None else graph.constant(node, INPUT)
    if node is None or values is None:
        raise Unsupported(f"its {what} is {step.node.origin(index)}")
    results = [maker.outputs[0] for maker in (node, turn) if maker is not None]
    if any(len(result.outputs) != 1 or not graph.is_private(result.name) for result in results):
        raise Unsupported(f"its dequantised {what} is shared")
    rank = max(values.ndim, 1)
    order = None if turn is None else turn.attrs.get("perm") or range(values.ndim)[::-1]
    found = scheme(graph, node, SCALE, ZERO, node.attrs.get("axis", 1) % rank, values.dtype)
    if found.axis not in (None, axis % rank if order is None else order[axis]):
        raise Unsupported(f"its {what} is quantised along another axis than that of its outputs")
    vectors = tuple((node, vector) for vector in found.vectors)
    values = values if order is None else values.transpose(order)
    return Weight(node, INPUT, values, found.scale, found.zero, vectors, plain=False, order=order)


@cache
def _nothing(dtype: np.dtype[Any]) -> Array:
    """The zero point of numbers that are stored as they are."""
    return frozen(np.zeros(1, dtype))


def is_stored(step: Step, index: int) -> bool:
    """Whether an input is a constant, be it a quantised one."""
    _, node = _makers(step.node.inputs[index])
    return step.constant(index) is not None or (node is not None and step.graph.constant(node, INPUT) is not None)


def _makers(tensor: Tensor) -> tuple[Node | None, Node | None]:
    """The Transpose, if there is one, and the DequantizeLinear before it that make a tensor."""
    maker = _maker(tensor)
    turn = maker if maker is not None and maker.op == "Transpose" and maker.domain in STANDARD else None
    node = maker if turn is None else _maker(turn.inputs[0])
    known = node is not None and node.op == "DequantizeLinear" and node.domain in (*STANDARD, MICROSOFT)
    return turn, node if known else None


def _maker(tensor: Tensor) -> Node | None:
    return tensor.inputs[0] if tensor.inputs else None
