"""Gemm and MatMul: hidden units of perceptrons, in all the forms that a product with a constant has."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from rich.console import Console

from polar_deploy.surgery import Surgery, compress
from polar_deploy.surgery.report import show
from tests.surgery.graphs import CLOSED, Array, Net, constant, cut, names, operators, weight

OPEN = (0, 2, 3, 5)


def matrix(net: Net, name: str, *shape: int) -> str:
    return net.constant(name, net.random.standard_normal(shape).astype(np.float32))


def tokens(*shape: int) -> Net:
    """A net on an input [batch, *shape], whose channels nobody knows yet: linear layers find them."""
    net = Net()
    net.inputs = [helper.make_tensor_value_info("input", 1, ["batch", *shape])]
    return net


def product(net: Net, x: str, weights: str, name: str, width: int, *, left: bool = False, bias: bool = True) -> str:
    """MatMul, and the Add that exporters write behind it."""
    net.node("MatMul", [weights, x] if left else [x, weights], name)
    net.width[name] = width
    if not bias:
        return name
    shape = (width, 1) if left else (width,)
    net.node("Add", [name, matrix(net, f"{name}.b", *shape)], f"{name}.add")
    net.width[f"{name}.add"] = width
    return f"{name}.add"


def closed(net: Net, x: str, channels: Sequence[int], value: float = 0, *, axis: int = -1, name: str = "gate") -> str:
    """A gate on an axis, and an Add that makes `value` of what is closed."""
    factor = np.ones(net.width[x], np.float32)
    factor[list(channels)] = 0
    x = net.node("Mul", [x, net.constant(f"{name}.factor", factor.reshape(-1, *[1] * (-1 - axis)))], name)
    if not value:
        return x
    return net.node("Add", [x, net.constant(f"{name}.shift", np.array(value, np.float32))], f"{name}.value")


def finished(net: Net, *outputs: str, rank: int = 3) -> onnx.ModelProto:
    """The model, with outputs of that rank and unknown sizes."""
    net.width.update(dict.fromkeys(outputs, 0))
    return net.model(*outputs, ranks=[rank] * len(outputs))


def reasons(surgery: Surgery, layer: str) -> list[str]:
    return [entry["reason"] for entry in surgery.report["cuts_not_made"] if entry["layer"] == layer]


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize(
    ("attributes", "bias"),
    [
        *(({}, bias) for bias in (None, (4,), (1, 4), (1,), (1, 1), ())),
        ({"transB": 1}, (4,)),
        ({"alpha": 0.5, "beta": 2.0}, (1, 4)),
        ({"alpha": 0.5, "beta": 2.0}, ()),
        ({"transB": 1, "alpha": 0.5}, None),
        ({"transB": 1, "beta": 0.0}, (4,)),
    ],
)
def test_gemm(attributes: dict[str, Any], bias: tuple[int, ...] | None, value: float) -> None:
    """A closed input goes; a constant one moves into the bias, whatever its shape, or makes one."""
    net = tokens(5)
    x = net.relu(net.gemm("input", 5, 6, "one"), "act")
    shape = (4, 6) if attributes.get("transB") else (6, 4)
    inputs = [closed(net, x, CLOSED, value), matrix(net, "w", *shape)]
    inputs += [] if bias is None else [net.constant("b", net.random.standard_normal(bias).astype(np.float32))]
    net.width[net.node("Gemm", inputs, "two", **attributes)] = 4
    model = finished(net, net.gemm(closed(net, "two", [3], name="gate2"), 4, 3, "three"), rank=2)
    surgery = cut(model)
    rows = weight(model, "two") if "transB" in attributes else weight(model, "two").T
    now = weight(surgery.model, "two") if "transB" in attributes else weight(surgery.model, "two").T
    np.testing.assert_array_equal(weight(surgery.model, "one"), weight(model, "one")[list(OPEN)])
    np.testing.assert_array_equal(now, rows[:3][:, OPEN])
    assert weight(surgery.model, "three").shape == (3, 3)
    assert surgery.report["cuts_not_made"] == []
    if value:
        offset = np.zeros(4) if bias is None else np.broadcast_to(weight(model, "two", 2), (1, 4))[0]
        moved = attributes.get("alpha", 1) * value * rows[:, CLOSED].sum(axis=1) + attributes.get("beta", 1) * offset
        np.testing.assert_allclose(weight(surgery.model, "two", 2), moved[:3], rtol=1e-5)
    elif bias in (None, (1,), (1, 1), ()):
        assert bias is None or weight(surgery.model, "two", 2).size in (1, 3)


@pytest.mark.parametrize(
    ("attributes", "shape", "reason"),
    [
        ({"transA": 1}, (1,), "its input is transposed"),
        ({}, (5, 4), "its bias differs from row to row"),
        ({}, (5, 1), "its bias differs from row to row"),
    ],
)
def test_walls_of_gemm(attributes: dict[str, Any], shape: tuple[int, ...], reason: str) -> None:
    net = Net()
    net.inputs = [helper.make_tensor_value_info("input", 1, [5, 5])]
    x = closed(net, net.gemm("input", 5, 6, "one"), CLOSED)
    rows = 5 if attributes else 6
    net.node("Gemm", [x, matrix(net, "w", rows, 4), matrix(net, "b", *shape)], "two", **attributes)
    surgery = cut(finished(net, "two", rank=2))
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["unsupported"] == [{"node": "two", "operator": "Gemm", "reason": reason}]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lead", [(), (1, 1)])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_perceptron(value: float, lead: tuple[int, ...], left: bool) -> None:
    """Hidden units on the last axis, or, with weights on the left, on the one before; weights with leading ones."""
    net = tokens(7, 7)
    axis = -2 if left else -1
    shapes = ((6, 7), (7, 6)) if left else ((7, 6), (6, 7))
    x = product(net, "input", matrix(net, "u", *lead, *shapes[0]), "up", 6, left=left)
    x = closed(net, net.node("Relu", [x], "act"), CLOSED, value, axis=axis)
    x = product(net, x, matrix(net, "d", *lead, *shapes[1]), "down", 7, left=left)
    model = finished(net, x, rank=max(3, len(lead) + 2))
    surgery = cut(model)
    assert surgery.report["cuts_not_made"] == surgery.report["unsupported"] == []
    np.testing.assert_array_equal(
        constant(surgery.model, "u"), constant(model, "u").take(OPEN, axis=-2 if left else -1)
    )
    np.testing.assert_array_equal(
        constant(surgery.model, "d"), constant(model, "d").take(OPEN, axis=-1 if left else -2)
    )
    moved = value * constant(model, "d").take(CLOSED, axis=-1 if left else -2).sum(axis=-1 if left else -2)
    moved = moved.reshape(constant(model, "down.b").shape)
    np.testing.assert_allclose(constant(surgery.model, "down.b"), constant(model, "down.b") + moved, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("no bias", "the constant 0.5 meets an operator without a bias"),
        ("two readers", "the constant 0.5 meets an operator without a bias"),
        ("an output", "the constant 0.5 meets an operator without a bias"),
        ("a bias a position", "the constant 0.5 meets an operator without a bias"),
        ("a computed bias", "the constant 0.5 meets an operator without a bias"),
        ("several matrices", "the constant 0.5 meets several matrices"),
    ],
)
def test_a_product_that_no_bias_follows_takes_no_constant(change: str, reason: str) -> None:
    net = tokens(7, 5)
    x = closed(net, product(net, "input", matrix(net, "u", 5, 6), "up", 6), CLOSED, 0.5)
    weights = matrix(net, "d", *((2, 1) if change == "several matrices" else ()), 6, 3)
    y = net.node("MatMul", [x, weights], "down")
    shape = (7, 3) if change == "a bias a position" else (3,)
    bias = (
        net.node("Slice", ["input", *_bounds(net)], "computed")
        if change == "a computed bias"
        else matrix(net, "b", *shape)
    )
    outputs = [y if change == "no bias" else net.node("Add", [bias, y], "sum")]
    net.width["down"] = net.width["sum"] = 0
    if change == "two readers":
        outputs.append(net.node("Relu", [y], "other"))
    if change == "an output":
        outputs.append(y)
    model = finished(net, *outputs, rank=4 if change == "several matrices" else 3)
    surgery = cut(model)
    assert reasons(surgery, "up") == [reason]
    assert constant(surgery.model, "u").shape == (5, 6)
    zero = cut(_without_value(model))
    assert constant(zero.model, "u").shape == (5, 4), "zeros need no bias"


def _bounds(net: Net) -> list[str]:
    return [net.constant(n, np.array([v])) for n, v in (("s", 0), ("e", 3), ("a", 2))]


def _without_value(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same net with 0 instead of 0.5 where it is closed."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == "gate.shift")
    tensor.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), tensor.name))
    return changed


def test_a_bias_of_one_number_grows_where_a_constant_moves_into_it() -> None:
    net = tokens(7, 5)
    x = closed(net, product(net, "input", matrix(net, "u", 5, 6), "up", 6), CLOSED, 0.5)
    net.node("MatMul", [x, matrix(net, "d", 6, 3)], "down")
    net.width["down"] = 3
    x = net.node("Add", [net.constant("b", np.array([[2]], np.float32)), "down"], "sum")
    model = finished(net, net.node("Relu", [x], "out"))
    smaller = cut(model).model
    moved = 2 + 0.5 * constant(model, "d")[list(CLOSED)].sum(axis=0)
    np.testing.assert_allclose(constant(smaller, "b"), moved[None], rtol=1e-6)


def test_a_shared_bias_is_copied_before_a_constant_moves_into_it() -> None:
    net = tokens(7, 5)
    x = closed(net, product(net, "input", matrix(net, "u", 5, 6), "up", 6), CLOSED, 0.5)
    y = product(net, x, matrix(net, "d", 6, 3), "down", 3)
    net.node("MatMul", ["input", matrix(net, "e", 5, 3)], "side")
    net.node("Add", ["side", "down.b"], "side.add")
    net.width["side.add"] = 3
    model = finished(net, y, "side.add")
    smaller = cut(model).model
    (down,) = (node.input[1] for node in smaller.graph.node if node.name == "down.add")
    np.testing.assert_array_equal(constant(smaller, "down.b"), constant(model, "down.b"))
    assert down != "down.b"


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_transformers_perceptron(value: float) -> None:
    """MatMul, Add, Gelu, gate, MatMul, Add, and the stream around it; the Gelu in parts, as before opset 20."""
    net = tokens(7, 8)
    x = product(net, "input", matrix(net, "u", 8, 6), "up", 6)
    half = net.node("Div", [x, net.constant("root", np.array(np.sqrt(2), np.float32))], "scaled")
    half = net.node("Add", [net.node("Erf", [half], "erf"), net.constant("unit", np.array(1, np.float32))], "shifted")
    half = net.node(
        "Mul", [net.node("Mul", [x, half], "twice"), net.constant("half", np.array(0.5, np.float32))], "gelu"
    )
    x = product(net, closed(net, half, CLOSED, value), matrix(net, "d", 6, 8), "down", 8)
    model = finished(net, net.add("input", x, "stream"))
    surgery = cut(model)
    assert constant(surgery.model, "u").shape == (8, 4)
    assert constant(surgery.model, "up.b").shape == (4,)
    assert constant(surgery.model, "d").shape == (4, 8)
    assert surgery.report["cuts_not_made"] == []


def test_a_gate_before_the_bias_leaves_the_gelu_of_that_bias() -> None:
    """What is closed comes out as a constant that is not zero, and moves into the second layer's bias."""
    net = tokens(7, 8)
    net.opset = 20
    x = product(net, "input", matrix(net, "u", 8, 6), "up", 6, bias=False)
    x = net.node("Add", [closed(net, x, CLOSED), matrix(net, "b", 6)], "shifted")
    x = product(net, net.node("Gelu", [x], "gelu"), matrix(net, "d", 6, 8), "down", 8)
    model = finished(net, x)
    model.ir_version = 9
    surgery = cut(model)
    assert constant(surgery.model, "u").shape == (8, 4)
    assert not np.allclose(constant(surgery.model, "down.b"), constant(model, "down.b"))
    assert surgery.report["cuts_not_made"] == []


