"""Reductions: over space each channel is by itself; over the channels, zero adds nothing and a mean counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy.surgery import compress
from tests.surgery.graphs import CLOSED, Array, Net, around, constant, cut, fates, names, outcome, weight

SPACE = np.array([2, 3])
MEAN = "kept: it divides by the number of channels"
ADDS = "kept: it adds up all channels"
ANY = "kept: any of its channels may be the one"


def _f(*values: float) -> Array:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("operator", "extra", "opset", "attributes", "expected"),
    [
        ("ReduceMean", (), 17, {"axes": [2, 3]}, "removed"),
        ("ReduceMean", (SPACE,), 18, {}, "removed"),
        ("ReduceMax", (), 11, {"axes": [2, 3]}, "removed"),
        ("ReduceMax", (SPACE,), 20, {}, "removed"),
        ("ReduceMin", (), 17, {"axes": [-1]}, "removed"),
        ("ReduceSum", (), 11, {"axes": [-1, -2]}, "removed"),
        ("ReduceSum", (SPACE,), 13, {}, "removed"),
        ("ReduceSum", (np.empty(0, np.int64),), 13, {"noop_with_empty_axes": 1}, "removed"),
        ("ReduceSumSquare", (), 13, {"axes": [2]}, "removed"),
        ("ReduceSumSquare", (SPACE,), 18, {}, "removed"),
        ("ReduceL1", (SPACE,), 18, {}, "removed"),
        ("ReduceL2", (), 17, {"axes": [3]}, "removed"),
        ("ReduceProd", (), 17, {"axes": [3]}, "removed"),
        ("ReduceLogSumExp", (), 17, {"axes": [3]}, "folded"),
        ("ReduceL1", (), 18, {"noop_with_empty_axes": 1}, "kept: it reduces over no axis"),
        ("ArgMax", (), 17, {"axis": 2}, "removed"),
        ("ArgMin", (), 17, {"axis": -1, "select_last_index": 1}, "folded"),
    ],
)
def test_over_space(
    operator: str, extra: tuple[Array, ...], opset: int, attributes: dict[str, Any], expected: str
) -> None:
    """Zero comes out as zero, but for the logarithm of as many ones as there are positions, and for the last index."""
    model = around(operator, *extra, opset=opset, **attributes)
    if operator.startswith("Arg"):
        model = _cast_behind(model)
    assert outcome(model) == expected


def _cast_behind(model: onnx.ModelProto) -> onnx.ModelProto:
    """Whole numbers become floats before the next layer."""
    nodes = list(model.graph.node)[:-1]
    model.graph.node.insert(len(nodes), helper.make_node("Cast", ["tested"], ["cast"], name="cast", to=1))
    model.graph.node[-1].input[0] = "cast"
    return model


@pytest.mark.parametrize(
    ("operator", "factor"),
    [
        ("ReduceMean", 2.0),
        ("ReduceSum", 2.0 * 64),
        ("ReduceL1", 2.0 * 64),
        ("ReduceL2", 2.0 * 8),
        ("ReduceSumSquare", 4.0 * 64),
        ("ReduceLogSum", np.log(2.0 * 64)),
        ("ReduceLogSumExp", 2 + np.log(64)),
        ("ReduceMax", 2.0),
        ("ReduceMin", 2.0),
    ],
)
def test_a_constant_over_space(operator: str, factor: float) -> None:
    """Each closed channel is 2 everywhere; how often is known where the shape is."""
    net = Net(opset=18)
    x = net.gate(net.node("Sigmoid", [net.conv("input", 6, "one")], "act"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("two.", _f(2))], "more")
    model = net.model(net.conv(net.node(operator, [x, net.constant("axes", SPACE)], "tested"), 4, "two", kernel=1))
    surgery = cut(model)
    assert outcome(model, surgery) == "folded"
    moved = factor * weight(model, "two")[:, list(CLOSED), 0, 0].sum(axis=1)
    np.testing.assert_allclose(weight(surgery.model, "two", 2), weight(model, "two", 2) + moved, rtol=1e-5)


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("ReduceSum", "kept: the constant 2 meets a number of positions that is not fixed"),
        ("ReduceL2", "kept: the constant 2 meets a number of positions that is not fixed"),
        ("ReduceMean", "folded"),
    ],
)
def test_a_constant_over_space_of_any_size(operator: str, expected: str) -> None:
    net = Net(opset=18)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("two.", _f(2))], "more")
    model = net.model(net.conv(net.node(operator, [x, net.constant("axes", SPACE)], "tested"), 4, "two", kernel=1))
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    assert outcome(model) == expected


@pytest.mark.parametrize("operator", ["ReduceSum", "GlobalLpPool"])
def test_a_size_that_may_be_another_one(operator: str) -> None:
    """Five times halved and rounded down, sizes from 224 to 255 are 7, but others are not."""
    net = Net(opset=18)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    for i in range(5):
        x = net.node("MaxPool", [x], f"half{i}", kernel_shape=[2, 2], strides=[2, 2])
    extra = [net.constant("axes", SPACE)] if operator == "ReduceSum" else []
    x = net.node(operator, [net.node("Sigmoid", [x], "act"), *extra], "tested")
    model = net.model(net.conv(x, 4, "two", kernel=1))
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    expected = "kept: the constant 0.5 meets a number of positions that is not fixed"
    assert outcome(model, compress(model)) == expected


def _over_channels(operator: str, act: str, **attributes: Any) -> onnx.ModelProto:
    """Conv `one`, an activation, the gate, the reduction over the channels, Conv `two`."""
    net = Net()
    x = net.gate(net.node(act, [net.conv("input", 6, "one")], "act"), CLOSED, "gate")
    if operator == "ReduceSum":
        x = net.node(operator, [x, net.constant("axes", np.array(attributes.pop("axes")))], "tested", **attributes)
    else:
        x = net.node(operator, [x], "tested", **attributes)
    if operator.startswith("Arg"):
        x = net.node("Cast", [x], "cast", to=1)
    net.width[x] = 1
    return net.model(net.conv(x, 4, "two"))


@pytest.mark.parametrize(
    ("operator", "act", "attributes", "expected"),
    [
        ("ReduceSum", "Tanh", {"axes": [1]}, "removed"),
        ("ReduceSum", "Tanh", {"axes": [-3, 3, 2]}, "removed"),
        ("ReduceL1", "Tanh", {"axes": [1]}, "removed"),
        ("ReduceL2", "Tanh", {"axes": [1]}, "removed"),
        ("ReduceSumSquare", "Tanh", {"axes": [1]}, "removed"),
        ("ReduceLogSum", "Sigmoid", {"axes": [1]}, "removed"),
        ("ReduceMax", "Relu", {"axes": [1]}, "removed"),
        ("ReduceMax", "Tanh", {"axes": [1]}, ANY),
        ("ReduceMin", "Tanh", {"axes": [1]}, ANY),
        ("ReduceMean", "Relu", {"axes": [1]}, MEAN),
        ("ReduceMean", "Relu", {"axes": [1, 2]}, MEAN),
        (
            "ReduceLogSumExp",
            "Tanh",
            {"axes": [1]},
            "kept: it adds up the exponentials of all channels, and that of zero is one",
        ),
        ("ArgMax", "Relu", {"axis": 1}, "kept: it numbers the channels"),
        ("ArgMin", "Relu", {"axis": -3}, "kept: it numbers the channels"),
    ],
)
def test_over_the_channels(operator: str, act: str, attributes: dict[str, Any], expected: str) -> None:
    assert outcome(_over_channels(operator, act, **attributes)) == expected


def test_the_least_of_what_is_not_below_zero_is_zero() -> None:
    """Nobody needs the channels that cannot be less: one is left to look at."""
    surgery = cut(_over_channels("ReduceMin", "Relu", axes=[1]))
    assert weight(surgery.model, "one").shape[0] == 1
    assert not weight(surgery.model, "two").any()


def test_a_product_with_zero_is_zero() -> None:
    """Nobody needs it, but whatever else the channels held might multiply to infinity: they hold what they held."""
    surgery = cut(_over_channels("ReduceProd", "Tanh", axes=[1]))
    assert weight(surgery.model, "one").shape[0] == 6
    assert not weight(surgery.model, "two").any()


@pytest.mark.parametrize(
    ("operator", "values", "left"),
    [
        ("ReduceMax", (0.5, 0.25, 0.5, 0.1), [0, 2, 4]),
        ("ReduceMax", (-2.0, -1.0, -3.0, -0.5), [0, 2, 5]),
        ("ReduceMin", (0.5, 0.25, 0.5, 0.1), [0, 2, 5]),
        ("ReduceProd", (1.0, 0.25, 1.0, 0.1), [0, 2, 3, 5]),
        ("ReduceSum", (0.0, 0.25, -0.0, 0.1), [0, 2, 3, 5]),
        ("ReduceMean", (0.0, 0.25, 0.0, 0.1), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_constants_that_make_no_difference(operator: str, values: tuple[float, ...], left: list[int]) -> None:
    """Channels 1, 3, 4, 5 hold the constants; of equal ones that may be the extremum, the last one stays."""
    closed = [1, 3, 4, 5]
    net = Net(opset=18)
    x = net.gate(net.node("Tanh", [net.conv("input", 6, "one")], "act"), closed, "gate")
    offset = np.zeros((6, 1, 1), np.float32)
    offset[closed, 0, 0] = values
    x = net.node("Add", [x, net.constant("offset", offset)], "more")
    x = net.node(operator, [x, net.constant("axes", np.array([1]))], "tested")
    net.width[x] = 1
    smaller = cut(net.model(net.conv(x, 4, "two"))).model
    np.testing.assert_array_equal(constant(smaller, "offset"), offset[left])


def test_channels_that_are_nowhere_behind() -> None:
    """keepdims=0: [batch, height, width] comes out, and nothing of it is taken for channels that could go."""
    net = Net()
    x = net.gate(net.node("Tanh", [net.conv("input", 6, "one")], "act"), CLOSED, "gate")
    x = net.node("ReduceL2", [x], "tested", axes=[1], keepdims=0)
    net.width[x] = 8
    model = net.model(net.node("Sqrt", [x], "root"), ranks=[3])
    assert outcome(model) == "removed"


def test_channels_move_where_axes_before_them_go() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("ReduceMean", [x], "mean", axes=[3], keepdims=0)
    x = net.node("Transpose", [x], "turn", perm=[2, 0, 1])  # [height, batch, channels]
    x = net.node("ReduceMax", [x], "tested", axes=[0], keepdims=0)
    model = net.model(net.gemm(x, 6, 5, "logits"))
    assert set(fates(model, cut(model), "one", "logits")) == {"open", "removed"}


def test_over_everything() -> None:
    net = Net(opset=13)
    x = net.gate(net.node("Tanh", [net.conv("input", 6, "one")], "act"), CLOSED, "gate")
    model = net.model(net.node("ReduceSum", [x], "tested", keepdims=0), ranks=[0])
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    assert outcome(model) == "removed"


def test_all_channels_closed() -> None:
    """The sum of nothing but zeros: one channel is left, and it must be zero."""
    net = Net(opset=13)
    x = net.node("Sigmoid", [net.conv("input", 6, "one")], "act")
    x = net.node("ReduceSum", [net.gate(x, range(6), "gate"), net.constant("axes", np.array([1]))], "sum", keepdims=0)
    net.width[x] = 8
    surgery = cut(net.model(x, ranks=[3]))
    assert weight(surgery.model, "one").shape[0] == 1


def test_a_spare_channel_that_stays_is_still_zero() -> None:
    """Groups stay equally wide: the sigmoid of a filter of zeros is no zero, so the gate must stay shut there."""
    net = Net(channels=4, opset=13)
    x = net.node("Sigmoid", [net.conv("input", 6, "one", group=2)], "act")
    x = net.node("ReduceSum", [net.gate(x, (0, 1, 4), "gate"), net.constant("axes", np.array([1]))], "tested")
    net.width[x] = 1
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 4
    np.testing.assert_array_equal(constant(surgery.model, "gate.factor").ravel(), [0, 1, 1, 1])


def test_l2_normalisation_as_exporters_write_it() -> None:
    """x / max(|x|, 1e-12) over the channels: closed ones go, the norm does not miss them."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    norm = net.node("ReduceL2", [x], "norm", axes=[1], keepdims=1)
    norm = net.node("Clip", [norm, net.constant("least", np.array(1e-12, np.float32))], "clipped")
    net.width[norm] = 1
    model = net.model(net.conv(net.node("Div", [x, norm], "unit"), 4, "two"))
    assert outcome(model) == "removed"


