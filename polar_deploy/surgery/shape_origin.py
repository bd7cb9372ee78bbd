"""Shape arithmetic read backwards: where the numbers come from that tell Reshape, Expand, Resize and the like a shape.

Exporters write `Shape -> Gather -> Unsqueeze -> Concat -> Reshape`, with sums and products in between.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Facts, Step
    from polar_deploy.surgery.graph import Graph
    from polar_deploy.surgery.ir import Node, Tensor

LONGEST = 64  # numbers; what is longer is no shape
DEEPEST = 100  # nodes from the number to where it comes from
LARGEST = 2**53


class Extent(NamedTuple):
    """The size of a tensor along an axis."""

    tensor: Tensor
    axis: int


@dataclass(frozen=True)
class Size:
    """One number. value: what it is before the cut, whatever the input; extent: the size that it is a copy of."""

    value: int | float | None = None
    extent: Extent | None = None


def trace(facts: Facts, tensor: Tensor) -> list[Size] | None:
    """The numbers in a tensor of rank 0 or 1; None: not even how many they are."""
    found = _Tracer(facts).read(tensor)
    return found.ravel().tolist() if found is not None and found.ndim < 2 else None


def whole_numbers(step: Step, index: int) -> list[int] | None:
    """What an input always holds: a constant, or shape arithmetic on sizes that are fixed; None: that depends.

    Whoever relies on the latter has to put a constant in its place (`step.replaced`): sizes change in the cut.
    """
    return _whole(trace(step.facts, step.original[index]) or [Size()])


def write_numbers(step: Step, index: int, values: list[int]) -> None:
    """Makes an input of whole numbers a constant, of the type that it has; int64 where it was not there."""
    held = step.constant(index)
    dtype = np.dtype(np.int64)
    if held is not None:
        dtype = held.dtype
    elif step.has(index):
        dtype = step.graph.dtype(step.original[index])
    step.graph.set_constant(step.node, index, np.array(values, dtype))


def taken(facts: Facts, node: Node) -> list[int] | None:
    """The positions that a Gather or Slice takes from a vector; None where they are computed, or it is no vector."""
    tracer = _Tracer(facts)
    vector = tracer.read(node.inputs[0])
    if vector is None or vector.ndim != 1:
        return None
    tracer.found[node.inputs[0].name] = _sizes(map(Size, range(vector.size)), vector.shape)
    found = tracer.gather(node) if node.op == "Gather" else tracer.pick(node)
    return None if found is None else _whole(found.ravel())


def is_fixed(graph: Graph) -> bool:
    """Whether inputs vary in their first dimension only, so that sizes found at two probes are sizes for all."""
    shapes = [graph.shape(tensor) for tensor in graph.inputs]
    return all(shape is not None and all(isinstance(dim, int) for dim in shape[1:]) for shape in shapes)


def _whole(sizes: Iterable[Size]) -> list[int] | None:
    values = [size.value for size in sizes]
    whole = [value for value in values if isinstance(value, int)]
    return whole if len(whole) == len(values) else None


class _Tracer:
    """One look backwards; what was found on the way is remembered, and the way is not followed without end."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.graph = facts.graph
        self.found: dict[str, Array | None] = {}
        self.depth = 0

    def read(self, tensor: Tensor) -> Array | None:
        """The numbers in a small tensor, as an array of `Size`."""
        if self.graph.is_constant(tensor):
            values = np.asarray(tensor.values)
            return None if values.size > LONGEST else _sizes(map(Size, values.ravel().tolist()), values.shape)
        if tensor.name not in self.found:
            self.depth += 1
            self.found[tensor.name] = self._follow(tensor)
            self.depth -= 1
        return self.found[tensor.name]

    def _follow(self, tensor: Tensor) -> Array | None:
        node = tensor.inputs[0] if tensor.inputs and self.depth < DEEPEST else None
        if node is not None and node.op in RULES and node.domain in ("", "ai.onnx"):
            found = RULES[node.op](self, node)
            if found is not None and found.size <= LONGEST:
                return np.asarray(found, object)
        shape = self._fixed_shape(tensor)
        return None if shape is None else _sizes([Size()] * math.prod(shape), shape)

    def _fixed_shape(self, tensor: Tensor) -> tuple[int, ...] | None:
        """The shape of a small tensor, if it is always the same."""
        dims = self.graph.shape(tensor)
        shape = tuple(dim for dim in dims or () if isinstance(dim, int))
        return shape if dims is not None and len(shape) == len(dims) and math.prod(shape) <= LONGEST else None

    def numbers(self, node: Node, index: int) -> list[int] | None:
        """What an input holds where it is known to be whole numbers."""
        found = self.read(node.inputs[index]) if len(node.inputs) > index and node.inputs[index].name else None
        return None if found is None else _whole(found.ravel())

    def shape(self, node: Node) -> Array | None:
        tensor, facts = node.inputs[0], self.facts
        shape = self.graph.shape(tensor)
        if shape is None:
            return None
        if len(shape) == 1 and (inner := self.read(tensor)) is not None:
            return _sizes([Size(inner.size)], (1,))
        channels = facts.of(tensor)
        fixed = () if channels is None else channels.axes
        if not tensor.inputs or is_fixed(self.graph):
            fixed = tuple(range(len(shape)))
        sizes = [
            Size(dim if isinstance(dim, int) and axis in fixed else None, Extent(tensor, axis))
            for axis, dim in enumerate(shape)
        ][slice(node.attrs.get("start", 0), node.attrs.get("end", len(shape)))]
        return _sizes(sizes, (len(sizes),))

    def gather(self, node: Node) -> Array | None:
        data, indices = self.read(node.inputs[0]), self.graph.constant(node, 1)
        axis = node.attrs.get("axis", 0)
        if data is None or indices is None or not -data.ndim <= axis < data.ndim or not data.size:
            return None
        return np.asarray(np.take(data, indices % data.shape[axis], axis=axis), object)

    def pick(self, node: Node) -> Array | None:
        data, bounds = self.read(node.inputs[0]), self.bounds(node)
        if data is None or bounds is None:
            return None
        for axis, along in bounds.items():
            data = data[(slice(None),) * (axis % data.ndim) + (along,)]
        return data

    def bounds(self, node: Node) -> dict[int, slice] | None:
        """What a Slice takes, by axis."""
        if len(node.inputs) == 1:
            given = [node.attrs.get(name) for name in ("starts", "ends", "axes")] + [None]
        else:
            given = [self.numbers(node, index) for index in (1, 2, 3, 4)]
            told = [len(node.inputs) > index and bool(node.inputs[index].name) for index in (1, 2, 3, 4)]
            if any(is_told and values is None for values, is_told in zip(given, told, strict=True)):
                return None
        starts, ends, axes, steps = given
        if starts is None or ends is None:
            return None
        along = (slice(*bounds) for bounds in zip(starts, ends, steps or [1] * len(starts), strict=True))
        return dict(zip(axes or range(len(starts)), along, strict=True))

    def concat(self, node: Node) -> Array | None:
        parts = [self.read(tensor) for tensor in node.inputs]
        known = [part for part in parts if part is not None]
        return np.concatenate(known, axis=node.attrs["axis"]) if len(known) == len(parts) else None

    def reshape(self, node: Node) -> Array | None:
        data, shape = self.read(node.inputs[0]), self._fixed_shape(node.outputs[0])
        return None if data is None or shape is None or math.prod(shape) != data.size else data.reshape(shape)

    def transpose(self, node: Node) -> Array | None:
        data = self.read(node.inputs[0])
        return None if data is None else data.transpose(node.attrs.get("perm"))

    def cast(self, node: Node) -> Array | None:
        import onnx

        data = self.read(node.inputs[0])
        kind = onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]).kind
        number = int if kind in "biu" else float
        if data is None:
            return None
        known = [size.value is not None and math.isfinite(size.value) for size in data.ravel()]
        sizes = (
            Size(number(size.value) if is_known else None, size.extent)
            for size, is_known in zip(data.ravel(), known, strict=True)
        )
        return _sizes(sizes, data.shape)

    def fill(self, node: Node) -> Array | None:
        shape = self.numbers(node, 0)
        if shape is None or math.prod(shape) > LONGEST:
            return None
        value = node.attrs["value"].ravel()[0].item() if "value" in node.attrs else 0.0
        return _sizes([Size(value)] * math.prod(shape), tuple(shape))

    def where(self, node: Node) -> Array | None:
        parts = [self.read(tensor) for tensor in node.inputs]
        if any(part is None for part in parts):
            return None
        chosen = np.frompyfunc(lambda c, a, b: Size() if c.value is None else a if c.value else b, 3, 1)(*parts)
        return np.asarray(chosen, object)