def test_channels_last() -> None:
    """Convolutions around a perceptron on the last axis (ConvNeXt): the stream goes through both layouts."""
    net = Net(size=4)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Transpose", [x], "last", perm=[0, 2, 3, 1])
    x = net.relu(product(net, x, matrix(net, "u", 6, 12), "up", 12), "act")
    x = product(net, closed(net, x, [0, 4, 11], name="gate2"), matrix(net, "d", 12, 6), "down", 6)
    x = net.node("Transpose", [x], "first", perm=[0, 3, 1, 2])
    model = net.model(net.head(net.conv(net.gate(x, [5], "gate3"), 4, "two")))
    smaller = cut(model).model
    assert weight(smaller, "one").shape[0] == 4
    assert constant(smaller, "u").shape == (4, 9)
    assert constant(smaller, "up.b").shape == (9,)
    assert constant(smaller, "d").shape == (9, 5)
    assert weight(smaller, "two").shape[1] == 5


def across(value: float = 0, lead: Sequence[int] = (), *, left: bool = False) -> onnx.ModelProto:
    """A product along the width, or the height, of a feature map; gated channels go through one by one."""
    net = Net(size=8)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("shift", np.array(value, np.float32))], "value") if value else x
    weights = matrix(net, "w", *lead, 8, 8)
    x = net.node("MatMul", [weights, x] if left else [x, weights], "tested")
    net.width[x] = 6
    return net.model(net.conv(x, 4, "two", kernel=1))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lead", [(), (1, 1), (6,), (1, 6)])
