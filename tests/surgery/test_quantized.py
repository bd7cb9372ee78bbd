"""Quantised networks: QuantizeLinear and DequantizeLinear around activations, weights and biases."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime import quantization

from polar_deploy.surgery import Surgery
from tests.surgery.graphs import CLOSED, Array, Net, constant, cut, fates, names, operators, weight

OPEN = [0, 2, 3, 5]
LIVE = "kept: it goes together with channels in use, in "


def quantized(
    net: Net, x: str, name: str, scale: Array, zero: Array, *, missing: bool = False, **attributes: Any
) -> str:
    """QuantizeLinear and DequantizeLinear, whose zero point is left out if it is `missing`."""
    parts = [net.constant(f"{name}.scale", scale.astype(np.float32))]
    parts += [] if missing else [net.constant(f"{name}.zero", zero)]
    q = net.node("QuantizeLinear", [x, *parts], f"{name}.q", **attributes)
    return net.node("DequantizeLinear", [q, *parts], f"{name}.dq", **attributes)


def pair(
    scale: float | Sequence[float] = 0.1,
    zero: int | Sequence[int] = 0,
    dtype: Any = np.int8,
    value: float = 0,
    opset: int = 17,
    kernel: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """Conv `one`, a gate, an Add that makes `value` of what is closed, a pair of quantising nodes, Conv `two`."""
    net = Net(opset=opset)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("shift", np.array(value, np.float32))], "value") if value else x
    x = quantized(net, x, "tested", np.array(scale), np.array(zero).astype(dtype), **attributes)
    model = net.model(net.conv(x, 4, "two", kernel=kernel))
    model.ir_version = 10
    return model


def outcome(model: onnx.ModelProto) -> str:
    found = fates(model, cut(model))
    assert [found[i] for i in OPEN] == ["open"] * 4
    (fate,) = {found[i] for i in CLOSED}
    return fate


SIX = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "removed"),
        ({"zero": -128}, "removed"),
        ({"zero": 100}, "removed"),
        ({"zero": 128, "dtype": np.uint8}, "removed"),
        ({"dtype": np.uint8, "missing": True}, "removed"),
        ({"zero": 7, "dtype": np.int16, "opset": 21}, "removed"),
        ({"zero": 65535, "dtype": np.uint16, "opset": 21}, "removed"),
        ({"zero": -3, "dtype": ml_dtypes.int4, "opset": 21}, "removed"),
        ({"zero": 3, "dtype": ml_dtypes.uint4, "opset": 21}, "removed"),
        ({"dtype": ml_dtypes.float8_e4m3fn, "opset": 19}, "removed"),
        ({"dtype": ml_dtypes.float8_e5m2, "opset": 19}, "removed"),
        ({"scale": SIX, "zero": [0, 1, 2, 3, 4, 5], "axis": 1}, "removed"),
        ({"scale": SIX, "zero": [0, -1, 2, -3, 4, -5], "axis": -3}, "removed"),
        ({"scale": [0.1], "zero": [5], "axis": 1}, "removed"),
        # along the height: zero is the same number everywhere where the zero points are, else it is none
        ({"scale": [0.1, 0.2] * 4, "zero": [3] * 8, "axis": 2}, "removed"),
        ({"scale": [0.1, 0.2] * 4, "zero": [3, 4] * 4, "axis": 2}, LIVE + "tested.q"),
    ],
)
def test_zeros_pass(arguments: dict[str, Any], expected: str) -> None:
    """Quantised to the zero point, and dequantised to zero again: they go before padding too."""
    assert outcome(pair(**arguments, kernel=3)) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"value": 0.5}, 0.5),
        ({"value": 0.5, "scale": 0.3}, 0.6),
        ({"value": 0.5, "scale": 0.3, "zero": -7}, 0.6),
        ({"value": -0.04, "zero": 9}, 0.0),
        ({"value": 100}, 12.7),
        ({"value": 100, "zero": 27}, 10.0),
        ({"value": -100, "zero": 27}, -15.5),
        ({"value": -1, "dtype": np.uint8}, 0.0),
        ({"value": 100, "dtype": np.uint8, "zero": 55}, 20.0),
        ({"value": 100, "dtype": ml_dtypes.int4, "opset": 21}, 0.7),
        ({"value": 1234.5, "dtype": np.int16, "opset": 21, "scale": 1, "zero": 1000}, None),
        ({"value": 1234.1, "dtype": np.int16, "opset": 21, "scale": 1, "zero": 1000}, 1234.0),
        ({"value": 1.7, "scale": 1, "dtype": ml_dtypes.float8_e4m3fn, "opset": 19}, 1.75),
        ({"value": 1e6, "scale": 1, "dtype": ml_dtypes.float8_e4m3fn, "opset": 19}, None),
        # between two integers runtimes may differ, and so may the constant that comes in
        ({"value": 0.25}, None),
        ({"value": 0.45, "scale": 0.3}, None),
    ],
)
def test_other_constants_are_rounded_as_the_operator_does(arguments: dict[str, Any], expected: float | None) -> None:
    model = pair(**arguments)
    surgery = cut(model)
    if expected is None:
        assert fates(model, surgery)[1] == LIVE + "tested.q"
        return
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[1] == 4
    moved = expected * weight(model, "two")[:, CLOSED, 0, 0].sum(axis=1)
    np.testing.assert_allclose(weight(surgery.model, "two", 2), weight(model, "two", 2) + moved, rtol=1e-5, atol=1e-6)


def test_scales_and_zero_points_are_cut() -> None:
    model = pair(SIX, [0, 1, 2, 3, 4, 5], axis=1)
    smaller = cut(model).model
    np.testing.assert_array_equal(constant(smaller, "tested.scale"), np.array(SIX, np.float32)[OPEN])
    np.testing.assert_array_equal(constant(smaller, "tested.zero"), np.array(OPEN, np.int8))


def test_a_scale_along_another_axis_stays() -> None:
    smaller = cut(pair([0.1, 0.2] * 4, [3] * 8, axis=2)).model
    assert constant(smaller, "tested.scale").shape == constant(smaller, "tested.zero").shape == (8,)


def test_between_the_two_facts_are_about_integers() -> None:
    """A closed channel is the zero point there: MaxPool hands it on, and a Cast makes the number 3 of it."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    parts = [net.constant("s", np.array(0.1, np.float32)), net.constant("z", np.array(3, np.int8))]
    q = net.node("MaxPool", [net.node("QuantizeLinear", [x, *parts], "q")], "pool", kernel_shape=[2, 2])
    y = net.conv(net.node("DequantizeLinear", [q, *parts], "dq"), 4, "two")
    z = net.conv(net.node("Cast", [q], "numbers", to=1), 4, "three", kernel=1)
    model = net.model(net.add(y, z, "sum"))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 4
    np.testing.assert_array_equal(weight(surgery.model, "two", 2), weight(model, "two", 2))
    moved = 3 * weight(model, "three")[:, CLOSED, 0, 0].sum(axis=1)
    np.testing.assert_allclose(weight(surgery.model, "three", 2), weight(model, "three", 2) + moved, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "zero", "goes"),
    [(np.int8, -128, True), (np.int8, 0, False), (np.uint8, 0, True), (np.uint8, 1, False)],
)
def test_a_relu_behind_numbers_that_cannot_be_negative_goes(dtype: type, zero: int, goes: bool) -> None:
    net = Net()
    x = quantized(net, net.conv("input", 6, "one"), "tested", np.array(0.1), np.array(zero, dtype))
    model = net.model(net.conv(net.relu(x, "act"), 4, "two"))
    assert ("act" not in names(cut(model).model)) == goes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("blocks", "it is quantised in blocks"),
        ("computed scale", "its scale is computed"),
        ("computed zero point", "its zero point is computed"),
    ],
)
def test_walls(change: str, reason: str) -> None:
    net = Net(opset=21)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    net.inputs = [helper.make_tensor_value_info("input", 1, [1, 3, 8, 8])]
    scale = np.full((1, 6, 4, 8) if change == "blocks" else (), 0.1, np.float32)
    parts = [net.constant("s", scale), net.constant("z", np.zeros(scale.shape, np.int8))]
    attributes = {"axis": 2, "block_size": 2} if change == "blocks" else {}
    if change != "blocks":
        largest = net.node("ReduceMax", [net.node("Abs", ["input"], "size")], "largest", keepdims=0)
        at, computed = (0, largest) if change == "computed scale" else (1, net.node("Cast", [largest], "whole", to=3))
        parts[at] = computed
    q = net.node("QuantizeLinear", [x, *parts], "tested", **attributes)
    out = net.node("DequantizeLinear", [q, *parts], "back", **attributes)
    net.width[out] = 6
    model = net.model(out)
    model.ir_version = 10
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["unsupported"][0] == {"node": "tested", "operator": "QuantizeLinear", "reason": reason}


