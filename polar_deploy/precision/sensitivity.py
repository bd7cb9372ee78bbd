"""How much each layer alone loses in INT8, seen at the network's outputs.

The error of a layer: how far the worst output moves when all that this layer reads is rounded as in the INT8 graph
(its inputs, its weights, its bias), and what it writes for readers without an error of their own, and the rest of the
network is FP32; RMS over samples, as a share of the output's RMS. Seen at the output, because an error of 10 % in a
small branch does nothing, and of 1 % in the wrong place a lot. One layer at a time, because roundings are nearly
independent: errors of single layers add up as squares do, so that taking out the largest is what helps most.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from polar_deploy.precision import graph, qdq
from polar_deploy.precision.proof import Reference
from polar_deploy.surgery.detached import put_nodes

# Nodes that compute with what they read. Others move numbers, compare them or cut them off: nothing for FP16 to save.
_COMPUTING = (*sorted(graph.LAYERS), "Add", "AveragePool", "Concat", "GlobalAveragePool")
_ROUNDED = {*_COMPUTING, *qdq.ORT.between}  # what reads rounded numbers by choice


def errors(wide: onnx.ModelProto, quantised: onnx.ModelProto, reference: Reference) -> dict[str, float]:
    """The error of each node that computes with rounded numbers, by its name.

    Args:
        wide: the network in FP32.
        quantised: the same with Q/DQ pairs, nodes by the same names.
        reference: what the network gives in FP32.
    """
    made = graph.makers(quantised)
    return {
        node.name: reference.error(alone(wide, quantised, node))
        for node in quantised.graph.node
        if node.op_type in _COMPUTING and rounded_inputs(made, node)
    }


def rounded_inputs(made: Mapping[str, onnx.NodeProto], node: onnx.NodeProto) -> dict[int, list[onnx.NodeProto]]:
    """By index of an input that is rounded: the nodes that round it, Q and DQ, or DQ alone behind a constant.

    Args:
        made: the node that makes each tensor of the quantised graph.
        node: one of its nodes.
    """
    found = {}
    for index, name in enumerate(node.input):
        last = made.get(name)
        if last is not None and last.op_type == "DequantizeLinear":
            first = made.get(last.input[0])
            found[index] = [last] if first is None else [first, last]
    return found


def alone(wide: onnx.ModelProto, quantised: onnx.ModelProto, layer: onnx.NodeProto) -> onnx.ModelProto:
    """The FP32 network in which `layer` alone, a node of the quantised one, reads rounded numbers."""
    model = onnx.ModelProto()
    model.CopyFrom(wide)
    names, constants = graph.Names(model), {tensor.name: tensor for tensor in quantised.graph.initializer}
    written: list[onnx.NodeProto] = []

    def rounded(pair: list[onnx.NodeProto], source: str, place: str) -> str:
        """Write copies of a pair, the first of which reads `source`; return what the last one gives."""
        for original in pair:
            copy = onnx.NodeProto.FromString(original.SerializeToString())
            if original.op_type == "QuantizeLinear" or len(pair) == 2:
                copy.input[0] = source
            source = copy.name = copy.output[0] = names.fresh(f"{layer.name}/{place}/{original.op_type}")
            written.append(copy)
            needed = [constants[name] for name in copy.input if name in constants and name not in names.taken]
            names.taken |= {tensor.name for tensor in needed}
            model.graph.initializer.extend(needed)
        return source

    for node in model.graph.node:
        if node.name != layer.name:
            written.append(node)
            continue
        for index, pair in rounded_inputs(graph.makers(quantised), layer).items():
            node.input[index] = rounded(pair, node.input[index], str(index))
        written.append(node)
        if pair := _pair_behind(graph.readers(quantised), layer):
            result, node.output[0] = node.output[0], names.fresh(f"{node.output[0]}_exact")
            rounded(pair, node.output[0], "output")
            written[-1].output[0] = result
    put_nodes(model.graph, written)
    graph.drop_unused(model)
    return model


def _pair_behind(readers: Mapping[str, list[onnx.NodeProto]], layer: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The pair that rounds what a layer writes, if one of its readers has no error of its own; else []."""
    for first in readers[layer.output[0]]:
        if first.op_type == "QuantizeLinear":
            last = readers[first.output[0]][0]
            if any(reader.op_type not in _ROUNDED for reader in readers[last.output[0]]):
                return [first, last]
    return []