def test_channels_on_an_axis_that_is_not_multiplied_go_through(lead: Sequence[int], left: bool) -> None:
    """A spatial perceptron: one matrix for all channels, or one for each, which goes with it."""
    model = across(0, lead, left=left)
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[1] == 4
    own = 6 in lead
    expected = constant(model, "w").take(OPEN, axis=-3) if own else constant(model, "w")
    np.testing.assert_array_equal(constant(surgery.model, "w"), expected)
    assert surgery.report["unsupported"] == surgery.report["cuts_not_made"] == []


def test_a_constant_that_is_multiplied_along_another_axis_is_none_any_more() -> None:
    """Every position gets another sum: 0.5 must stay."""
    surgery = cut(across(0.5))
    assert weight(surgery.model, "one").shape[0] == 6
    assert reasons(surgery, "one") == ["the constant 0.5 meets a product along another axis"]


def test_a_mixer_loses_channels_through_its_mixing_of_tokens() -> None:
    """Tokens are mixed across, channels along; the stream is closed behind every block."""
    net = Net(size=4)
    x = net.node("Reshape", [net.conv("input", 6, "patches"), net.constant("flat", np.array([0, 6, 16]))], "tokens")
    net.width[x] = 6
    x = closed(net, x, CLOSED, axis=-2)
    y = net.relu(product(net, x, matrix(net, "tu", 16, 10), "t.up", 6, bias=False), "t.act")
    y = closed(net, product(net, y, matrix(net, "td", 10, 16), "t.down", 6, bias=False), CLOSED, axis=-2, name="t.gate")
    x = net.node("Transpose", [net.add(x, y, "t.sum")], "turned", perm=[0, 2, 1])
    y = closed(net, net.relu(product(net, x, matrix(net, "cu", 6, 9), "c.up", 9), "c.act"), [1, 2], name="c.gate")
    y = closed(net, product(net, y, matrix(net, "cd", 9, 6), "c.down", 6), CLOSED, name="c.out")
    x = product(net, net.add(x, y, "c.sum"), matrix(net, "h", 6, 5), "head", 5)
    model = finished(net, x)
    surgery = cut(model)
    shapes = {name: constant(surgery.model, name).shape for name in ("tu", "td", "cu", "cd", "h")}
    assert shapes == {"tu": (16, 10), "td": (10, 16), "cu": (4, 7), "cd": (7, 4), "h": (4, 5)}
    assert weight(surgery.model, "patches").shape[0] == 4
    assert surgery.report["unsupported"] == []