def test_layer_norm_as_exporters_write_it() -> None:
    net = Net(opset=17)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    centred = net.node("Sub", [x, net.node("ReduceMean", [x], "mean", axes=[1])], "centred")
    square = net.node("Pow", [centred, net.constant("two.", _f(2))], "square")
    variance = net.node("ReduceMean", [square], "variance", axes=[1])
    variance = net.node("Add", [variance, net.constant("epsilon", _f(1e-5))], "safe")
    x = net.node("Div", [centred, net.node("Sqrt", [variance], "deviation")], "normal")
    assert outcome(net.model(net.conv(x, 4, "two"))) == MEAN


def test_squares_that_may_overflow_keep_their_input() -> None:
    """In half precision, what a shut gate holds back may have an infinite square: there it stays shut."""
    net = Net(opset=18)
    x = net.conv("input", 6, "one")
    y = net.node("ReduceSumSquare", [net.gate(x, CLOSED, "gate"), net.constant("axes", SPACE)], "tested")
    y = net.conv(net.gate(y, CLOSED, "gate2"), 4, "two", kernel=1)
    model = net.model(x, y)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    smaller = compress(model).model
    assert constant(smaller, "gate.factor").ravel().tolist() == [1, 0, 1, 1, 0, 1]
    assert "gate2" not in names(smaller)