# Weights


def stored(net: Net, name: str, shape: Sequence[int], axis: int | None = None, dtype: Any = np.int8) -> str:
    """A weight of random integers behind a DequantizeLinear."""
    size = 1 if axis is None else shape[axis]
    scale = net.random.uniform(0.01, 0.02, size).astype(np.float32)
    zero = net.random.integers(-5, 5, size).astype(dtype) if dtype == np.int8 else np.zeros(size, dtype)
    low, high = (-7, 8) if dtype == ml_dtypes.int4 else (-90, 90)
    values = net.random.integers(low, high, shape).astype(dtype)
    along = {} if axis is None else {"axis": axis}
    if axis is None:
        scale, zero = scale.reshape(()), zero.reshape(())
    parts = [net.constant(f"{name}.scale", scale), net.constant(f"{name}.zero", zero)]
    return net.node("DequantizeLinear", [net.constant(f"{name}.stored", values), *parts], f"{name}.dq", **along)


def real(model: onnx.ModelProto, name: str, axis: int | None = None) -> Array:
    """What the integers of `stored` mean."""
    values, scale, zero = (constant(model, f"{name}.{part}").astype(np.float64) for part in ("stored", "scale", "zero"))
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    return (values - zero.reshape(shape)) * scale.reshape(shape)