def _sizes(sizes: Iterable[Size], shape: tuple[int, ...]) -> Array:
    found = np.empty(math.prod(shape), object)
    found[:] = list(sizes)
    return found.reshape(shape)


def _elementwise(compute: Callable[[Size, Size], Size]) -> Callable[[_Tracer, Node], Array | None]:
    def rule(tracer: _Tracer, node: Node) -> Array | None:
        a, b = (tracer.read(tensor) for tensor in node.inputs)
        return None if a is None or b is None else np.asarray(np.frompyfunc(compute, 2, 1)(a, b), object)

    return rule


def _arithmetic(compute: Callable[[Any, Any], int | float | None]) -> Callable[[_Tracer, Node], Array | None]:
    def on_sizes(a: Size, b: Size) -> Size:
        value = None if a.value is None or b.value is None else compute(a.value, b.value)
        return Size(value if value is not None and abs(value) < LARGEST else None)

    return _elementwise(on_sizes)


def _on_one(compute: Callable[[Any], int | float]) -> Callable[[_Tracer, Node], Array | None]:
    def on_size(a: Size) -> Size:
        return Size(None if a.value is None else compute(a.value))

    def rule(tracer: _Tracer, node: Node) -> Array | None:
        data = tracer.read(node.inputs[0])
        return None if data is None else np.asarray(np.frompyfunc(on_size, 1, 1)(data), object)

    return rule


