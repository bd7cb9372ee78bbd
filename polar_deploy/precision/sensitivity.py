"""How much each layer alone loses in INT8, seen at the network's output.

The error of a layer: how far the logits move when all that this layer reads is rounded as in the INT8 graph (its
inputs, its weights, its bias) and the rest of the network is FP32; RMS over calibration images, as a share of the
logits' RMS. Seen at the output, because an error of 10 % in a small branch does nothing, and of 1 % in the wrong place
a lot. One layer at a time, because roundings are nearly independent: errors of single layers add up as squares do, so
that taking out the largest is what helps most.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from polar_deploy.precision import calibration, graph
from polar_deploy.precision.calibration import Array

IMAGES = 16  # spread over those of the calibration: an error to within about 10 % of itself, which a bound needs
# Nodes that compute with what they read. Others move numbers, compare them or cut them off: nothing for FP16 to save.
_COMPUTING = (*sorted(graph.LAYERS), "Add", "AveragePool", "Concat", "GlobalAveragePool")


def errors(wide: onnx.ModelProto, quantised: onnx.ModelProto, images: Array, path: Path) -> dict[str, float]:
    """The error of each node that computes with rounded numbers, by its name.

    Args:
        wide: the network in FP32.
        quantised: the same with Q/DQ pairs, nodes by the same names.
        images: of the calibration, [N,C,H,W].
        path: the network's file, for messages.
    """
    chosen = images[np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int)]
    exact = _logits(wide, chosen, path)
    found = {}
    for node in quantised.graph.node:
        if node.op_type in _COMPUTING and rounded_inputs(quantised, node):
            found[node.name] = relative_error(_logits(alone(wide, quantised, node), chosen, path), exact)
    return found


def relative_error(logits: npt.NDArray[np.float64], exact: npt.NDArray[np.float64]) -> float:
    """RMS difference of logits [N,classes] over the RMS of the exact ones; 0 if those are 0.

    Of each image's logits their mean is taken off first: softmax sees differences only.
    """
    if exact.shape[-1] > 1:
        logits, exact = (each - each.mean(axis=-1, keepdims=True) for each in (logits, exact))
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(logits - exact)) / size if size else 0.0


def rounded_inputs(quantised: onnx.ModelProto, node: onnx.NodeProto) -> dict[int, list[onnx.NodeProto]]:
    """By index of an input that is rounded: the nodes that round it, Q and DQ, or DQ alone behind a constant."""
    made = graph.makers(quantised)
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
    node = next(each for each in model.graph.node if each.name == layer.name)
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    for index, pair in rounded_inputs(quantised, layer).items():
        copies = [onnx.NodeProto.FromString(each.SerializeToString()) for each in pair]
        if len(copies) == 2:
            copies[0].input[0] = node.input[index]
        for number, copy in enumerate(copies):  # ONNX Runtime reuses a bias's name for what it dequantises it to
            copy.output[0] = f"{layer.name}/{index}/{number}"
            copy.input[0] = f"{layer.name}/{index}/{number - 1}" if number else copy.input[0]
        node.input[index] = copies[-1].output[0]
        there = {tensor.name for tensor in model.graph.initializer}
        needed = {name for copy in copies for name in copy.input if name in constants} - there
        model.graph.initializer.extend(constants[name] for name in sorted(needed))
        model.graph.node.extend(copies)
    graph.drop_unused(model)
    graph.sort(model.graph)
    return model


def _logits(model: onnx.ModelProto, images: Array, path: Path) -> npt.NDArray[np.float64]:
    run = calibration.session(model, path)
    (logits,) = run.run([model.graph.output[0].name], {model.graph.input[0].name: images})
    return np.asarray(logits, np.float64).reshape(len(images), -1)