def test_dimensions_that_are_closed_on_both_sides_of_a_product() -> None:
    net = tokens(7, 8)
    parts = [
        closed(net, product(net, "input", matrix(net, name, 8, 6), f"to.{name}", 6), CLOSED, name=f"g.{name}")
        for name in "qk"
    ]
    turned = net.node("Transpose", [parts[1]], "turned", perm=[0, 2, 1])
    scores = net.node("MatMul", [parts[0], turned], "scores")
    net.width[scores] = 7
    surgery = cut(finished(net, scores))
    assert constant(surgery.model, "q").shape == constant(surgery.model, "k").shape == (8, 4)


def test_products_of_two_computed_tensors_are_walls_where_channels_meet_positions() -> None:
    net = tokens(7, 8)
    q = closed(net, product(net, "input", matrix(net, "q", 8, 6), "to.q", 6), CLOSED)
    bounds = [net.constant(name, np.array([at])) for name, at in (("start", 0), ("end", 6), ("axis", 1))]
    six = product(net, net.node("Slice", ["input", *bounds], "six"), matrix(net, "v", 8, 5), "to.v", 5)
    x = net.node("MatMul", [q, six], "tested")
    net.width[x] = 7
    surgery = cut(finished(net, x))
    assert constant(surgery.model, "q").shape == (8, 6)
    reason = "both of its factors are computed, and their channels are not those of attention heads"
    assert surgery.report["unsupported"] == [{"node": "tested", "operator": "MatMul", "reason": reason}]
    assert {entry["reason"] for entry in surgery.report["cuts_not_made"]} == {reason}


