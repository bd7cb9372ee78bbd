"""QLinearConv, QLinearMatMul, ConvInteger and MatMulInteger, and DynamicQuantizeLinear before the last two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime import quantization

from polar_deploy.surgery import Surgery, compress
from tests.surgery.graphs import CLOSED, Net, constant, cut, names, operators, weight
from tests.surgery.test_linear import closed, finished, matrix, product, tokens

OPEN = [0, 2, 3, 5]
ROWS = [0, 1, 3]  # of four filters, the third of which a gate closes


def scalar(net: Net, name: str, value: float, dtype: type = np.float32) -> str:
    return net.constant(name, np.array(value, dtype))


def integers(net: Net, name: str, *shape: int, dtype: type = np.int8) -> str:
    return net.constant(name, net.random.integers(-50, 50, shape).astype(dtype))


def before(value: float = 0, *, flat: bool = False) -> tuple[Net, list[str]]:
    """Conv `one`, a gate that closes CLOSED, an Add that makes `value` of it, QuantizeLinear to unsigned numbers."""
    net = Net()
    x = net.conv("input", 6, "one")
    if flat:
        x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "pool")], "flat")
    x = net.gate(x, CLOSED, "gate", shape="1c" if flat else "1c11")
    x = net.node("Add", [x, scalar(net, "shift", value)], "value") if value else x
    parts = [scalar(net, "x.scale", 0.05), scalar(net, "x.zero", 100, np.uint8)]
    return net, [net.node("QuantizeLinear", [x, *parts], "x"), *parts]


def after(net: Net, x: str, *, flat: bool = False) -> onnx.ModelProto:
    """A gate that closes channel 2 of 4, and a layer `three`."""
    net.width[x] = 4
    x = net.gate(x, [2], "gate2", shape="1c" if flat else "1c11")
    return net.model(net.gemm(x, 4, 3, "three") if flat else net.conv(x, 3, "three"), ranks=[2 if flat else 4])


def dequantized(net: Net, x: str) -> str:
    return net.node("DequantizeLinear", [x, "y.scale", "y.zero"], "y.dq")


def quantized_weight(net: Net, *shape: int, along: bool) -> list[str]:
    """A weight, its scale and zero point, one for all or one an output."""
    size = (4,) if along else ()
    scale = net.constant("w.scale", net.random.uniform(0.01, 0.02, size).astype(np.float32))
    zero = net.constant("w.zero", np.zeros(size, np.int8) if along else np.array(3, np.int8))
    return [integers(net, "w", *shape), scale, zero]


def conv_net(
    value: float = 0, *, along: bool = True, bias: bool = True, scale: float = 0.5, **attributes: Any
) -> onnx.ModelProto:
    """A QLinearConv between two layers of floating-point numbers."""
    net, x = before(value)
    kernel = 3 if "pads" in attributes else 1
    group = attributes.get("group", 1)
    tensors = [*x, *quantized_weight(net, 4, 6 // group, kernel, kernel, along=along)]
    tensors += [scalar(net, "y.scale", scale), scalar(net, "y.zero", 90, np.uint8)]
    tensors += [net.constant("b", net.random.integers(-2000, 2000, 4).astype(np.int32))] if bias else []
    return after(net, dequantized(net, net.node("QLinearConv", tensors, "two", **attributes)))


def matmul_net(value: float = 0, *, along: bool = True) -> onnx.ModelProto:
    net, x = before(value, flat=True)
    tensors = [*x, *quantized_weight(net, 6, 4, along=along)]
    tensors += [scalar(net, "y.scale", 0.5), scalar(net, "y.zero", 90, np.uint8)]
    return after(net, dequantized(net, net.node("QLinearMatMul", tensors, "two")), flat=True)


def sums_net(value: float = 0, *, product: bool, along: bool = False, zeros: bool = True) -> onnx.ModelProto:
    """ConvInteger or MatMulInteger, whose sums are cast and scaled."""
    net, x = before(value, flat=product)
    w = integers(net, "w", *((6, 4) if product else (4, 6, 3, 3)))
    zero = net.constant("w.zero", np.array([1, 2, 3, 4] if along else 2, np.int8))
    tensors = [x[0], w, x[2], zero] if zeros else [x[0], w, x[2]]
    x = [
        net.node("MatMulInteger", tensors, "two") if product else net.node("ConvInteger", tensors, "two", pads=[1] * 4)
    ]
    scaled = net.node("Mul", [net.node("Cast", x, "cast", to=1), scalar(net, "scale", 0.01)], "scaled")
    return after(net, scaled, flat=product)


def reasons(surgery: Surgery) -> list[str]:
    return [entry["reason"] for entry in surgery.report["cuts_not_made"]]


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("attributes", [{}, {"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}])
def test_closed_channels_of_a_quantized_convolution(along: bool, attributes: dict[str, Any]) -> None:
    """They hold the zero point, which adds nothing, as padding does not."""
    model = conv_net(along=along, **attributes)
    surgery = cut(model)
    np.testing.assert_array_equal(constant(surgery.model, "w"), constant(model, "w")[ROWS][:, OPEN])
    np.testing.assert_array_equal(constant(surgery.model, "b"), constant(model, "b")[ROWS])
    assert (
        constant(surgery.model, "w.scale").shape == constant(surgery.model, "w.zero").shape == ((3,) if along else ())
    )
    assert weight(surgery.model, "one").shape[0] == 4
    assert surgery.report["unsupported"] == reasons(surgery) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("along", [False, True])
def test_constants_move_into_a_bias_of_integers(along: bool, bias: bool) -> None:
    """0.5 is 10 above the zero point: exactly that many times the weights."""
    model = conv_net(0.5, along=along, bias=bias)
    smaller = cut(model).model
    zero = constant(model, "w.zero").astype(int).reshape(-1, 1)
    moved = 10 * (constant(model, "w").astype(int)[:, CLOSED, 0, 0] - zero).sum(axis=1)
    found = weight(smaller, "two", 8)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, ((constant(model, "b") if bias else 0) + moved)[ROWS])
    assert constant(smaller, "w").shape == (3, 4, 1, 1)


def test_constants_meet_padding_there_too() -> None:
    surgery = cut(conv_net(0.5, pads=[1, 1, 1, 1]))
    assert weight(surgery.model, "one").shape[0] == 6
    assert reasons(surgery) == ["the constant 110 meets the zero padding"]


def test_groups_of_a_quantized_convolution() -> None:
    """Groups of 3 inputs and 2 filters, of which one of each is closed."""
    model = conv_net(group=2)
    surgery = cut(model)
    expected = np.array(constant(model, "w")[:, [0, 2]])
    expected[2] = 0  # its zero point: the filter fills a place
    np.testing.assert_array_equal(constant(surgery.model, "w"), expected)
    assert reasons(surgery) == ["every group keeps as many channels as the fullest one"]


@pytest.mark.parametrize(
    ("bias", "expected"),
    [([0] * 4, 90), ([100] * 4, 91), ([10**7] * 4, 255), ([50] * 4, None)],
)
def test_filters_of_zero_points_give_a_constant(bias: list[int], expected: int | None) -> None:
    """It is rounded as the operator does, unless that is too close to call; the next layer takes it up."""
    net, x = before()
    tensors = [*x, net.constant("w", np.full((4, 6, 1, 1), 3, np.int8)), scalar(net, "w.scale", 0.1)]
    tensors += [scalar(net, "w.zero", 3, np.int8), scalar(net, "y.scale", 0.5), scalar(net, "y.zero", 90, np.uint8)]
    values = net.random.integers(-50, 50, (4, 6, 1, 1)).astype(np.int8)
    values[2] = 3
    net.constants[[t.name for t in net.constants].index("w")].CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    x = [dequantized(net, net.node("QLinearConv", [*tensors, net.constant("b", np.array(bias, np.int32))], "two"))]
    net.width[x[0]] = 4
    model = net.model(net.conv(x[0], 3, "three", kernel=1))
    surgery = cut(model)
    assert constant(surgery.model, "w").shape == (4 if expected is None else 3, 4, 1, 1)
    if expected is not None:
        moved = 0.5 * (expected - 90) * weight(model, "three")[:, 2, 0, 0]
        np.testing.assert_allclose(weight(surgery.model, "three", 2), weight(model, "three", 2) + moved, rtol=1e-5)


def test_emptied_filters_hold_their_zero_points() -> None:
    """The output of the graph shows channel 2, which has to stay; the filter closes it, and the gate goes."""
    model = conv_net(along=False)
    model.graph.output.append(onnx.helper.make_tensor_value_info("gate2", 1, ["batch", 4, 8, 8]))
    smaller = cut(model).model
    assert constant(smaller, "w").shape == (4, 4, 1, 1)
    assert (constant(smaller, "w")[2] == 3).all()
    assert constant(smaller, "b")[2] == 0
    assert "gate2" not in names(smaller)


@pytest.mark.parametrize("along", [False, True])
def test_closed_channels_of_a_quantized_product(along: bool) -> None:
    model = matmul_net(along=along)
    surgery = cut(model)
    np.testing.assert_array_equal(constant(surgery.model, "w"), constant(model, "w")[OPEN][:, ROWS])
    assert (
        constant(surgery.model, "w.scale").shape == constant(surgery.model, "w.zero").shape == ((3,) if along else ())
    )
    assert surgery.report["unsupported"] == reasons(surgery) == []


def test_a_quantized_product_takes_no_constant() -> None:
    surgery = cut(matmul_net(0.5))
    assert constant(surgery.model, "w").shape == (6, 3)
    assert reasons(surgery) == ["the constant 110 meets an operator without a bias"]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("product", [False, True])
def test_closed_channels_of_integer_layers(product: bool, zeros: bool) -> None:
    model = sums_net(product=product, zeros=zeros)
    surgery = cut(model)
    expected = constant(model, "w")[OPEN][:, ROWS] if product else constant(model, "w")[ROWS][:, OPEN]
    np.testing.assert_array_equal(constant(surgery.model, "w"), expected)
    assert surgery.report["unsupported"] == reasons(surgery) == []


def test_zero_points_of_the_columns_of_a_product() -> None:
    smaller = cut(sums_net(product=True, along=True)).model
    assert constant(smaller, "w.zero").tolist() == [1, 2, 4]


@pytest.mark.parametrize("product", [False, True])
def test_integer_layers_take_no_constant(product: bool) -> None:
    surgery = cut(sums_net(0.5, product=product))
    assert weight(surgery.model, "one").shape[0] == 6
    assert reasons(surgery) == ["the constant 110 meets an operator without a bias"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("rows", "it is quantised row by row"),
        ("stack", "it is quantised in blocks"),
        ("computed", "both of its factors are computed, and their channels are not those of attention heads"),
        ("zero point", "its zero point is computed"),
    ],
)
def test_walls(change: str, reason: str) -> None:
    net, x = before(flat=True)
    zero = net.constant("rows", np.full(6, 100, np.uint8)) if change == "rows" else x[2]
    w = integers(net, "w", 6, 4)
    if change == "computed":
        w = net.node("Cast", [x[0]], "w.now", to=3)
    if change == "zero point":
        zero = net.node("ReduceMax", [x[0]], "zero.now", keepdims=0)
    zeros = [net.constant("zeros", np.ones((2, 1, 4), np.int8))] if change == "stack" else []
    w = integers(net, "stack", 2, 6, 4) if change == "stack" else w
    net.node("MatMulInteger", [x[0], w, zero, *zeros], "two")
    model = finished(net, net.node("Cast", ["two"], "cast", to=1), rank=3 if change == "stack" else 2)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 6
    surgery = compress(model, verify=False)  # ONNX Runtime knows no zero points by rows
    assert weight(surgery.model, "one").shape[0] == 6
    assert {"node": "two", "operator": "MatMulInteger", "reason": reason} in surgery.report["unsupported"]


# Dynamic quantisation


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """What quantize_dynamic makes of a gated perceptron."""
    net = tokens(7, 8)
    x = closed(net, net.node("Relu", [product(net, "input", matrix(net, "u", 8, 6), "up", 6)], "act"), CLOSED)
    x = product(net, x, matrix(net, "d", 6, 3), "down", 3)
    path = tmp_path_factory.mktemp("dynamic") / "gated.onnx"
    onnx.save(finished(net, x), path)
    target = Path(path).with_name("dynamic.onnx")
    quantization.quantize_dynamic(path, target)
    return onnx.load(target)


def test_zeros_do_not_change_a_dynamic_range(dynamic: onnx.ModelProto) -> None:
    assert operators(dynamic)["DynamicQuantizeLinear"] == 2
    surgery = cut(dynamic)
    assert constant(surgery.model, "u_quantized").shape == (8, 4)
    assert constant(surgery.model, "up.b").shape == (4,)
    assert constant(surgery.model, "d_quantized").shape == (4, 3)
    assert surgery.report["difference"] == 0
    assert surgery.report["unsupported"] == reasons(surgery) == []


def dynamic_net(value: float = 0, *, unread: bool = False, kept: bool = False, read: bool = False) -> onnx.ModelProto:
    """Layer `one`, a gate and a constant, DynamicQuantizeLinear, a MatMulInteger.

    unread: its weights for channel 0 are zero; kept: another reader wants all channels of `one`; read: one of the
    quantised integers.
    """
    net = tokens(7, 8)
    x = net.node("Relu", [product(net, "input", matrix(net, "u", 8, 6), "one", 6)], "act")
    net.width[x] = 6
    x = closed(net, x, CLOSED, value)
    net.node("DynamicQuantizeLinear", [x], "q")
    net.nodes[-1].output.extend(["q.scale", "q.zero"])
    weights = net.random.integers(-50, 50, (6, 3)).astype(np.int8)
    weights[0] = 0 if unread else weights[0]
    y = net.node("MatMulInteger", ["q", net.constant("w", weights), "q.zero"], "two")
    y = net.node("Mul", [net.node("Cast", [y], "cast", to=1), "q.scale"], "scaled")
    outputs = [y]
    if kept:
        outputs.append(net.node("MatMul", ["act", matrix(net, "v", 6, 2)], "other"))
    if read:
        outputs.append(net.node("Cast", ["q"], "numbers", to=1))
    return finished(net, *outputs)


def test_a_channel_that_nobody_reads_counts_in_a_dynamic_range() -> None:
    surgery = cut(dynamic_net(unread=True))
    assert constant(surgery.model, "u").shape == (8, 4)
    assert constant(surgery.model, "w").shape == (4, 3)


def test_constants_count_in_a_dynamic_range() -> None:
    surgery = cut(dynamic_net(0.5))
    assert constant(surgery.model, "u").shape == (8, 6)
    assert reasons(surgery) == ["its range depends on every channel that is not zero"]


def test_zeros_that_stay_in_a_dynamic_range_stay_zero() -> None:
    """A gate that does not go has to close: opened, it would let other numbers into the range."""
    model = dynamic_net(kept=True)
    surgery = cut(model)
    assert constant(surgery.model, "u").shape == (8, 6)
    np.testing.assert_array_equal(constant(surgery.model, "gate.factor"), constant(model, "gate.factor"))
    assert operators(surgery.model)["Mul"] == 2


def test_a_dynamic_zero_point_is_not_known_to_others() -> None:
    surgery = cut(dynamic_net(read=True))
    assert constant(surgery.model, "u").shape == (8, 6)
    reason = "its zero point is not known beforehand"
    assert {"node": "q", "operator": "DynamicQuantizeLinear", "reason": reason} in surgery.report["unsupported"]