LAYERS: dict[str, tuple[str, tuple[int, ...], int, int, dict[str, Any]]] = {  # weight, axes of inputs and outputs
    "Conv": ("Conv", (4, 6, 3, 3), 1, 0, {"pads": [1, 1, 1, 1]}),
    "ConvTranspose": ("ConvTranspose", (6, 4, 2, 2), 0, 1, {"strides": [2, 2]}),
    "Gemm": ("Gemm", (6, 4), 0, 1, {}),
    "Gemm transB": ("Gemm", (4, 6), 1, 0, {"transB": 1, "alpha": 0.5}),
    "MatMul": ("MatMul", (6, 4), 0, 1, {}),
}


def quantized_layer(
    kind: str, axis: int | None, dtype: Any = np.int8, value: float = 0, bias: str = ""
) -> onnx.ModelProto:
    """Layer `one`, a gate, the quantised layer `two`, a gate on its channel 2, layer `three`."""
    operator, shape, _, _, attributes = LAYERS[kind]
    conv = operator.startswith("Conv")
    net = Net(opset=21)
    x = net.conv("input", 6, "one")
    if not conv:
        x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "pool")], "flat")
    x = net.gate(x, CLOSED, "gate", shape="1c11" if conv else "1c")
    x = net.node("Add", [x, net.constant("shift", np.array(value, np.float32))], "value") if value else x
    inputs = [x, stored(net, "w", shape, axis, dtype)]
    if bias == "float":
        inputs.append(net.constant("b", net.random.standard_normal(4).astype(np.float32)))
    if bias == "int32":
        parts = [net.constant("b.stored", net.random.integers(-999, 999, 4).astype(np.int32))]
        inputs.append(
            net.node("DequantizeLinear", [*parts, net.constant("b.scale", np.full(4, 0.001, np.float32))], "b", axis=0)
        )
    net.node(operator, inputs, "two", **attributes)
    net.width["two"] = 4
    x = net.gate("two", [2], "gate2", shape="1c11" if conv else "1c")
    model = net.model(
        net.conv(x, 3, "three", kernel=1) if conv else net.gemm(x, 4, 3, "three"), ranks=[4 if conv else 2]
    )
    model.ir_version = 10
    return model


