"""How much each layer alone loses in INT8, seen at the network's outputs.

The error of a layer: how far the worst output moves when all that this layer reads is rounded as in the INT8 graph
(its inputs, its weights, its bias) and the rest of the network is FP32; RMS over samples, as a share of the output's
RMS. Seen at the output, because an error of 10 % in a small branch does nothing, and of 1 % in the wrong place a lot.
One layer at a time, because roundings are nearly independent: errors of single layers add up as squares do, so that
taking out the largest is what helps most.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from polar_deploy.precision import graph
from polar_deploy.precision.proof import Reference
from polar_deploy.surgery.detached import put_nodes

# Nodes that compute with what they read. Others move numbers, compare them or cut them off: nothing for FP16 to save.
_COMPUTING = (*sorted(graph.LAYERS), "Add", "AveragePool", "Concat", "GlobalAveragePool")


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
    for node in model.graph.node:
        if node.name == layer.name:
            for index, pair in rounded_inputs(graph.makers(quantised), layer).items():
                for original in pair:
                    copy = onnx.NodeProto.FromString(original.SerializeToString())
                    if original.op_type == "QuantizeLinear":
                        copy.input[0] = node.input[index]
                    elif len(pair) == 2:
                        copy.input[0] = written[-1].output[0]
                    copy.name = copy.output[0] = names.fresh(f"{layer.name}/{index}/{original.op_type}")
                    written.append(copy)
                    needed = [constants[name] for name in copy.input if name in constants and name not in names.taken]
                    names.taken |= {tensor.name for tensor in needed}
                    model.graph.initializer.extend(needed)
                node.input[index] = written[-1].output[0]
        written.append(node)
    put_nodes(model.graph, written)
    graph.drop_unused(model)
    return model
