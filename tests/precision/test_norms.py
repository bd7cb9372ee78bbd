"""Norms in FP16 and BF16: what is written out is FP32 inside, what is one node stays one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.precision.kinds import SIDE, Net, images
from tests.support.residual import difference, element_types, evaluated, nodes, written

CHANNELS = 8


def layer_norm(net: Net, source: str, name: str) -> str:
    """As PyTorch exported it before opset 17."""
    mean = net.node("ReduceMean", [source], f"{name}.average", axes=[1])
    off = net.node("Sub", [source, mean], f"{name}.off")
    square = net.node("Pow", [off, net.constant(f"{name}.two", value=np.float32(2))], f"{name}.square")
    variance = net.node("ReduceMean", [square], f"{name}.variance", axes=[1])
    raised = net.node("Add", [variance, net.constant(f"{name}.eps", value=np.float32(1e-5))], f"{name}.raised")
    return net.node("Div", [off, net.node("Sqrt", [raised], f"{name}.deviation")], name)


def mean_of_squares(net: Net, source: str, name: str) -> str:
    """E[x²] - E[x]², over shapes as GroupNorm has them, as a factor and a shift."""
    shape = net.constant(f"{name}.shape", value=np.array([0, 2, -1], np.int64))
    groups = net.node("Reshape", [source, shape], f"{name}.groups")
    mean = net.node("ReduceMean", [groups], f"{name}.average", axes=[2])
    squares = net.node(
        "ReduceMean", [net.node("Mul", [groups, groups], f"{name}.squared")], f"{name}.squares", axes=[2]
    )
    variance = net.node("Sub", [squares, net.node("Mul", [mean, mean], f"{name}.of_mean")], f"{name}.variance")
    raised = net.node("Add", [variance, net.constant(f"{name}.eps", value=np.float32(1e-5))], f"{name}.raised")
    factor = net.node("Reciprocal", [net.node("Sqrt", [raised], f"{name}.deviation")], f"{name}.factor")
    shift = net.node("Mul", [mean, factor], f"{name}.shift")
    scaled = net.node("Sub", [net.node("Mul", [groups, factor], f"{name}.scaled"), shift], f"{name}.even")
    back = net.constant(f"{name}.back", value=np.array([0, CHANNELS, SIDE, SIDE], np.int64))
    return net.node("Reshape", [scaled, back], name)


def rms_norm(net: Net, source: str, name: str) -> str:
    square = net.node("Mul", [source, source], f"{name}.square")
    mean = net.node("ReduceMean", [square], f"{name}.average", axes=[1])
    root = net.node("Pow", [mean, net.constant(f"{name}.half", value=np.float32(-0.5))], f"{name}.root")
    return net.node("Mul", [source, root], name)


def response_norm(net: Net, source: str, name: str) -> str:
    """ConvNeXt V2's: the length of a channel beside the mean length."""
    length = net.node("ReduceL2", [source], f"{name}.length", axes=[2, 3])
    mean = net.node("ReduceMean", [length], f"{name}.average", axes=[1])
    return net.node("Mul", [source, net.node("Div", [length, mean], f"{name}.share")], name)


def unit_length(net: Net, source: str, name: str) -> str:
    squares = net.node("ReduceSumSquare", [source], f"{name}.squares", axes=[1])
    floor = net.node("Max", [squares, net.constant(f"{name}.eps", value=np.float32(1e-12))], f"{name}.floor")
    return net.node("Div", [source, net.node("Sqrt", [floor], f"{name}.length")], name)


WRITTEN_OUT = [layer_norm, mean_of_squares, rms_norm, response_norm, unit_length]
Norm = Callable[[Net, str, str], str]


def network(norm: Norm, count: int = 1) -> onnx.ModelProto:
    net, last = Net(), "input"
    for index in range(count):
        last = net.conv(last, f"conv{index}", CHANNELS if index else 3, CHANNELS)
        last = net.node("Add", [last, net.constant(f"off{index}", value=np.float32(40))], f"moved{index}")
        last = norm(net, last, f"norm{index}")
    return net.classifier(last, CHANNELS, opset=13)


