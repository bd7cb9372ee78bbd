"""What a graph costs: multiply-accumulates and parameters, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polar_deploy.surgery.model import Shape, infer_at

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Layer:
    """One Conv, ConvTranspose, Gemm or MatMul with a constant. Widths are channels, (inputs, outputs)."""

    node: int  # its position among the graph's nodes
    name: str
    operator: str
    macs: int
    params: int
    width: tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """The cost of a graph at batch 1 and the model's input size (224 a side where that is dynamic).

    macs: multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul (MatMul of two computed tensors too).
    params: elements of all floating-point constants that a node reads, each constant once.
    layers: those with weights, in the graph's order.
    """

    macs: int
    params: int
    layers: tuple[Layer, ...]


def count(model: onnx.ModelProto) -> Cost:
    """Counts the cost of a model.

    Raises:
        ContentError: its shapes contradict each other.
    """
    shapes = infer_at(model, batch=1)
    sizes = _parameters(model)
    counted: set[str] = set()
    params = macs = 0
    layers: list[Layer] = []
    for position, node in enumerate(model.graph.node):
        own = [name for name in dict.fromkeys(node.input) if name in sizes]
        new = sum(sizes[name] for name in own if name not in counted)
        counted.update(own)
        params += new
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and node.domain in ("", "ai.onnx"):
            done, width = _multiply(node, shapes)
            macs += done
            if node.input[1] in sizes:
                layers.append(Layer(position, node.name or node.output[0], node.op_type, done, new, width))
    return Cost(macs, params, tuple(layers))


def _parameters(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of every floating-point constant, by name."""
    import onnx

    floats = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")}
    constants = [(tensor.name, tensor) for tensor in model.graph.initializer]
    constants += [
        (node.output[0], attribute.t)
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return {name: math.prod(tensor.dims) for name, tensor in constants if tensor.data_type in floats}


def _multiply(node: onnx.NodeProto, shapes: dict[str, Shape]) -> tuple[int, tuple[int, int]]:
    """Multiply-accumulates of one node, and its width; zeros where a shape is not known."""
    first, second, result = (_sizes(shapes.get(name)) for name in (*node.input[:2], node.output[0]))
    if first is None or second is None or result is None:
        return 0, (0, 0)
    if node.op_type == "Conv":
        return math.prod(result) * math.prod(second[1:]), (first[1], result[1])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:]), (first[1], result[1])
    inner = first[0] if any(a.name == "transA" and a.i for a in node.attribute) else first[-1]
    return math.prod(result) * inner, (inner, result[-1])


def _sizes(shape: Shape | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(dim for dim in shape if isinstance(dim, int))
    return sizes if len(sizes) == len(shape) else None
