"""Operator by operator: what a closed channel does behind it, and when the operator is a wall."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from polar_deploy.surgery import Surgery
from polar_deploy.surgery.ops import table
from tests.surgery.graphs import Array, Net, constant, cut, operators, weight

CLOSED = [1, 4]


def _around(operator: str, *extra: Array, opset: int = 17, kernel: int = 1, **attributes: Any) -> Surgery:
    """Conv, gate, the operator with constant inputs, Conv."""
    net = Net(opset=opset)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    inputs = [x, *(net.constant(f"extra{i}", values) for i, values in enumerate(extra))]
    x = net.node(operator, inputs, "tested", **attributes)
    return cut(net.model(net.conv(x, 4, "two", kernel=kernel)))


def _widths(surgery: Surgery) -> tuple[int, int]:
    return weight(surgery.model, "one").shape[0], weight(surgery.model, "two").shape[1]


def _bound(value: float) -> Array:
    return np.array(value, np.float32)


@pytest.mark.parametrize(
    ("operator", "extra", "attributes"),
    [
        ("Relu", (), {}),
        ("LeakyRelu", (), {"alpha": 0.2}),
        ("Elu", (), {"alpha": 0.5}),
        ("HardSwish", (), {}),
        ("Tanh", (), {}),
        ("Erf", (), {}),
        ("Abs", (), {}),
        ("Neg", (), {}),
        ("Clip", (_bound(-1), _bound(6)), {}),
        ("Cast", (), {"to": 1}),
        ("Dropout", (), {}),
        ("MaxPool", (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("AveragePool", (), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("GlobalMaxPool", (), {}),
        ("ReduceMax", (), {"axes": [2, 3]}),
        ("ReduceMin", (), {"axes": [-1]}),
        ("ReduceSum", (np.array([2, 3]),), {}),
        ("Slice", (np.array([1]), np.array([7]), np.array([3])), {}),
        ("Slice", (np.array([1, 0]), np.array([7, 99]), np.array([-1, 2]), np.array([2, 1])), {}),
        ("Pad", (np.array([0, 0, 1, 1, 0, 0, 1, 1]),), {}),
        ("Pad", (np.array([0, 0, 1, 1, 0, 0, 1, 1]),), {"mode": "edge"}),
        ("Pad", (np.array([0, 0, -1, 0, 0, 0, 0, -1]),), {}),
        ("Transpose", (), {"perm": [0, 1, 3, 2]}),
        ("Div", (_bound(3),), {}),
        ("Mul", (np.arange(64, dtype=np.float32).reshape(8, 8),), {}),
    ],
)
def test_closed_channels_go_right_through(operator: str, extra: tuple[Array, ...], attributes: dict[str, Any]) -> None:
    surgery = _around(operator, *extra, kernel=3, **attributes)
    assert _widths(surgery) == (4, 4)
    assert surgery.report["walls"] == []


@pytest.mark.parametrize(
    ("operator", "extra", "attributes"),
    [
        ("Sigmoid", (), {}),
        ("HardSigmoid", (), {"alpha": 0.3, "beta": 0.6}),
        ("Softplus", (), {}),
        ("Clip", (_bound(0.5), _bound(2)), {}),
        ("Add", (_bound(2),), {}),
        ("Sub", (np.arange(6, dtype=np.float32).reshape(6, 1, 1),), {}),
        ("Max", (_bound(0.25),), {}),
        ("Min", (_bound(-0.25),), {}),
    ],
)
def test_closed_channels_become_a_bias(operator: str, extra: tuple[Array, ...], attributes: dict[str, Any]) -> None:
    """A constant that is not zero is taken up by the next bias; with a padded kernel it stays, for that reason."""
    assert _widths(_around(operator, *extra, **attributes)) == (4, 4)
    padded = _around(operator, *extra, kernel=3, **attributes)
    assert _widths(padded) == (6, 6)
    assert "padding" in padded.report["cuts_not_made"][0]["reason"]


# The last ONNX Runtime for Python 3.10 is 1.23.
needs_opset_24 = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24), reason="this ONNX Runtime ends at opset 23"
)


@pytest.mark.parametrize(
    ("operator", "opset", "attributes"),
    [
        ("Gelu", 20, {}),
        ("Gelu", 20, {"approximate": "tanh"}),
        ("Mish", 18, {}),
        pytest.param("Swish", 24, {"alpha": 1.5}, marks=needs_opset_24),
        ("Clip", 10, {"min": -2.0, "max": 2.0}),
        ("Pad", 10, {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 0.0}),
        ("Slice", 9, {"starts": [1], "ends": [5], "axes": [2]}),
        ("Flatten", 17, {}),
    ],
)
def test_other_opsets(operator: str, opset: int, attributes: dict[str, Any]) -> None:
    net = Net(opset=opset, size=4)
    x = net.node(operator, [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "tested", **attributes)
    model = net.model(net.gemm(x, 96, 4, "logits") if operator == "Flatten" else net.conv(x, 4, "two"))
    assert weight(cut(model).model, "one").shape[0] == 4


@pytest.mark.parametrize(
    ("operator", "extra", "attributes", "reason"),
    [
        ("Cast", (), {"to": 6}, "it casts to another kind of number"),
        ("ReduceMean", (), {}, "it reduces over the channels"),
        ("ReduceMean", (), {"axes": [1, 2]}, "it reduces over the channels"),
        ("Slice", (np.array([0]), np.array([6]), np.array([1]), np.array([2])), {}, "it takes every n-th channel"),
        (
            "Pad",
            (np.array([0, 1, 0, 0, 0, 1, 0, 0]),),
            {"mode": "reflect"},
            "it pads the channels by 1 and 1 in mode reflect",
        ),
        ("Pad", (np.array([0, -1, 0, 0, 0, 0, 0, 0]),), {}, "it pads the channels by -1 and 0 in mode constant"),
        ("Softmax", (), {"axis": 1}, "this operator is not known to surgery"),
        ("Squeeze", (), {}, "it squeezes whatever has size 1"),
    ],
)
def test_walls(operator: str, extra: tuple[Array, ...], attributes: dict[str, Any], reason: str) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    extras = [net.constant(f"extra{i}", values) for i, values in enumerate(extra)]
    x = net.node(operator, [x, *extras], "tested", **attributes)
    net.width[x] = 0  # whatever it is
    if operator == "Cast":
        x = net.node("Cast", [x], "back", to=1)
    surgery = cut(net.model(x))
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["walls"][0] == {"node": "tested", "operator": operator, "reason": reason}


def test_slice_by_attributes_along_the_channels() -> None:
    net = Net(opset=9)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Slice", [x], "tested", starts=[1, 0], ends=[6, 8], axes=[1, 2])
    net.width[x] = 5
    surgery = cut(net.model(net.conv(x, 4, "two")))
    assert _widths(surgery) == (3, 3), "channel 0 is read by nobody"
    tested = next(node for node in surgery.model.graph.node if node.name == "tested")
    found = {a.name: list(a.ints) for a in tested.attribute}
    assert (found["starts"], found["ends"]) == ([0, 0], [3, 8])


def test_pad_with_axes() -> None:
    net = Net(opset=18)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    net.constant("pads", np.array([1, 2, 1, 0], np.int64))
    net.constant("axes", np.array([3, 1], np.int64))
    x = net.node("Pad", [x, "pads", "", "axes"], "tested")
    net.width[x] = 8
    surgery = cut(net.model(net.conv(x, 4, "two")))
    assert _widths(surgery) == (4, 4)
    assert constant(surgery.model, "pads").tolist() == [1, 0, 1, 0]


def test_reductions_that_drop_their_axes_move_the_channels() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("ReduceMean", [x], "mean", axes=[3], keepdims=0)
    x = net.node("Transpose", [x], "turn", perm=[2, 0, 1])  # [height, batch, channels]
    x = net.node("ReduceMax", [x], "max", axes=[0], keepdims=0)
    assert weight(cut(net.model(net.gemm(x, 6, 5, "logits"))).model, "logits").shape == (5, 4)


def test_sum_over_space_of_a_constant_is_not_followed() -> None:
    """2 everywhere sums up to twice the number of positions, which nobody wrote down."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("two", np.array(2, np.float32))], "more")
    x = net.node("ReduceSum", [x, net.constant("axes", np.array([2, 3]))], "sum")
    surgery = cut(net.model(net.conv(x, 4, "last", kernel=1)))
    assert weight(surgery.model, "one").shape[0] == 6