@pytest.mark.parametrize("along", ["tensor", "outputs"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_quantized_weights_are_cut(kind: str, along: str) -> None:
    """Integers by index; the DequantizeLinear stays, and no report tells of it."""
    _, _, into, out, _ = LAYERS[kind]
    axis = out if along == "outputs" else None
    model = quantized_layer(kind, axis)
    surgery = cut(model)
    rows = [0, 1, 3]
    expected = constant(model, "w.stored").take(OPEN, axis=into).take(rows, axis=out)
    np.testing.assert_array_equal(constant(surgery.model, "w.stored"), expected)
    for part in ("w.scale", "w.zero"):
        before = constant(model, part)
        np.testing.assert_array_equal(constant(surgery.model, part), before[rows] if before.ndim else before)
    assert weight(surgery.model, "one").shape[0] == 4
    assert surgery.report["unsupported"] == surgery.report["cuts_not_made"] == []
    assert operators(surgery.model)["DequantizeLinear"] == 1


def turned(model: onnx.ModelProto, *, told: bool = True) -> list[int]:
    """Stores the weight of a `quantized_layer` in another order of axes, behind a Transpose, and returns that.

    told: the last axis is stored first; else axes are reversed, which a Transpose does that is told nothing.
    """
    held = next(tensor for tensor in model.graph.initializer if tensor.name == "w.stored")
    values, dequantize = constant(model, "w.stored"), next(node for node in model.graph.node if node.name == "w.dq")
    rank = values.ndim
    order = [*range(1, rank), 0] if told else [*range(rank)][::-1]  # where each axis of the weight is stored
    held.CopyFrom(onnx.numpy_helper.from_array(values.transpose(np.argsort(order)).copy(), "w.stored"))
    for attribute in dequantize.attribute:
        attribute.i = order[attribute.i]
    layer = next(node for node in model.graph.node if node.name == "two")
    layer.input[1] = "w.turned"
    node = helper.make_node("Transpose", ["w.dq"], ["w.turned"], "w.turned", **({"perm": order} if told else {}))
    model.graph.node.insert(list(model.graph.node).index(layer), node)
    return order


@pytest.mark.parametrize("along", ["tensor", "outputs"])
@pytest.mark.parametrize("told", [True, False], ids=["perm", "reversed"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_quantized_weights_behind_a_transpose_are_cut(kind: str, told: bool, along: str) -> None:
    """As NVIDIA's toolkits write nn.Linear."""
    _, _, into, out, _ = LAYERS[kind]
    model = quantized_layer(kind, out if along == "outputs" else None)
    rows, weights = [0, 1, 3], constant(model, "w.stored")
    order = turned(model, told=told)
    surgery = cut(model)
    expected = weights.take(OPEN, axis=into).take(rows, axis=out).transpose(np.argsort(order))
    np.testing.assert_array_equal(constant(surgery.model, "w.stored"), expected)
    for part in ("w.scale", "w.zero"):
        before = constant(model, part)
        np.testing.assert_array_equal(constant(surgery.model, part), before[rows] if before.ndim else before)
    assert weight(surgery.model, "one").shape[0] == 4
    assert surgery.report["unsupported"] == surgery.report["cuts_not_made"] == []
    assert operators(surgery.model)["Transpose"] == 1


@pytest.mark.parametrize("kind", ["Gemm", "Gemm transB", "MatMul"])
def test_a_constant_before_a_quantized_weight_behind_a_transpose(kind: str) -> None:
    """It moves into the bias where there is one; the oracle looks at the rest."""
    model = quantized_layer(kind, LAYERS[kind][3], value=0.5)
    turned(model)
    assert weight(cut(model).model, "one").shape[0] == (6 if kind == "MatMul" else 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("another axis", "its weight is quantised along another axis than that of its outputs"),
        ("two readers", "its dequantised weight is shared"),
        ("two turned", "its dequantised weight is shared"),
    ],
)
def test_walls_of_weights_behind_a_transpose(change: str, reason: str) -> None:
    model = quantized_layer("MatMul", 0 if change == "another axis" else 1)
    turned(model)
    if change != "another axis":
        read = "w.dq" if change == "two readers" else "w.turned"
        model.graph.node.append(helper.make_node("Identity", [read], ["weights"], "weights"))
        shape = (4, 6) if change == "two readers" else (6, 4)
        model.graph.output.append(helper.make_tensor_value_info("weights", 1, shape))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 6
    assert {"node": "two", "operator": "MatMul", "reason": reason} in surgery.report["unsupported"]


def test_a_sum_with_a_quantised_constant_behind_a_transpose() -> None:
    """It is no weight: the channels that it is added to stay, and the gate behind folds all the same."""
    net = Net()
    net.inputs = [onnx.helper.make_tensor_value_info("input", 1, ["batch", 8, 5])]
    held = net.node("Transpose", [stored(net, "w", (6, 8))], "turned", perm=[1, 0])
    x = net.node("Add", [net.linear("input", 5, 6, "one"), held], "sum")
    gate = net.constant("factor", np.array([1, 0, 1, 1, 0, 1], np.float32))
    net.linear(net.node("Mul", [x, gate], "gate"), 6, 3, "two")
    net.width["two.sum"] = 8
    surgery = cut(net.model("two.sum", ranks=[3]))
    assert "gate" not in names(surgery.model)
    assert weight(surgery.model, "one").shape == (5, 6)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_types_of_weights(dtype: Any) -> None:
    if dtype == np.uint8:
        model = quantized_layer("Gemm", 1, np.int8)
        for tensor in model.graph.initializer:
            if tensor.name in ("w.stored", "w.zero"):
                values = constant(model, tensor.name).astype(np.int16) + 128
                tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.uint8), tensor.name))
    else:
        model = quantized_layer("Gemm", 1, dtype)
    smaller = cut(model).model
    found = constant(smaller, "w.stored")
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, constant(model, "w.stored")[OPEN][:, [0, 1, 3]])