def test_vectors_are_walls() -> None:
    net = tokens(7, 8)
    x = closed(net, product(net, "input", matrix(net, "u", 8, 6), "up", 6), CLOSED)
    x = net.node("MatMul", [x, matrix(net, "v", 6)], "tested")
    net.width[x] = 7
    surgery = cut(finished(net, x, rank=2))
    assert constant(surgery.model, "u").shape == (8, 6)
    assert surgery.report["unsupported"] == [
        {"node": "tested", "operator": "MatMul", "reason": "one of its factors is a vector"}
    ]


def test_tokens_of_the_input_do_not_hide_hidden_units() -> None:
    """The input's axis 1 is taken for its channels; they cannot go, so the product is followed and not they."""
    net = tokens(7, 8)
    x = net.node("Add", ["input", matrix(net, "position", 1, 7, 8)], "placed")
    x = product(
        net, closed(net, product(net, x, matrix(net, "u", 8, 6), "up", 6), CLOSED), matrix(net, "d", 6, 3), "down", 3
    )
    model = finished(net, x)
    smaller = cut(model).model
    assert (constant(smaller, "u").shape, constant(smaller, "d").shape) == ((8, 4), (4, 3))


@pytest.mark.parametrize("after", [False, True])
def test_other_factors_fold_into_a_product(after: bool) -> None:
    """Directly behind the product, or before it."""
    net = tokens(7, 8)
    x = product(net, "input", matrix(net, "u", 8, 6), "up", 6, bias=False)
    factor = net.constant("factor", np.array([1, 2, 0.5, 3, -1, 4], np.float32))
    x = net.node("Mul", [x, factor], "scale")
    if after:
        x = net.node("Mul", [net.relu(x, "act"), "factor"], "again")
    model = finished(net, product(net, x, matrix(net, "d", 6, 3), "down", 3))
    smaller = cut(model).model
    assert "Mul" not in operators(smaller)
    np.testing.assert_array_equal(constant(smaller, "u"), constant(model, "u") * constant(model, "factor"))
    expected = constant(model, "d") * (constant(model, "factor")[:, None] if after else 1)
    np.testing.assert_array_equal(constant(smaller, "d"), expected)