def test_average_that_counts_padding_is_not_constant() -> None:
    net = Net()
    x = net.node("Sigmoid", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "half")
    x = net.node("AveragePool", [x], "pool", count_include_pad=1, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    assert weight(cut(net.model(net.conv(x, 4, "two", kernel=1))).model, "one").shape[0] == 6


def test_indices_that_are_used_are_a_wall() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    net.nodes[-1].output.append("indices")
    whole = net.node("Cast", ["indices"], "floats", to=1)
    net.width[whole] = 6
    surgery = cut(net.model(net.conv(x, 4, "two"), whole))
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["walls"][0]["reason"] == "its indices are used"


def test_squeeze_and_unsqueeze_move_the_channels() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    x = net.node("GlobalAveragePool", [x], "pool")
    x = net.node("Squeeze", [x, net.constant("last", np.array([2, 3]))], "squeezed")
    hidden = net.gate(net.relu(net.gemm(x, 6, 8, "hidden"), "r"), [0], "gate2", shape="1c")
    x = net.node("Unsqueeze", [hidden, net.constant("back", np.array([2, 3]))], "unsqueezed")
    net.width[x] = 8
    smaller = cut(net.model(net.conv(x, 5, "two", kernel=1))).model
    assert weight(smaller, "hidden").shape == (7, 4)
    assert weight(smaller, "two").shape[1] == 7


def test_reshape_to_a_computed_shape_becomes_a_constant_one() -> None:
    """Batch from Shape, channels baked in, as older exporters write it."""
    net = Net(size=4)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    batch = net.node(
        "Slice",
        [
            net.node("Shape", ["input"], "shape"),
            net.constant("zero", np.array([0])),
            net.constant("end", np.array([1])),
        ],
        "batch",
    )
    target = net.node("Concat", [batch, net.constant("rest", np.array([96]))], "target", axis=0)
    x = net.node("Reshape", [x, target], "flat")
    surgery = cut(net.model(net.gemm(x, 96, 5, "logits")))
    assert weight(surgery.model, "logits").shape == (5, 64)
    assert "Shape" not in operators(surgery.model)


def test_gemm_in_all_its_forms() -> None:
    net = Net(size=1)
    x = net.node("Flatten", [net.conv("input", 6, "one", kernel=1)], "flat")
    x = net.gate(x, CLOSED, "gate", shape="1c")
    weights = net.random.standard_normal((6, 4)).astype(np.float32)
    inputs = [x, net.constant("w", weights), net.constant("b", np.array([0.5], np.float32))]
    x = net.node("Gemm", inputs, "scaled", alpha=0.5, beta=2.0)
    net.width[x] = 4
    x = net.node("Add", [x, net.constant("shift", np.arange(4, dtype=np.float32))], "shifted")
    x = net.gate(net.relu(x, "act"), [3], "gate2", shape="1c")
    smaller = cut(net.model(net.gemm(x, 4, 5, "logits"))).model
    assert weight(smaller, "scaled").shape == (4, 3)
    np.testing.assert_allclose(weight(smaller, "scaled"), 0.5 * weights[[0, 2, 3, 5]][:, :3], rtol=1e-6)
    assert constant(smaller, "shift").tolist() == [0, 1, 2]


def test_layers_whose_weights_are_computed_are_walls() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    kernel = net.node("GlobalAveragePool", [net.conv("input", 6, "weights")], "kernel")
    net.node("ReduceMean", [kernel], "mean", axes=[0])
    x = net.node("Conv", [x, "mean"], "tested")
    net.width[x] = 1
    surgery = cut(net.model(x))
    assert weight(surgery.model, "one").shape[0] == 6
    assert {"node": "tested", "operator": "Conv", "reason": "its weight is computed"} in surgery.report["walls"]


def test_tensors_with_channels_on_different_axes() -> None:
    """A weight a position, made by a product over the width, is joined with the trunk: neither disturbs the other."""
    net = Net(size=6)
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [0, 3], "gate")
    y = net.conv("input", 1, "map", kernel=1)
    y = net.node("MatMul", [y, net.constant("w", net.random.standard_normal((6, 6)).astype("f"))], "product")
    net.width[y] = 1
    smaller = cut(net.model(net.head(net.conv(net.node("Mul", [x, y], "weighted"), 4, "two")))).model
    assert weight(smaller, "one").shape[0] == 6
    assert weight(smaller, "two").shape[1] == 6