@pytest.mark.parametrize(
    ("kind", "bias", "expected"),
    [
        ("Gemm", "float", "moves"),
        ("Gemm", "", "moves"),
        ("Gemm transB", "float", "moves"),
        ("Gemm", "int32", "the constant 0.5 meets a quantised bias"),
        ("Conv", "float", "the constant 0.5 meets the zero padding"),
        ("Conv", "int32", "the constant 0.5 meets a quantised bias"),
        ("MatMul", "", "the constant 0.5 meets an operator without a bias"),
    ],
)
@pytest.mark.parametrize("along", ["tensor", "outputs"])
def test_constants_before_quantized_weights(kind: str, bias: str, expected: str, along: str) -> None:
    """A bias of floating-point numbers takes up what the integers mean; one of integers would round it."""
    _, _, into, out, attributes = LAYERS[kind]
    axis = out if along == "outputs" else None
    model = quantized_layer(kind, axis, value=0.5, bias=bias)
    surgery = cut(model)
    if expected != "moves":
        assert [entry["reason"] for entry in surgery.report["cuts_not_made"]] == [expected]
        assert weight(surgery.model, "one").shape[0] == 6
        return
    assert weight(surgery.model, "one").shape[0] == 4
    moved = 0.5 * attributes.get("alpha", 1) * real(model, "w", axis).take(CLOSED, axis=into).sum(axis=into)
    before = weight(model, "two", 2) if bias else 0
    np.testing.assert_allclose(weight(surgery.model, "two", 2), (before + moved)[[0, 1, 3]], rtol=1e-5)


def test_integer_biases_are_cut_with_their_scales() -> None:
    model = quantized_layer("Conv", 0, bias="int32")
    smaller = cut(model).model
    np.testing.assert_array_equal(constant(smaller, "b.stored"), constant(model, "b.stored")[[0, 1, 3]])
    assert constant(smaller, "b.scale").shape == (3,)


