"""What ONNX Runtime's quantiser writes as operators on integers is cut like the graph that it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import quantization

from polar_deploy.surgery import compress
from tests.surgery.graphs import CLOSED, Array, Net, assert_same, names

OPEN = 4  # of six channels


class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
    """A few batches of noise."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.left = [2 * random.standard_normal((4, 3, 8, 8)).astype(np.float32) for _ in range(4)]

    def get_next(self) -> dict[str, Array] | None:
        return {"input": self.left.pop()} if self.left else None


def _empty(net: Net, layer: str, channels: Any = CLOSED) -> None:
    """Filters without weights and bias: what they make is zero."""
    for tensor in net.constants:
        if tensor.name in (f"{layer}.weight", f"{layer}.bias"):
            values = numpy_helper.to_array(tensor).copy()
            values[list(channels)] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _quantized(model: onnx.ModelProto, folder: Path, **options: Any) -> onnx.ModelProto:
    onnx.save(model, folder / "float.onnx")
    quantization.quantize_static(
        str(folder / "float.onnx"),
        str(folder / "integers.onnx"),
        Images(),
        **{
            "quant_format": quantization.QuantFormat.QOperator,
            "activation_type": quantization.QuantType.QUInt8,
            "weight_type": quantization.QuantType.QInt8,
            **options,
        },
    )
    return onnx.load(folder / "integers.onnx")


def _filters(model: onnx.ModelProto, layer: str) -> tuple[int, int]:
    """Outputs and inputs of a layer of integers, by the name that its weight had."""
    tensor = next(t for t in model.graph.initializer if t.name == f"{layer}.weight_quantized")
    return tensor.dims[0], tensor.dims[1]


def _kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("per_channel", [False, True], ids=["one scale", "a scale a channel"])
def test_a_residual_network(per_channel: bool, tmp_path: Path) -> None:
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    x = net.add(x, net.conv(x, 6, "two"), "sum")
    for layer in ("one", "two"):
        _empty(net, layer)
    model = _quantized(net.model(net.head(x)), tmp_path, per_channel=per_channel)
    assert {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} <= _kinds(model)
    smaller = compress(model).model
    assert_same(model, smaller)
    assert _filters(smaller, "one") == (OPEN, 3)
    assert _filters(smaller, "two") == (OPEN, OPEN)
    assert 6 not in {dim for tensor in smaller.graph.initializer for dim in tensor.dims}


@pytest.mark.parametrize("per_channel", [False, True], ids=["one scale", "a scale a channel"])
@pytest.mark.parametrize("activation", ["QUInt16", "QInt16"])
def test_numbers_of_16_bits_between_float_layers(activation: str, per_channel: bool, tmp_path: Path) -> None:
    """Pairs of com.microsoft around each layer, as for NPUs: the standard ones took no 16 bits before opset 21."""
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    x = net.add(x, net.conv(x, 6, "two"), "sum")
    for layer in ("one", "two"):
        _empty(net, layer)
    model = _quantized(
        net.model(net.head(x)),
        tmp_path,
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=getattr(quantization.QuantType, activation),
        per_channel=per_channel,
        extra_options={"UseQDQContribOps": True},
    )
    pairs = [node.domain for node in model.graph.node if node.op_type.endswith("antizeLinear")]
    assert set(pairs) == {"com.microsoft"}
    smaller = compress(model).model
    assert_same(model, smaller)
    assert _filters(smaller, "one") == (OPEN, 3)
    assert _filters(smaller, "two") == (OPEN, OPEN)


@pytest.mark.parametrize("how", ["Sigmoid", "LeakyRelu", "AveragePool", "Mul"])
def test_what_lies_between_two_layers(how: str, tmp_path: Path) -> None:
    """Behind Sigmoid, closed channels hold a half, which the zero padding of the layer behind does not."""
    net = Net()
    x = net.conv("input", 6, "one")
    _empty(net, "one")
    if how == "AveragePool":
        x = net.node(how, [x], "between", kernel_shape=[3, 3], pads=[1] * 4)
    elif how == "Mul":
        x = net.node(how, [net.node("Sigmoid", [x], "half"), x], "between")
    else:
        x = net.node(how, [x], "between")
    model = _quantized(net.model(net.head(net.conv(x, 5, "two", kernel=1))), tmp_path)
    assert f"QLinear{how}" in _kinds(model)
    smaller = compress(model).model
    assert_same(model, smaller)
    assert _filters(smaller, "two")[1] == OPEN
    assert _filters(smaller, "one")[0] == OPEN


def test_a_mask_that_was_quantised_closes_channels(tmp_path: Path) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    model = _quantized(net.model(net.head(net.conv(x, 5, "two"))), tmp_path)
    assert "QLinearMul" in _kinds(model)
    smaller = compress(model).model
    assert_same(model, smaller)
    assert _filters(smaller, "one")[0] == _filters(smaller, "two")[1] == OPEN


def test_parts_that_are_joined(tmp_path: Path) -> None:
    """One part goes altogether, with its scale and zero point."""
    net = Net()
    parts = [net.conv("input", width, name) for name, width in (("a", 4), ("b", 6), ("c", 5))]
    _empty(net, "a", range(4))
    _empty(net, "b")
    x = net.node("Concat", parts, "cat", axis=1)
    net.width[x] = 15
    model = _quantized(net.model(net.head(net.conv(x, 5, "two"))), tmp_path)
    assert "QLinearConcat" in _kinds(model)
    smaller = compress(model).model
    assert_same(model, smaller)
    assert _filters(smaller, "two")[1] == OPEN + 5
    node = next(node for node in smaller.graph.node if node.op_type == "QLinearConcat")
    assert len(node.input) == 2 + 3 * 2
    assert not any(name.startswith("a_quant") for name in names(smaller))
