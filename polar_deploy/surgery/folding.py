"""What is computed from constants alone becomes a constant: gates come as Cast, Not, Greater, Where …"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.ir import has_body
from polar_deploy.surgery.shape_folding import evaluate
from polar_deploy.surgery.standins import STANDARD

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.graph import Graph
    from polar_deploy.surgery.ir import Node

MOST = 1 << 24  # elements of constants that are looked at
FOLDED_ANYWAY = 1 << 12  # elements; what becomes larger than it was stays computed
REARRANGING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"}  # the same elements

# Weights stay quantised, and what is drawn at random is no constant.
UNFOLDED = {"DequantizeLinear", "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"}
UNFOLDED |= {"RandomNormalLike", "RandomUniformLike", "Dropout"}
# Before opset 13 these took several axes together, which onnx's reference does not know.
FLATTENING = {"Softmax", "LogSoftmax", "Hardmax"}
SINGLE_AXIS = 13


def fold(graph: Graph) -> dict[str, str]:
    """Folds all that can be. Returns, by name, which constant of the model another one is a rearrangement of."""
    origins: dict[str, str] = {}
    for node in graph.nodes:
        if any(tensor.values is None and tensor.name for tensor in node.inputs):
            continue
        results = [tensor for tensor in node.outputs if tensor.name]
        if results and all(graph.is_private(tensor.name) for tensor in results) and _is_foldable(graph, node):
            found = _evaluate(graph, node)
            if found is None or any(x.size > MOST or x.dtype.kind in "OSU" for x in found):
                continue
            if node.op in REARRANGING:
                name = node.inputs[0].name
                origins[node.outputs[0].name] = origins.get(name, name)
            graph.hold(node, found)
    return origins


def _is_foldable(graph: Graph, node: Node) -> bool:
    if node.domain not in STANDARD or node.op in UNFOLDED or has_body(node.proto):
        return False
    if node.op in FLATTENING and graph.opset < SINGLE_AXIS:
        return False
    given = sum(tensor.values.size for tensor in node.inputs if tensor.values is not None)
    shapes = [graph.shape(tensor) for tensor in node.outputs if tensor.name]
    result: int = sum(
        math.prod(dim if isinstance(dim, int) else MOST + 1 for dim in ((None,) if shape is None else shape))
        for shape in shapes
    )
    most = MOST if node.op == "Constant" else max(given, FOLDED_ANYWAY)
    return given <= MOST and result <= most


def _evaluate(graph: Graph, node: Node) -> list[Array] | None:
    """The results of a node of constants; None where onnx's reference cannot compute them, and it stays a node."""
    inputs = {tensor.name: np.asarray(tensor.values) for tensor in node.inputs if tensor.name}
    if node.op == "Constant" and isinstance(held := node.attrs.get("value"), np.ndarray):
        return [held]
    return evaluate(node.proto, inputs, graph.opset)