def test_emptied_filters_hold_their_zero_points() -> None:
    """Channel 1 of `two` is closed in one of two branches that are added: it stays in both."""
    net = Net()
    x = net.conv("input", 6, "one")
    bias = net.node(
        "DequantizeLinear",
        [
            net.constant("b.stored", np.array([5, 6, 7, 8], np.int32)),
            net.constant("b.scale", np.array(0.1, np.float32)),
        ],
        "b",
    )
    net.node("Conv", [x, stored(net, "w", (4, 6, 1, 1), 0), bias], "two")
    net.width["two"] = 4
    y = net.gate("two", [1], "gate")
    model = net.model(net.conv(net.add(y, net.conv("input", 4, "other"), "sum"), 3, "three"))
    smaller = cut(model).model
    found = constant(smaller, "w.stored")
    assert (found[1] == constant(model, "w.zero")[1]).all()
    np.testing.assert_array_equal(found[[0, 2, 3]], constant(model, "w.stored")[[0, 2, 3]])
    assert constant(smaller, "b.stored").tolist() == [5, 0, 7, 8]
    assert "gate" not in names(smaller)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("another axis", "its weight is quantised along another axis than that of its outputs"),
        ("two readers", "its dequantised weight is shared"),
        ("an output", "its dequantised weight is shared"),
        ("blocks", "it is quantised in blocks"),
        ("computed scale", "its scale is computed"),
        ("groups", "its groups share the scales of the weight"),
        ("one bias", "its quantised bias is one number for all"),
    ],
)
def test_walls_of_quantized_weights(change: str, reason: str) -> None:
    net = Net(opset=21)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    operator, attributes = "Conv", {}
    tensors = [x, stored(net, "w", (4, 6, 1, 1), 1 if change == "another axis" else 0)]
    outputs = []
    if change == "two readers":
        net.node("Conv", [net.conv("input", 6, "side"), tensors[1]], "reader")
        net.width["reader"] = 4
        outputs = ["reader"]
    if change == "an output":
        net.width["w.dq"], outputs = 6, ["w.dq"]
    if change == "blocks":
        scale = net.constant("blocks", np.full((4, 3, 1, 1), 0.01, np.float32))
        tensors[1] = net.node("DequantizeLinear", ["w.stored", scale], "blocked", axis=1, block_size=2)
    if change == "computed scale":
        largest = net.node("ReduceMax", [net.node("Abs", ["input"], "size")], "largest", keepdims=0)
        tensors[1] = net.node("DequantizeLinear", ["w.stored", largest], "scaled")
    if change == "groups":
        operator, attributes = "ConvTranspose", {"group": 2}
        tensors[1] = stored(net, "t", (6, 2, 1, 1), 1)
    if change == "one bias":
        operator = "Gemm"
        x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "pool")], "flat")
        one = [net.constant("b.stored", np.array([7], np.int32)), net.constant("b.scale", np.array(0.1, np.float32))]
        tensors = [x, stored(net, "g", (6, 4), 1), net.node("DequantizeLinear", one, "b")]
    net.node(operator, tensors, "two", **attributes)
    net.width["two"] = 4
    model = net.model("two", *outputs, ranks=[2 if change == "one bias" else 4] * (1 + len(outputs)))
    model.ir_version = 10
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 6
    assert {"node": "two", "operator": operator, "reason": reason} in surgery.report["unsupported"]


def test_a_shared_initializer_is_copied_where_cuts_differ() -> None:
    """Two DequantizeLinear of one initializer: each layer is cut for itself."""
    net = Net()
    outputs = []
    for name, closed in (("a", [1, 4]), ("b", [2])):
        x = net.gate(net.conv("input", 6, f"{name}.one"), closed, f"{name}.gate")
        if name == "a":
            stored(net, "w", (4, 6, 1, 1), 0)
        else:
            net.node("DequantizeLinear", ["w.stored", "w.scale", "w.zero"], "b.dq", axis=0)
        net.node("Conv", [x, "w.dq" if name == "a" else "b.dq"], f"{name}.two")
        net.width[f"{name}.two"] = 4
        outputs.append(f"{name}.two")
    model = net.model(*outputs)
    smaller = cut(model).model
    shapes = {
        node.name: constant(smaller, node.input[0]).shape
        for node in smaller.graph.node
        if node.op_type == "DequantizeLinear"
    }
    assert shapes == {"w.dq": (4, 4, 1, 1), "b.dq": (4, 5, 1, 1)}


