"""Inputs to run a stranger's model on: random numbers of the types and shapes that it declares, and that it takes.

What integers mean (indices, sizes, divisors, lengths) no model says, so that several kinds are tried, the likeliest
first. Values: numpy arrays; lists of them for sequences; None for optional ones; dictionaries for maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations, islice, pairwise, permutations, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError
from polar_deploy.onnx_files import attribute_value
from polar_deploy.surgery.sizes import Shape, Sizes, assign, candidates, fill, input_shapes

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Value = Any  # Array | list[Value] | dict[Any, Value] | None
Values = dict[str, Value]

# What integers hold: 0 or 1; what their reader takes them for; ones; ones and a last -1; 0 to 8; zeros.
INTEGERS = ("bits", "role", "ones", "rest", "small", "zeros")
# What real numbers hold: normally distributed; between 0.5 and 1 (scales, thresholds, probabilities).
REALS = ("normal", "positive")
FAR = 1000  # the end of a slice, of a range
SEQUENCE = 2  # elements
RANKS = (4, 3, 2, 1, 0)  # tried where an input has no shape
SHORT = 32  # elements along each axis of such an input
TOO_LARGE = 1 << 31  # elements
MOST_VECTORS = 30  # of one length


class Attempt(NamedTuple):
    """A choice of sizes and of kinds of numbers. integers: or what vectors of that length hold.

    rank: of inputs that declare no shape.
    """

    sizes: Sizes
    integers: str | tuple[int, ...] = INTEGERS[0]
    reals: str = REALS[0]
    rank: int = RANKS[0]


def attempts(model: onnx.ModelProto, batch: int) -> Iterator[Attempt]:
    """Choices to try, the likeliest first: kinds of numbers at the usual sizes, other sizes, then both together."""
    usual = assign(input_shapes(model), batch)
    constants = {tensor.name for tensor in model.graph.initializer}
    fed = [value for value in model.graph.input if value.name not in constants]
    ranks = RANKS if any(not _leaf(value.type).HasField("shape") for value in fed) else RANKS[:1]
    kinds = [Attempt(usual, *kind) for kind in product(INTEGERS, REALS, ranks)]
    yield from kinds
    yield from (kinds[0]._replace(integers=vector) for vector in _vectors(model, fill(input_shapes(model), usual)))
    yield from (kinds[0]._replace(sizes=sizes) for sizes in islice(candidates(model, (batch,)), 1, None))
    few = islice(candidates(model, (batch,)), 1, 40)
    yield from (kind._replace(sizes=sizes) for sizes in few for kind in kinds[1:])


def _vectors(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """What a vector of integers may hold that comes in: a shape for what else comes in, or the widths of layers."""
    import onnx

    whole = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    lengths = {shape[0] for name, shape in shapes.items() if len(shape) == 1 and types[name] in whole}
    others = [shape for name, shape in shapes.items() if types[name] not in whole and 1 < len(shape) < 6]
    widths = dict.fromkeys(dim for tensor in model.graph.initializer for dim in tensor.dims if dim > 1)
    for length in sorted(lengths):
        for shape in others:
            yield from islice(dict.fromkeys(_reshaped(shape, length)), MOST_VECTORS)
        yield from ((width,) * length for width in islice(widths, MOST_VECTORS))


def _reshaped(shape: tuple[int, ...], length: int) -> Iterator[tuple[int, ...]]:
    """Shapes with so many dimensions and the same elements: neighbours joined, dimensions exchanged, ones between."""
    if length > len(shape):
        yield from (tuple(order) for order in permutations((*shape, *[1] * (length - len(shape)))))
        return
    for cuts in combinations(range(1, len(shape)), length - 1):
        parts = [shape[a:b] for a, b in pairwise((0, *cuts, len(shape)))]
        yield from permutations([math.prod(part) for part in parts])


def make(model: onnx.ModelProto, attempt: Attempt, seed: int = 0) -> Values:
    """Values for all inputs, the same ones for the same arguments.

    Raises:
        ContentError: they do not fit into memory.
    """
    batch = next(iter(attempt.sizes.values()), 1)
    generator = np.random.default_rng((batch, seed))
    maker = _Maker(attempt, generator, fill(input_shapes(model), attempt.sizes), _roles(model))
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: maker.value(value.type, value.name) for value in model.graph.input if value.name not in constants
    }


def hold_sizes(model: onnx.ModelProto) -> bool:
    """Whether inputs may hold sizes, indices or counts, which a graph takes few of: integers, and numbers alone."""
    import onnx

    constants = {tensor.name for tensor in model.graph.initializer}
    kinds = [_leaf(value.type) for value in model.graph.input if value.name not in constants]
    whole = {getattr(onnx.TensorProto, name) for name in ("INT32", "INT64", "UINT8", "INT8", "UINT64")}
    return any(kind.elem_type in whole or (kind.HasField("shape") and not kind.shape.dim) for kind in kinds)


class _Maker:
    """Draws values, one input after the other."""

    def __init__(
        self,
        attempt: Attempt,
        generator: np.random.Generator,
        shapes: dict[str, tuple[int, ...]],
        roles: dict[str, str | Shape],
    ) -> None:
        self.attempt, self.generator, self.shapes, self.roles = attempt, generator, shapes, roles

    def value(self, kind: onnx.TypeProto, name: str) -> Value:
        """One value of any type."""
        if kind.HasField("sequence_type"):
            return [self.value(kind.sequence_type.elem_type, name) for _ in range(SEQUENCE)]
        if kind.HasField("optional_type"):
            return self.value(kind.optional_type.elem_type, name)
        if kind.HasField("map_type"):
            return {"a" if kind.map_type.key_type == 8 else 0: self.value(kind.map_type.value_type, name)}  # 8: STRING
        return self.tensor(kind, name)

    def tensor(self, kind: onnx.TypeProto, name: str) -> Array:
        """One tensor."""
        import onnx

        shape = self.shapes.get(name)
        if shape is None:
            dims = kind.tensor_type.shape.dim
            shape = tuple(dim.dim_value if dim.dim_value > 0 else SHORT for dim in dims)
            if not kind.tensor_type.HasField("shape"):
                shape = (1, 3, SHORT, SHORT)[-self.attempt.rank :] if self.attempt.rank else ()
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)
        numbers = self._normal(shape, name)
        if dtype.kind == "O":
            return np.asarray(np.where(numbers > 0, "1", "2"), object)
        told = self.attempt.integers == "role" and isinstance(self.roles.get(name), tuple)
        if dtype.kind in "biu" or (told and not shape):  # OneHot takes its depth as a real number, too
            return np.asarray(self._integers(numbers, name), dtype)
        if self.attempt.reals == "positive":
            numbers = np.asarray(1 - 0.5 / (1 + np.abs(numbers)))
        return np.asarray(numbers.astype(dtype))

    def _normal(self, shape: tuple[int, ...], name: str) -> Array:
        try:
            if np.prod(shape, dtype=np.float64) > TOO_LARGE:
                raise MemoryError
            return np.asarray(self.generator.standard_normal(shape))
        except (MemoryError, ValueError) as error:
            raise ContentError(
                f"input {name} of shape {list(shape)} is too large to try the cut on",
                "pass --no-verify to write the cut graph without the proof",
            ) from error

    def _integers(self, numbers: Array, name: str) -> Array:
        shape, kind = numbers.shape, self.attempt.integers
        if isinstance(kind, tuple) and shape == (len(kind),):
            return np.array(kind)
        if kind == "role":
            found = self.roles.get(name)
            if isinstance(found, tuple) and not shape and len(found) == 1 and isinstance(found[0], int):
                return np.asarray(found[0])
            if isinstance(found, tuple) and len(shape) == 1 and shape[0] <= len(found):  # less: but for the first ones
                dims = found[len(found) - shape[0] :]
                return np.array([dim if isinstance(dim, int) else self.attempt.sizes.get(str(dim), 1) for dim in dims])
            if isinstance(found, str):
                count = math.prod(shape)
                role = {"count": np.arange(count), "far": np.full(count, FAR), "ones": np.ones(count)}
                return np.asarray(role[found].reshape(shape))
        if kind == "ones":
            return np.ones(shape)
        if kind == "rest" and len(shape) == 1:
            return np.where(np.arange(shape[0]) < shape[0] - 1, 1, -1)
        if kind == "small":
            return np.asarray(np.floor(np.abs(numbers) * 3) % 9)
        return np.zeros(shape) if kind == "zeros" else np.asarray(numbers > 0)


def _leaf(kind: onnx.TypeProto) -> onnx.TypeProto.Tensor:
    """The tensors that a type is made of."""
    while not kind.HasField("tensor_type"):
        if kind.HasField("sequence_type"):
            kind = kind.sequence_type.elem_type
        elif kind.HasField("optional_type"):
            kind = kind.optional_type.elem_type
        else:
            return kind.map_type.value_type.tensor_type
    return kind.tensor_type


# By the name of an operator's input: what it holds where an input of the graph is read as that.
ROLES = {
    "axes": "count",
    "perm": "count",
    "ends": "far",
    "steps": "ones",
    "repeats": "ones",
    "k": "ones",
    "delta": "ones",
    "limit": "far",
    "depth": "ones",
    "dft_length": "far",
    "B": "ones",
    "max_output_boxes_per_class": "ones",
}
SHAPES = ("shape", "sizes", "image_shape", "size")  # inputs that hold the shape of the result


def _roles(model: onnx.ModelProto) -> dict[str, str | Shape]:
    """What inputs hold, by name, where the node that reads them tells: a role, or the shape that is declared for it."""
    import onnx

    declared: dict[str, Shape] = {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    inputs = {value.name for value in model.graph.input}
    roles: dict[str, str | Shape] = {}
    for node in model.graph.node:
        if inputs.isdisjoint(node.input) or not onnx.defs.has(node.op_type, node.domain):
            continue
        formal = onnx.defs.get_schema(node.op_type, node.domain).inputs
        for name, parameter in zip(node.input, formal, strict=False):
            if parameter.name in ROLES:
                roles[name] = ROLES[parameter.name]
            elif parameter.name in SHAPES and node.output[0] in declared:
                roles[name] = declared[node.output[0]]
        if node.op_type in OWN_ROLES and node.output[0] in declared:
            index, role = OWN_ROLES[node.op_type]
            found = role(node, declared[node.output[0]])
            if found is not None:
                roles[node.input[index]] = found
    return roles


def _grid_size(_: onnx.NodeProto, result: Shape) -> Shape | None:
    """Of AffineGrid, [N, C, (D,) H, W]: the result is [N, (D,) H, W, 2 or 3]."""
    return (result[0], 1, *result[1:-1]) if result else None


def _depth(node: onnx.NodeProto, result: Shape) -> Shape | None:
    """Of OneHot: the size of the axis that it adds."""
    axis = attribute_value(node, "axis", -1)
    return (result[axis],) if -len(result) <= axis < len(result) else None


# Inputs that hold something else that the shape of the result tells, by operator: which one, and what.
OWN_ROLES: dict[str, tuple[int, Callable[[onnx.NodeProto, Shape], Shape | None]]] = {
    "AffineGrid": (1, _grid_size),
    "OneHot": (1, _depth),
}
