"""Layers that stay FP32 stay so in ONNX Runtime, too, which would round their weights between two pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.precision.kinds import SIDE, Net, images
from tests.support.residual import difference, evaluated, nodes, run, written

CHANNELS = 8


def network(operator: str, clipped: bool) -> onnx.ModelProto:
    """A convolution and a sum, then, past a slice, a layer that 8 bits ruin: what it reads with weights of 2,000 is
    next to nothing."""
    net = Net()
    stem = net.conv("input", "stem", 3, CHANNELS)
    net.constants["stem.w"][0] *= 5e-4
    net.constants["stem.b"][:] = 0
    more = net.node("Add", [stem, stem], "doubled")
    bounds = [net.constant(f"at{index}", value=np.array([each])) for index, each in enumerate((1, SIDE, 2))]
    part = net.node("Slice", [more, *bounds], "part")
    if operator == "Conv":
        bad = net.conv(part, "bad", CHANNELS, CHANNELS)
        net.constants["bad.w"][:, 0] *= 2000
    else:
        weight = net.constant("bad.w", CHANNELS, CHANNELS, 2, 2)
        net.constants["bad.w"][0] *= 2000
        bad = net.node("ConvTranspose", [part, weight], "bad", strides=[2, 2])
    bad = net.node("Relu", [bad], "cut") if clipped else bad
    return net.classifier(net.conv(bad, "last", CHANNELS, CHANNELS), CHANNELS, opset=21)


# A convolution without a Relu behind it 8 bits do not ruin here: all that follows is linear, and the mean of a channel.
@pytest.mark.parametrize(("operator", "clipped"), [("Conv", True), ("ConvTranspose", False), ("ConvTranspose", True)])
def test_only_the_layer_that_8_bits_ruin_stays_wide(operator: str, clipped: bool, tmp_path: Path) -> None:
    typed, said = written(network(operator, clipped), "ort-int8", tmp_path, images(32))
    kept = {each["layer"] for each in said["high_precision_layers"]}
    assert f"bad/{operator}" in kept
    assert not kept & {"stem/Conv", "last/Conv"}
    assert nodes(typed)[f"bad/{operator}"].input[1] == "bad.w"
    apart = difference(run(typed, images(4)), evaluated(typed, images(4)))
    assert apart < 0.02, "ONNX Runtime computes another network than the graph is"


def test_weights_are_not_rounded_when_the_graph_is_optimised(tmp_path: Path) -> None:
    typed, _ = written(network("ConvTranspose", clipped=False), "ort-int8", tmp_path, images(32))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(typed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    (layer,) = [node for node in optimised.graph.node if node.op_type == "ConvTranspose"]
    weights = {tensor.name: tensor.data_type for tensor in optimised.graph.initializer}
    assert weights[layer.input[1]] == onnx.TensorProto.FLOAT