def test_one_map_for_all_channels() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [0, 3], "gate")
    y = net.node("Sigmoid", [net.conv("input", 1, "map")], "attention")
    smaller = cut(net.model(net.head(net.conv(net.node("Mul", [x, y], "weighted"), 4, "two")))).model
    assert weight(smaller, "one").shape[0] == 6
    assert weight(smaller, "map").shape[0] == 1


@pytest.mark.parametrize(
    ("operator", "attributes", "values"),
    [
        ("Gelu", {}, {-1.0: -0.15865525, 2.0: 1.9544997}),
        ("Gelu", {"approximate": "tanh"}, {-1.0: -0.15880801, 2.0: 1.9545977}),
        ("Elu", {"alpha": 2.0}, {-1.0: 2 * (np.exp(-1) - 1), 3.0: 3.0}),
        ("LeakyRelu", {"alpha": 0.1}, {-2.0: -0.2, 2.0: 2.0}),
        ("HardSwish", {}, {-4.0: 0.0, 1.0: 2 / 3, 4.0: 4.0}),
        ("HardSigmoid", {}, {-5.0: 0.0, 1.0: 0.7, 9.0: 1.0}),
        ("Swish", {"alpha": 2.0}, {1.0: 1 / (1 + np.exp(-2))}),
        ("Mish", {}, {1.0: np.tanh(np.log(1 + np.e))}),
        ("Softplus", {}, {0.0: np.log(2)}),
        ("Erf", {}, {1.0: 0.84270079}),
    ],
)
def test_formulas_of_activations(operator: str, attributes: dict[str, Any], values: dict[float, float]) -> None:
    found = table()[operator].function(np.array(list(values)), attributes)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, list(values.values()), rtol=1e-6, atol=1e-12)
