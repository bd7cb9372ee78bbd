"""The layers of an ONNX graph, a ResNet or a sweep's, as an INT8 .tflite file with random weights."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import numpy_helper

from findings.support.int8_tflite import Network

_HEAD = {"ReduceMean", "GlobalAveragePool"}  # where the last feature map ends; what follows costs next to nothing


def convert(path: Path, size: tuple[int, ...], target: Path) -> None:
    """Write `target`. Rectifiers and norms are part of the layer before; strides without one are pools of a pixel."""
    graph = onnx.load(path).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    network = Network()
    made = {graph.input[0].name: network.input(size[2], size[1])}
    for node in graph.node:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type in _HEAD:
            network.save(target, made[node.input[0]])
            return
        stride = max(attributes.get("strides", [1]))
        tensors = [made[name] for name in node.input if name in made]
        if node.op_type == "Conv":
            weight = constants[node.input[1]]
            if attributes.get("group", 1) == 1:
                result = network.conv(tensors[0], weight.shape[0], weight.shape[2], stride)
            else:
                assert (weight.shape[1], stride) == (1, 1), f"{node.name} has groups"
                result = network.depthwise(tensors[0], weight.shape[2])
        elif node.op_type == "Add":
            result = network.add(*tensors)
        elif node.op_type == "MaxPool":
            result = network.pool(tensors[0], attributes["kernel_shape"][0], stride)
        elif node.op_type == "Slice":
            axes, steps = (constants[name].tolist() for name in node.input[3:5])
            result = network.pool(tensors[0], 1, 2) if (axes, steps) == ([2], [2]) else tensors[0]  # rows; then columns
        elif node.op_type == "Pad":
            _, before, _, _, _, after, _, _ = constants[node.input[1]].tolist()
            result = network.pad(tensors[0], before, after)
        elif node.op_type in ("Relu", "BatchNormalization", "Identity"):
            result = tensors[0]
        else:
            raise ValueError(f"{node.name} ({node.op_type}) is in no ResNet")
        made[node.output[0]] = result
    network.save(target, made[graph.output[0].name])
