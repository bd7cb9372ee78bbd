"""Layers in the one form that INT8 knows: no factors, and a bias a channel, or none."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from polar_deploy.onnx_files import attribute_value
from polar_deploy.precision import graph
from polar_deploy.surgery.detached import put_nodes


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write each Gemm with a constant weight as `x @ w + b`, b of shape [N]. The model given is used up.

    Factors move into constants (ONNX Runtime's integer Gemm knows no beta). A bias that is computed, or that differs
    between rows, becomes an Add behind the layer.
    """
    names = graph.Names(model)
    constants = graph.weights(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "Gemm" and not node.domain and node.input[1] in constants:
            nodes += _plain_gemm(node, model.graph, constants, names)
    put_nodes(model.graph, nodes)
    graph.drop_unused(model)
    return graph.inferred(model)


def _plain_gemm(
    node: onnx.NodeProto, owner: onnx.GraphProto, constants: dict[str, np.ndarray], names: graph.Names
) -> list[onnx.NodeProto]:
    """Change a Gemm in place; return the nodes that have to follow it."""

    def store(value: np.ndarray, name: str) -> str:
        tensor = numpy_helper.from_array(value.astype(np.float32), names.fresh(name))
        owner.initializer.append(tensor)
        return tensor.name

    alpha, beta = (attribute_value(node, name, 1.0) for name in ("alpha", "beta"))
    weight = constants[node.input[1]]
    if alpha != 1:
        node.input[1] = store(alpha * weight, f"{node.input[1]}_scaled")
    for attribute in [each for each in node.attribute if each.name in ("alpha", "beta")]:
        node.attribute.remove(attribute)
    if len(node.input) < 3 or not node.input[2]:
        return []
    outputs = weight.shape[0 if attribute_value(node, "transB", 0) else 1]
    bias, shape = node.input[2], getattr(constants.get(node.input[2]), "shape", None)
    if shape is not None and int(np.prod(shape[:-1])) == 1:
        if beta != 1 or shape != (outputs,):
            row = np.broadcast_to(constants[bias].reshape(-1), (outputs,))
            node.input[2] = store(beta * row, f"{bias}_row")
        return []
    del node.input[2]
    after: list[onnx.NodeProto] = []
    if beta != 1:
        factor, scaled = store(np.array(beta), f"{node.name}_beta"), names.fresh(f"{bias}_scaled")
        after.append(helper.make_node("Mul", [bias, factor], [scaled], name=names.fresh(f"{node.name}_scale")))
        bias = scaled
    result, node.output[0] = node.output[0], names.fresh(f"{node.output[0]}_product")
    return [*after, helper.make_node("Add", [node.output[0], bias], [result], name=names.fresh(f"{node.name}_bias"))]