def _extreme(compute: Callable[[Iterable[Any]], int | float]) -> Callable[[_Tracer, Node], Array | None]:
    def on_sizes(*sizes: Size) -> Size:
        values = [size.value for size in sizes]
        return Size() if None in values else Size(compute(values))

    def rule(tracer: _Tracer, node: Node) -> Array | None:
        parts = [part for tensor in node.inputs if (part := tracer.read(tensor)) is not None]
        if len(parts) < len(node.inputs):
            return None
        return np.asarray(np.frompyfunc(on_sizes, len(parts), 1)(*parts), object)

    return rule


def _rounded(to: Callable[[float], int]) -> Callable[[Any], int | float]:
    """Of a number of floats another one; whole numbers stay."""
    return lambda a: a if isinstance(a, int) else float(to(a))


def _divide(a: int | float, b: int | float) -> int | float | None:
    """Integers are cut off towards zero."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return a / b


RULES: dict[str, Callable[[_Tracer, Node], Array | None]] = {
    "Shape": _Tracer.shape,
    "Gather": _Tracer.gather,
    "Slice": _Tracer.pick,
    "Concat": _Tracer.concat,
    **dict.fromkeys(("Unsqueeze", "Squeeze", "Identity", "Reshape"), _Tracer.reshape),
    "Transpose": _Tracer.transpose,
    "Cast": _Tracer.cast,
    "ConstantOfShape": _Tracer.fill,
    "Where": _Tracer.where,
    "Equal": _arithmetic(lambda a, b: int(a == b)),
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _arithmetic(operator.mul),
    "Div": _arithmetic(_divide),
    "Max": _extreme(max),
    "Min": _extreme(min),
    "Neg": _on_one(operator.neg),
    "Abs": _on_one(abs),
    "Floor": _on_one(_rounded(math.floor)),
    "Ceil": _on_one(_rounded(math.ceil)),
    "Mod": _arithmetic(lambda a, b: a % b if a >= 0 and b > 0 else None),
}
