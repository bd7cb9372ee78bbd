"""Opsets 11 to 24: one network of everyday operators, taken from opset to opset by onnx's own converter."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import version_converter

from tests.surgery.graphs import Net, cut, names, weight

RUNTIME = tuple(map(int, onnxruntime.__version__.split(".")[:2]))


def _everyday() -> onnx.ModelProto:
    """BatchNorm, Clip, Split, Pad, Slice, ReduceMean, Squeeze, Softmax: what was an attribute became an input.

    Channels 1 and 6 of the stream are closed by its writers; the Split makes them one set.
    """
    net = Net(opset=11)
    x = net.conv("input", 8, "stem")
    low, high = (net.constant(name, np.array(value, np.float32)) for name, value in (("low", 0), ("high", 6)))
    x = net.gate(net.node("Clip", [net.bn(x, "bn"), low, high], "clip"), [1, 6], "gate1")
    skip = net.node("Pad", [x, net.constant("pads", np.array([0, 0, 0, 0, 0, 2, 0, 0]))], "pad")
    net.width[skip] = 10
    y = net.gate(net.node("LeakyRelu", [net.conv(x, 10, "inner")], "leaky"), [0, 3, 9], "gate2")
    y = net.gate(net.node("HardSigmoid", [net.conv(y, 10, "outer")], "hard"), [1, 6], "gate3")
    x = net.add(skip, y, "add")
    ends = [net.constant(name, np.array(values)) for name, values in (("starts", [1]), ("ends", [7]), ("axes", [2]))]
    x = net.node("Slice", [x, *ends], "slice")
    net.nodes.append(onnx.helper.make_node("Split", [x], ["left", "right"], name="split", axis=1))
    net.width["left"] = net.width["right"] = 5
    x = net.node("Mul", ["left", net.node("Sigmoid", ["right"], "sigmoid")], "product")
    x = net.gate(net.relu(net.conv(x, 6, "last"), "act"), [2], "gate4")
    x = net.node("ReduceMean", [x], "mean", axes=[2, 3], keepdims=1)
    x = net.node("Squeeze", [x], "squeeze", axes=[2, 3])
    x = net.gemm(x, 6, 5, "scores")
    return net.model(net.node("Softmax", [x], "logits", axis=1))


@pytest.mark.parametrize("opset", range(11, 25))
def test_the_same_cut_in_every_opset(opset: int) -> None:
    if opset == 24 and RUNTIME < (1, 24):
        pytest.skip("this ONNX Runtime ends at opset 23")
    model = version_converter.convert_version(_everyday(), opset)
    assert model.opset_import[0].version == opset
    surgery = cut(model)
    assert weight(surgery.model, "stem").shape[0] == 6
    assert weight(surgery.model, "inner").shape == (7, 6, 3, 3)
    assert weight(surgery.model, "last").shape[0] == weight(surgery.model, "scores").shape[1] == 5
    assert not names(surgery.model) & {"gate1", "gate2", "gate4"}
    assert surgery.report["unsupported"] == []