@pytest.mark.parametrize("target", ["rtx-fp16", "trt-bf16", "rtx-int8"])
@pytest.mark.parametrize("norm", WRITTEN_OUT)
def test_norms_written_out_stay_wide_and_are_told(norm: Norm, target: str, tmp_path: Path) -> None:
    plain = network(norm)
    typed, said = written(plain, target, tmp_path, images(8))
    types = element_types(typed)
    inside = [node.name for node in plain.graph.node if node.name.startswith("norm0.")]
    of_shape = ("norm0.groups/Reshape", "norm0.flat/Flatten", "norm0.mean/GlobalAveragePool")
    narrow = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    for name in set(inside) - set(of_shape):
        assert not narrow & {types[each] for each in (*nodes(typed)[name].input, *nodes(typed)[name].output)}, name
    (told,) = said["high_precision_layers"]
    assert told["layer"] in inside
    assert "norm" in told["why"]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm, response_norm, unit_length])
def test_samples_that_nobody_saw_overflow_nothing(norm: Norm, tmp_path: Path) -> None:
    """The proof's samples are a thousandth as large: at theirs FP16 would do."""
    typed, _ = written(network(norm), "rtx-fp16", tmp_path)
    large = 1000 * images(4)
    assert difference(evaluated(typed, large), evaluated(network(norm), large)) < 5e-3


def test_more_norms_than_are_looked_for(tmp_path: Path) -> None:
    """Bisection looks for 16 nodes at most; 20 norms have 140."""
    typed, said = written(network(layer_norm, 20), "rtx-fp16", tmp_path)
    assert len(said["high_precision_layers"]) == 20
    assert difference(evaluated(typed, images(4)), evaluated(network(layer_norm, 20), images(4))) < 0.02


def test_what_is_no_norm_is_narrow(tmp_path: Path) -> None:
    """Squeeze and excitation, a mean taken off, a square that nobody averages."""
    net = Net()
    last = net.conv("input", "conv", 3, CHANNELS)
    mean = net.node("GlobalAveragePool", [last], "mean")
    gate = net.node("Sigmoid", [net.node("Mul", [mean, mean], "mean_squared")], "gate")
    last = net.node("Mul", [last, gate], "gated")
    last = net.node("Sub", [last, net.node("ReduceMean", [last], "mean2", axes=[1])], "off")
    last = net.node("Add", [last, net.node("Mul", [last, last], "square")], "sum")
    typed, said = written(net.classifier(last, CHANNELS, opset=13), "rtx-fp16", tmp_path)
    assert said["high_precision_layers"] == []
    assert {name for name, kind in element_types(typed).items() if kind == TensorProto.FLOAT} == {"input", "logits"}


def group_norm(batch_norm: bool) -> onnx.ModelProto:
    net = Net()
    last = net.conv("input", "conv", 3, CHANNELS)
    if batch_norm:
        values = [
            net.constant(f"bn{index}", value=np.linspace(0.5, 2, CHANNELS, dtype=np.float32)) for index in range(4)
        ]
        last = net.node("BatchNormalization", [last, *values], "normal")
    last = net.node("Sigmoid", [last], "sigmoid")
    factors = [net.constant(f"gn{index}", value=np.linspace(0.5, 2, CHANNELS, dtype=np.float32)) for index in range(2)]
    last = net.node("GroupNormalization", [last, *factors], "grouped", num_groups=2, epsilon=1e-3)
    return net.classifier(last, CHANNELS, opset=21)


@pytest.mark.parametrize("target", ["rtx-fp16", "trt-bf16", "rtx-int8", "ort-int8"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_group_normalization_stays_one_node(batch_norm: bool, target: str, tmp_path: Path) -> None:
    network = group_norm(batch_norm)
    typed, _ = written(network, target, tmp_path, images(8))
    node = nodes(typed)["grouped/GroupNormalization"]
    assert node.op_type == "GroupNormalization"
    given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    assert (given["num_groups"], given["epsilon"]) == (2, pytest.approx(1e-3))
    assert not [each for each in typed.graph.node if each.op_type in ("InstanceNormalization", "BatchNormalization")]
    bound = {"rtx-fp16": 0.005, "trt-bf16": 0.04}.get(target, 0.1)
    assert difference(evaluated(typed, images(4)), evaluated(network, images(4))) < bound
