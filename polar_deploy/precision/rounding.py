"""A graph of FP16 or BF16, computed in FP32 and rounded after each node.

That is what a device computes which accumulates in FP32, and what no runtime does on a CPU: ONNX Runtime drops casts
between nodes, so that nothing overflows there, and has no BF16 convolution.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.precision import graph
from polar_deploy.surgery.detached import put_nodes


def computed_wide(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which each tensor of FP16 or BF16 is one of FP32 with a value of that type; the model, if it has none.

    A graph with bodies (If, Loop) is left as it is.
    """
    bodies = any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)
    known = dict(graph.tensor_types(model.graph))
    if bodies or not graph.NARROW.intersection(known.values()):
        return model
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    names = graph.Names(model)
    for tensor in wide.graph.initializer:
        _widen(tensor)
    written: list[onnx.NodeProto] = []

    def rounded(source: str, kind: int, result: str) -> None:
        narrow = names.fresh(f"{result}_narrow")
        written.append(helper.make_node("Cast", [source], [narrow], to=kind))
        written.append(helper.make_node("Cast", [narrow], [result], to=TensorProto.FLOAT))

    inputs: dict[str, str] = {}
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type in graph.NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for value in wide.graph.input:
        if known[value.name] in graph.NARROW:
            inputs[value.name] = names.fresh(f"{value.name}_rounded")
            rounded(value.name, known[value.name], inputs[value.name])
    for node in wide.graph.node:
        _widen_attributes(node)
        node.input[:] = [inputs.get(name, name) for name in node.input]
        results = list(node.output)
        node.output[:] = [names.fresh(f"{name}_exact") if known.get(name) in graph.NARROW else name for name in results]
        written.append(node)
        for exact, name in zip(node.output, results, strict=True):
            if exact != name:
                rounded(exact, known[name], name)
    put_nodes(wide.graph, written)
    del wide.graph.value_info[:]
    return wide


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in graph.NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _widen_attributes(node: onnx.NodeProto) -> None:
    """What makes tensors makes FP32; a cast's rounding is written behind it."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in graph.NARROW:
            attribute.i = TensorProto.FLOAT
        elif attribute.HasField("t"):
            _widen(attribute.t)