def test_a_factor_behind_the_bias_does_not_scale_the_product_alone() -> None:
    """It goes into the next product, or into this one and the bias."""
    net = tokens(7, 8)
    x = product(net, "input", matrix(net, "u", 8, 6), "up", 6)
    x = net.node("Mul", [x, net.constant("factor", np.array([1, 2, 0.5, 3, -1, 4], np.float32))], "scale")
    model = finished(net, product(net, x, matrix(net, "d", 6, 3), "down", 3))
    smaller = cut(model).model
    assert "Mul" not in operators(smaller)
    scaled = {name: not np.array_equal(constant(smaller, name), constant(model, name)) for name in ("u", "up.b", "d")}
    assert scaled["u"] == scaled["up.b"] != scaled["d"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32])
def test_other_types(dtype: type) -> None:
    """A constant of 2 moves into a bias but among integers, where sums may wrap around; zeros go always."""
    net = tokens(7, 8)
    net.opset = 14
    x = closed(net, product(net, "input", matrix(net, "u", 8, 6), "up", 6), CLOSED, 2)
    model = finished(net, product(net, x, matrix(net, "d", 6, 3), "down", 3))
    for tensor in model.graph.initializer:
        values = (
            np.rint(4 * numpy_helper.to_array(tensor))
            if tensor.name not in ("gate.factor", "gate.shift")
            else numpy_helper.to_array(tensor)
        )
        tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    surgery = compress(model)
    onnx.checker.check_model(surgery.model, full_check=True)
    moves = dtype != np.int32
    assert constant(surgery.model, "u").shape == (8, 4 if moves else 6)
    assert reasons(surgery, "up") == ([] if moves else ["the constant 2 meets integer arithmetic"])
    moved = 2 * constant(model, "d")[list(CLOSED)].astype(np.float64).sum(axis=0) if moves else 0
    expected = (constant(model, "down.b").astype(np.float64) + moved).astype(dtype)
    np.testing.assert_array_equal(constant(surgery.model, "down.b"), expected)


def test_names_of_what_is_left() -> None:
    net = tokens(7, 8)
    x = product(
        net,
        closed(net, product(net, "input", matrix(net, "u", 8, 6), "up", 6), CLOSED),
        matrix(net, "d", 6, 3),
        "down",
        3,
    )
    model = finished(net, x)
    found: Array = constant(cut(model).model, "u")
    assert found.shape == (8, 4)
    assert names(cut(model).model) == {"up", "up.add", "down", "down.add"}


# ---- Einsum


@pytest.mark.parametrize(
    ("equation", "turned"),
    [("nchw,co->nohw", False), ("nchw,oc->nohw", True), ("n c h w , c o -> n o h w", False), ("oc,nchw->nohw", True)],
)
def test_einsum_that_is_a_product_with_a_matrix(equation: str, turned: bool) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    matrix = net.random.standard_normal((6, 5)).astype(np.float32)
    held = net.constant("matrix", matrix.T.copy() if turned else matrix)
    first = equation.startswith("oc")
    y = net.node("Einsum", [held, x] if first else [x, held], "tested", equation=equation)
    net.width[y] = 5
    model = net.model(net.conv(net.gate(y, [0], "gate2"), 4, "two"))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 4
    kept = matrix[[0, 2, 3, 5]][:, 1:]
    np.testing.assert_array_equal(weight(surgery.model, "tested", 0 if first else 1), kept.T if turned else kept)


