"""Shapes that ONNX's own inference leaves open, because they come out of shape arithmetic that it does not follow.

Where the sizes of all inputs are known, so are the numbers in `Shape -> Gather -> Mul -> Concat -> Reshape`: here they
are computed, node by node, and what depends on them is inferred again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy.surgery.validation import opset_of

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
SMALL = 1024  # elements; what is larger is no shape arithmetic
# What exporters work out shapes with, and what has meant the same in all opsets but for where its parameters stand.
OPERATORS = {"Constant", "ConstantOfShape", "Identity", "Cast", "Concat", "Gather", "Slice", "Split", "Range", "Where"}
OPERATORS |= {
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Transpose",
    "Expand",
    "Tile",
    "Equal",
    "Less",
    "Greater",
    "Not",
    "Size",
}
OPERATORS |= {"Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Floor", "Ceil", "Sqrt", "Min", "Max", "ReduceProd"}


def complete(model: onnx.ModelProto, types: dict[str, onnx.TypeProto]) -> None:
    """Fills in what can be known.

    Args:
        model: with fixed sizes of inputs; large constants may be inputs, too.
        types: by tensor name, as ONNX's inference found them; changed in place.
    """
    nodes = [node for node in model.graph.node if node.domain in ("", "ai.onnx")]
    if all(_dims(types, name) is not None for node in nodes for name in node.output if name):
        return
    arithmetic = _Arithmetic(model, types)
    for node in nodes:
        if any(_dims(types, name) is None for name in node.output if name):
            arithmetic.infer(node)
        arithmetic.compute(node)


def _dims(types: dict[str, onnx.TypeProto], name: str) -> tuple[int, ...] | None:
    """A shape that is known altogether; () for what is no tensor."""
    kind = types.get(name)
    if kind is None or not kind.HasField("tensor_type"):
        return None if kind is None else ()
    dims = kind.tensor_type.shape.dim
    known = kind.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
    return tuple(dim.dim_value for dim in dims) if known else None


class _Arithmetic:
    """What is known so far: types of tensors, and the numbers in small ones."""

    def __init__(self, model: onnx.ModelProto, types: dict[str, onnx.TypeProto]) -> None:
        import onnx

        self.types = types
        self.opset = opset_of(model)
        self.numbers = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._done: dict[tuple[bytes, ...], Array | None] = {}  # exporters write the same calculation again and again

    def infer(self, node: onnx.NodeProto) -> None:
        """Types of the outputs, given the numbers in the inputs."""
        import onnx

        names = {name for name in node.input if name}
        if not names <= self.types.keys() or not onnx.defs.has(node.op_type, self.opset):
            return
        data = {name: onnx.numpy_helper.from_array(self.numbers[name]) for name in names & self.numbers.keys()}
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        given = {name: self.types[name] for name in names}
        self.types.update(onnx.shape_inference.infer_node_outputs(schema, node, given, data, opset_imports=opsets))

    def compute(self, node: onnx.NodeProto) -> None:
        """The numbers in the output, where they are few and those in the inputs are known."""
        sizes = [_dims(self.types, name) for name in node.output]
        if len(sizes) != 1 or sizes[0] is None or math.prod(sizes[0]) > SMALL:
            return
        if node.op_type == "Shape":
            shape = _dims(self.types, node.input[0])
            if shape is not None:
                bounds = {entry.name: entry.i for entry in node.attribute}
                self.numbers[node.output[0]] = np.array(
                    shape[slice(bounds.get("start", 0), bounds.get("end"))], np.int64
                )
        elif node.op_type in OPERATORS and all(name in self.numbers for name in node.input if name):
            values = self._evaluated(node)
            if values is not None:
                self.numbers[node.output[0]] = values

    def _evaluated(self, node: onnx.NodeProto) -> Array | None:
        given = [self.numbers[name] if name else None for name in node.input]
        parts = [b"" if x is None else repr((x.dtype, x.shape)).encode() + x.tobytes() for x in given]
        key = (node.op_type.encode(), *(entry.SerializeToString() for entry in node.attribute), *parts)
        if key not in self._done:
            found = evaluate(node, {name: self.numbers[name] for name in node.input if name}, self.opset)
            self._done[key] = None if found is None else found[0]
        return self._done[key]


def evaluate(node: onnx.NodeProto, inputs: dict[str, Array], opset: int) -> list[Array] | None:
    """The results of a node of the standard domain; None where onnx's reference cannot compute all that have a name.

    The node goes into a graph: by itself it would be taken for one of the newest opset.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    named = [name for name in node.output if name]
    given, made = ([onnx.ValueInfoProto(name=name) for name in names] for names in (inputs, named))
    graph = onnx.helper.make_graph([node], "node", given, made)
    try:
        results = ReferenceEvaluator(graph, opsets={"": opset}).run(None, inputs)
    except Exception:  # noqa: BLE001 - the reference has no common class for its errors
        return None
    return None if any(result is None for result in results) else [np.asarray(result) for result in results]
