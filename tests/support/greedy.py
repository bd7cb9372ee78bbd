"""Valid graphs of a few hundred bytes that take more memory, or more time, than there is."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HUGE = np.array([25, 1000, 1000, 1000], np.int64)  # 100 GB of float32


def graph(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> onnx.ModelProto:
    """A convolution from x to c, and `nodes` from there to y."""
    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    outputs = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    named = {"w": np.ones((4, 3, 3, 3), np.float32), **constants}
    tensors = [numpy_helper.from_array(values, name) for name, values in named.items()]
    first = helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1])
    made = helper.make_graph([first, *nodes], "hostile", [inputs], [outputs], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def huge(first: str, *inputs: str) -> onnx.ModelProto:
    """100 GB in the middle: of one operator, whose largest number is added to what the convolution gives."""
    one = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ReduceMax", ["c"], ["r"], keepdims=0),
        helper.make_node(first, [*inputs, "size"], ["k"], **({"value": one} if first == "ConstantOfShape" else {})),
        helper.make_node("ReduceMax", ["k"], ["m"], keepdims=0),
        helper.make_node("Add", ["c", "m"], ["y"]),
    ]
    return graph(nodes, size=HUGE)


def inflated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A classifier with 100 GB between its last layer and its output."""
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(HUGE, "hostile"))
    model.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["before"], ["hostile_r"], keepdims=0),
            helper.make_node("Expand", ["hostile_r", "hostile"], ["hostile_k"]),
            helper.make_node("ReduceMin", ["hostile_k"], ["hostile_m"], keepdims=0),
            helper.make_node("Min", ["before", "hostile_m"], [output]),
        ]
    )
    return model


def growing(parts: int, size: int) -> onnx.ModelProto:
    """A sum of `parts` tensors of `size` bytes each, that are all there at the same time."""
    names = [f"k{index}" for index in range(parts)]
    nodes = [helper.make_node("ReduceMax", ["c"], ["r"], keepdims=0)]
    nodes += [helper.make_node("Expand", ["r", "size"], [name]) for name in names]
    nodes += [
        helper.make_node("Sum", names, ["all"]),
        helper.make_node("ReduceMax", ["all"], ["m"], keepdims=0),
        helper.make_node("Add", ["c", "m"], ["y"]),
    ]
    return graph(nodes, size=np.array([size // 4], np.int64))


def endless() -> onnx.ModelProto:
    """A loop with 2^62 rounds."""
    of = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["sum", "sum"], ["more"])],
        "body",
        [of("i", TensorProto.INT64, []), of("go", TensorProto.BOOL, []), of("sum", TensorProto.FLOAT, None)],
        [of("on", TensorProto.BOOL, []), of("more", TensorProto.FLOAT, None)],
    )
    loop = helper.make_node("Loop", ["rounds", "true", "c"], ["y"], body=body)
    return graph([loop], rounds=np.array(2**62), true=np.array(True))