def test_einsum_with_dots() -> None:
    net = Net()
    x = net.node("Transpose", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "last", perm=[0, 2, 3, 1])
    held = net.constant("matrix", net.random.standard_normal((6, 5)).astype(np.float32))
    y = net.node(
        "Transpose", [net.node("Einsum", [x, held], "tested", equation="...c,co->...o")], "first", perm=[0, 3, 1, 2]
    )
    net.width[y] = 5
    surgery = cut(net.model(net.conv(net.gate(y, [0], "gate2"), 4, "two")))
    assert weight(surgery.model, "tested").shape == (4, 4)


@pytest.mark.parametrize(
    ("equation", "axis"),
    [("bic,co", 2), ("zic,co", 1), ("icz,ca", 0), ("...c,co", 2), ("c...,ca", 2), ("z...c,co", 1)],
)
def test_einsum_without_a_result_sorts_what_stands_once(equation: str, axis: int) -> None:
    """Six channels come in, and five go out, on `axis`, where a gate closes two."""
    net, letters = Net(), equation.partition(",")[0].replace("...", "-" if "z" in equation else "--")
    sizes: dict[str, int | str] = {"c": 6, "b": "batch", "z": "batch"}
    net.inputs = [onnx.helper.make_tensor_value_info("input", 1, [sizes.get(letter, 4) for letter in letters])]
    matrix = net.random.standard_normal((6, 5)).astype(np.float32)
    factor = np.array([0, 1, 1, 0, 1], np.float32).reshape([-1, *[1] * (2 - axis)])
    x = net.node("Einsum", ["input", net.constant("matrix", matrix)], "tested", equation=equation)
    x = net.node("Mul", [x, net.constant("factor", factor)], "gate")
    x = net.node("Transpose", [x], "last", perm=[*(i for i in range(3) if i != axis), axis])
    net.linear(x, 5, 3, "y")
    model = net.model("y.sum", ranks=[3])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(model).graph.output[0])
    np.testing.assert_array_equal(weight(cut(model).model, "tested"), matrix[:, [1, 2, 4]])


@pytest.mark.parametrize("equation", ["nchw,co->no", "nchw,cn->nhw", "nchw,ch->nw"])
def test_einsum_that_is_something_else(equation: str) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    last = {"co": 5, "cn": 2, "ch": 8}[equation[5:7]]
    held = net.constant("matrix", net.random.standard_normal((6, last)).astype(np.float32))
    if "cn" in equation:
        net.inputs[0].type.tensor_type.shape.dim[0].dim_value = 2
    y = net.node("Einsum", [x, held], "tested", equation=equation)
    model = net.model(y, ranks=[len(equation.partition("->")[2])])
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    surgery = compress(model)
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["unsupported"][0]["operator"] == "Einsum"


def _in_front_of_a_gate(
    weight: str, net: Net, inputs: list[onnx.ValueInfoProto], closed: int, wide: int = 256
) -> onnx.ModelProto:
    """MatMul by `weight` [64, wide], of which channels are closed, and by another one."""
    gate = np.ones(wide, np.float32)
    gate[:closed] = 0
    product = net.node("MatMul", ["data", weight], "product")
    gated = net.node("Mul", [net.node("Relu", [product], "act"), net.constant("gate", gate)], "gated")
    last = net.constant("last", net.random.standard_normal((wide, 8)).astype(np.float32))
    net.node("MatMul", [gated, last], "logits")
    net.inputs = inputs
    net.width["logits"] = 8
    return net.model("logits")