def test_constants_that_are_no_weights_have_channels() -> None:
    """A quantised gate closes, and a quantised bias of an Add is cut with its channels."""
    net = Net()
    parts = [net.constant("s", np.array(0.01, np.float32)), net.constant("z", np.array(-28, np.int8))]
    factor = np.full((1, 6, 1, 1), 72, np.int8)
    factor[0, list(CLOSED)] = -28
    gate = net.node("DequantizeLinear", [net.constant("factor", factor), *parts], "factor.dq")
    x = net.node("Mul", [net.conv("input", 6, "one"), gate], "gate")
    bias = [net.constant("bias", np.arange(6, dtype=np.int8).reshape(6, 1, 1) - 28), *parts]
    shifted = net.node("Add", [net.conv("input", 6, "other"), net.node("DequantizeLinear", bias, "bias.dq")], "shifted")
    both = net.node("Mul", [x, net.node("Sigmoid", [shifted], "strength")], "both")
    model = net.model(net.conv(both, 4, "two"))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "other").shape[0] == 4
    assert weight(surgery.model, "two").shape[1] == 4
    assert operators(surgery.model)["Mul"] == 1
    assert surgery.report["unsupported"] == []


# What quantize_static makes of a small gated network


class Images(quantization.CalibrationDataReader):
    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.rest = iter([{"input": random.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(4)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.rest, None)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain, transposed and grouped convolutions, MatMul with its Add, Gemm; a gate behind every activation."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act1"), [1, 4, 5], "gate1")
    up = [net.constant("up.weight", net.random.standard_normal((8, 6, 2, 2)).astype(np.float32))]
    up.append(net.constant("up.bias", net.random.standard_normal(6).astype(np.float32)))
    net.node("ConvTranspose", [x, *up], "up", strides=[2, 2])
    net.width["up"] = 6
    x = net.gate(net.relu("up", "act2"), [2, 3], "gate2")
    x = net.gate(net.relu(net.conv(x, 12, "grouped", group=3), "act3"), [0, 1, 4, 5, 8, 9, 11], "gate3")
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "pool")], "flat")
    net.node("MatMul", [x, net.constant("fc.weight", net.random.standard_normal((12, 7)).astype(np.float32))], "fc")
    net.width["fc"] = 7
    x = net.node("Add", ["fc", net.constant("fc.bias", net.random.standard_normal(7).astype(np.float32))], "fc.add")
    x = net.gate(net.relu(x, "act4"), [1, 6], "gate4", shape="1c")
    path = tmp_path_factory.mktemp("quantized") / "gated.onnx"
    onnx.save(net.model(net.gemm(x, 7, 5, "logits")), path)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        {"per_channel": False, "activation_type": quantization.QuantType.QUInt8},
        {"per_channel": True, "extra_options": {"ActivationSymmetric": True, "QuantizeBias": False}},
        {"per_channel": True, "extra_options": {"AddQDQPairToWeight": True}},
    ],
)
def test_networks_from_quantize_static(gated: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every closed channel goes; the third group is as full as the first, the second one channel emptier."""
    monkeypatch.setattr(logging.getLogger(), "disabled", True)  # it asks for pre-processing
    target = gated.with_name("quantized.onnx")
    quantization.quantize_static(gated, target, Images(), quant_format=quantization.QuantFormat.QDQ, **arguments)
    model = onnx.load(target)
    surgery = cut(model)
    assert surgery.report["unsupported"] == []
    assert surgery.report["difference"] == 0
    assert [entry["reason"] for entry in surgery.report["cuts_not_made"]] == [
        "every group keeps as many channels as the fullest one"
    ]
    assert "Mul" not in operators(surgery.model)
    shapes = {
        "one": (5, 3, 3, 3), "up": (5, 4, 2, 2), "grouped": (4, 2, 3, 3), "fc": (4, 5), "logits": (5, 5)
    }  # fmt: skip
    assert {name: shape_of_weight(surgery, name) for name in shapes} == shapes


def shape_of_weight(surgery: Surgery, name: str) -> tuple[int, ...]:
    """Shape of what is stored for the weight of a layer."""
    makers = {output: node for node in surgery.model.graph.node for output in node.output}
    tensor = next(node.input[1] for node in surgery.model.graph.node if node.name == name)
    while tensor in makers:
        tensor = makers[tensor].input[0]
    return constant(surgery.model, tensor).shape
