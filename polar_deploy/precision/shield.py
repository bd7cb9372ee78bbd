"""Layers that stay FP32 in an INT8 graph for ONNX Runtime, shielded from its optimiser.

WeightBiasQuantization (onnxruntime 1.32, on by default) gives a layer between a DequantizeLinear and a QuantizeLinear
a weight of 8 bits, one scale for all channels, where the graph has it in FP32: see
findings/onnxruntime-quantises-kept-weights.sh. It does not where another operator stands in front of the pair.
"""

from __future__ import annotations

import onnx
from onnx import helper

from polar_deploy.precision import graph
from polar_deploy.surgery.detached import put_nodes

_ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_BEFORE_PAIRS = frozenset({"Clip", "Relu"})  # what may stand between the layer and its pair all the same


def shield(model: onnx.ModelProto) -> None:
    """Put a Sum of one, which changes nothing and which no optimiser takes out, before the pairs of such layers."""
    constants, names = graph.weights(model), graph.Names(model)
    makers, readers = graph.makers(model), graph.readers(model)
    written: list[onnx.NodeProto] = []
    for node in model.graph.node:
        written.append(node)
        if node.op_type not in _ROUNDED or node.input[1] not in constants or not _reads_integers(node, makers):
            continue
        last = node
        while len(after := readers[last.output[0]]) == 1 and after[0].op_type in _BEFORE_PAIRS:
            last = after[0]
        if len(after) == 1 and after[0].op_type == "QuantizeLinear":
            result, node.output[0] = node.output[0], names.fresh(f"{node.output[0]}_kept")
            written.append(helper.make_node("Sum", [node.output[0]], [result], name=names.fresh(f"{node.name}_kept")))
    put_nodes(model.graph, written)


def _reads_integers(layer: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether a pair ends where its input comes from: ONNX Runtime moves a pair's end behind what moves numbers."""
    node = makers.get(layer.input[0])
    while node is not None and node.op_type not in graph.LAYERS and node.input:
        if node.op_type == "DequantizeLinear":
            return True
        node = makers.get(node.input[0])
    return False