@pytest.mark.parametrize("closed", [0, 10])
@pytest.mark.parametrize("stored", ["float16", "int8", "uint8 around 128", "transposed int8", "int8 by column"])
def test_weights_that_are_stored_compressed_stay_compressed(stored: str, closed: int) -> None:
    net, inputs = Net(), [helper.make_tensor_value_info("data", 1, ["batch", 64])]
    numbers = net.random.standard_normal((64, 256))
    integers = np.clip(np.rint(numbers * 30), -127, 127)
    if stored == "float16":
        weight = net.node("Cast", [net.constant("w", numbers.astype(np.float16))], "cast", to=1)
    elif stored == "uint8 around 128":
        cast = net.node("Cast", [net.constant("w", (integers + 128).astype(np.uint8))], "cast", to=1)
        centred = net.node("Sub", [cast, net.constant("zero", np.array(128, np.float32))], "centred")
        weight = net.node("Mul", [centred, net.constant("scale", np.array(0.03, np.float32))], "scaled")
    else:
        turned = stored == "transposed int8"
        kept = net.constant("w", (integers.T if turned else integers).astype(np.int8))
        scale = np.full(256, 0.03) if stored == "int8 by column" else np.array(0.03)
        cast = net.node("Cast", [kept], "cast", to=1)
        weight = net.node("Mul", [cast, net.constant("scale", scale.astype(np.float32))], "scaled")
        weight = net.node("Transpose", [weight], "turned", perm=[1, 0]) if turned else weight
    model = _in_front_of_a_gate(weight, net, inputs, closed)
    surgery = cut(model)
    left = constant(surgery.model, "last")
    assert left.shape == (256 - closed, 8)
    if stored == "int8 by column" and closed:
        return  # which scales stay, its values do not tell
    assert sorted(constant(surgery.model, "w").shape) == sorted((64, 256 - closed))
    assert surgery.model.ByteSize() <= model.ByteSize()
    assert compress(surgery.model).model == surgery.model


@pytest.mark.parametrize("closed", [0, 16])
def test_a_tied_table_is_stored_once(closed: int) -> None:
    """Read by a Gather, and transposed by the last product; its columns go where what is gathered is gated, too."""
    net = Net()
    gate = np.ones(64, np.float32)
    gate[:closed] = 0
    table = net.constant("table", net.random.standard_normal((1000, 64)).astype(np.float32))
    gated = net.node("Mul", [net.node("Gather", [table, "ids"], "rows"), net.constant("gate", gate)], "gated")
    net.node("MatMul", [gated, net.node("Transpose", [table], "turned", perm=[1, 0])], "logits")
    net.inputs = [helper.make_tensor_value_info("ids", 7, ["batch", 5])]
    net.width["logits"] = 1000
    model = net.model("logits", ranks=[3])
    surgery = compress(model)
    assert surgery.report["verified"]
    assert constant(surgery.model, "table").shape == (1000, 64 - closed)
    assert surgery.report["params"][1] <= 1000 * (64 - closed)
    ids = {"ids": net.random.integers(0, 1000, (2, 5))}
    expected, found = (
        ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, ids)[0]
        for each in (model, surgery.model)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_shared_weight_that_is_cut_for_one_reader_is_stored_twice_and_the_report_says_so() -> None:
    net = Net()
    table = net.constant("table", net.random.standard_normal((64, 64)).astype(np.float32))
    gate = np.ones(64, np.float32)
    gate[:3] = 0
    first = net.node("Relu", [net.node("MatMul", ["data", table], "one")], "act")
    gated = net.node("Mul", [first, net.constant("gate", gate)], "gated")
    net.node("MatMul", [gated, net.node("Transpose", [table], "turned", perm=[1, 0])], "middle")
    net.node("MatMul", ["middle", table], "logits")
    net.inputs = [helper.make_tensor_value_info("data", 1, ["batch", 64])]
    net.width["logits"] = 64
    surgery = cut(net.model("logits"))
    was, now = surgery.report["params"]
    assert now > was
    told = io.StringIO()
    show(surgery.report, Console(file=told, width=200))
    assert "more parameters than before" in told.getvalue()


def test_large_weights_in_constant_nodes_are_cut() -> None:
    net, inputs = Net(), [helper.make_tensor_value_info("data", 1, ["batch", 64])]
    values = net.random.standard_normal((64, 256)).astype(np.float32)
    weight = net.node("Constant", [], "weight", value=numpy_helper.from_array(values))
    assert constant(cut(_in_front_of_a_gate(weight, net, inputs, 10)).model, "last").shape == (246, 8)
