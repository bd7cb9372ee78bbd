"""Operators on several tensors: arithmetic, extremes, comparisons, logic, with constants and with each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from polar_deploy.surgery import Surgery, compress
from tests.surgery.graphs import CLOSED, Array, Net, around, constant, cut, fates, names, operators, outcome, weight


def _number(value: float) -> Array:
    return np.array(value, np.float32)


PER_CHANNEL = np.array([3, 0.5, -1, 2, 0.25, 1], np.float32).reshape(1, 6, 1, 1)
PER_POSITION = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
GONE, IN_USE = "removed", "kept: it goes together with channels in use, in tested"


def _padding(value: float) -> str:
    return f"kept: the constant {value:g} meets the zero padding"


# The operator, its other operands, what closed channels become before a plain kernel, and before a padded one.
WITH_CONSTANTS: list[Any] = [
    ("Add", [_number(2)], "folded", _padding(2)),
    ("Add", [_number(0)], GONE, GONE),
    ("Add", [PER_CHANNEL], "folded", _padding(0.5)),
    ("Add", [PER_POSITION], IN_USE, IN_USE),
    ("Sub", [PER_CHANNEL.reshape(6, 1, 1)], "folded", _padding(-0.5)),
    ("Mul", [_number(3)], GONE, GONE),
    ("Mul", [PER_POSITION], GONE, GONE),
    ("Div", [_number(3)], GONE, GONE),
    ("Div", [PER_CHANNEL], GONE, GONE),
    ("Div", [PER_POSITION], GONE, GONE),
    ("Mod", [_number(2)], GONE, GONE),
    ("Pow", [_number(2)], GONE, GONE),
    ("Pow", [_number(1)], GONE, GONE),
    ("Pow", [_number(0)], "folded", _padding(1)),
    ("Pow", [np.array(3, np.int64)], GONE, GONE),
    ("Sum", [], GONE, GONE),
    ("Sum", [_number(1), PER_CHANNEL], "folded", _padding(1.5)),
    ("Mean", [_number(3)], "folded", _padding(1.5)),
    ("Mean", [_number(0), _number(0)], GONE, GONE),
    ("Max", [_number(0.25)], "folded", _padding(0.25)),
    ("Max", [_number(-1), _number(-2)], GONE, GONE),
    ("Max", [_number(-np.inf)], GONE, GONE),
    ("Min", [_number(-0.25)], "folded", _padding(-0.25)),
    ("Min", [_number(4), _number(np.inf)], GONE, GONE),
    ("Min", [PER_POSITION], GONE, GONE),
    ("PRelu", [_number(0.1)], GONE, GONE),
    ("PRelu", [PER_CHANNEL], GONE, GONE),
    ("PRelu", [PER_CHANNEL.reshape(6, 1, 1)], GONE, GONE),
    ("PRelu", [PER_POSITION], GONE, GONE),
]


@pytest.mark.parametrize(("operator", "others", "plain", "padded"), WITH_CONSTANTS)
def test_with_constants(operator: str, others: list[Array], plain: str, padded: str) -> None:
    attributes = {"fmod": 1} if operator == "Mod" else {}
    assert _mildest(around(operator, *others, kernel=3, **attributes), others) == padded
    if plain != padded:
        assert _mildest(around(operator, *others, **attributes), others) == plain


def _mildest(model: onnx.ModelProto, others: list[Array]) -> str:
    """The fate of channel 1, whose operand `PER_CHANNEL` is told in the table; channel 4 has one of the same kind."""
    surgery = cut(model)
    if any(values.size == 6 for values in others):
        found = fates(model, surgery)
        assert found[1].split(":")[0] == found[4].split(":")[0]
        return found[1].split(";")[0]
    return outcome(model, surgery)


@pytest.mark.parametrize(
    ("operator", "left", "expected"),
    [
        ("Sub", 2.0, "folded"),
        ("Sub", 0.0, "removed"),
        ("Pow", 2.0, "folded"),
        ("Max", 1.0, "folded"),
        ("Div", 0.0, "removed"),
        ("Mul", 0.5, "removed"),
    ],
)
def test_with_a_constant_on_the_left(operator: str, left: float, expected: str) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    shift = _number(1) if operator == "Div" else _number(0)  # 0 / 0 is no number
    x = net.node("Add", [net.node("Abs", [x], "abs"), net.constant("shift", shift)], "shifted")
    x = net.node(operator, [net.constant("left", _number(left)), x], "tested")
    model = net.model(net.conv(x, 4, "two", kernel=1))
    if operator == "Div":
        assert names(cut(model).model) >= {"two"}
        assert not np.any(weight(compress(model).model, "two")), "0 / x is zero in all channels"
    else:
        assert outcome(model) == expected


@pytest.mark.parametrize(
    ("operator", "first", "second"),
    [
        ("Add", 0.5, 2.0),
        ("Sub", 0.5, 2.0),
        ("Mul", 0.5, 3.0),
        ("Div", 0.5, 4.0),
        ("Div", 4.0, 0.5),
        ("Pow", 0.5, -2.0),
        ("Pow", 2.0, 0.5),
        ("Mod", 0.5, 0.3),
        ("Mod", 0.5, -0.3),
        ("Mean", 0.5, 2.0),
        ("Sum", 0.5, 2.0),
        ("Max", 0.5, 2.0),
        ("Max", 2.0, 0.5),
        ("Min", 0.5, 2.0),
        ("Min", 2.0, 0.5),
        ("PRelu", -0.5, 0.2),
        ("PRelu", 0.5, 0.2),
    ],
)
def test_constants_are_computed_as_onnx_runtime_does(operator: str, first: float, second: float) -> None:
    """`cut` compares the outputs, in which the constant is part of a bias."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Add", [net.node("Abs", [x], "abs"), net.constant("first", _number(first))], "shifted")
    attributes = {"fmod": 1} if operator == "Mod" else {}
    x = net.node(operator, [x, net.constant("second", _number(second))], "tested", **attributes)
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == "folded"


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("Add", [1, 2]),
        ("Sub", [1, 2]),
        ("Sum", [1, 2]),
        ("Mean", [1, 2]),
        ("Max", [1, 2]),
        ("Min", [0, 1, 2, 3]),  # of numbers that are not below zero, as these, one zero is enough
        ("Mul", [0, 1, 2, 3]),  # of all numbers
        ("PRelu", [0, 1, 2]),
    ],
)
def test_partners_go_together(operator: str, expected: list[int]) -> None:
    """Closed are 0, 1, 2 of the first and 1, 2, 3 of the second."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "r1"), [0, 1, 2], "g1")
    y = net.gate(net.relu(net.conv("input", 6, "two"), "r2"), [1, 2, 3], "g2")
    model = net.model(net.conv(net.node(operator, [x, y], "both"), 4, "last"))
    surgery = cut(model)
    assert _cut_columns(model, surgery) == expected
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[0] == 6 - len(expected)


@pytest.mark.parametrize(("operator", "expected"), [("Div", [0, 1, 2]), ("Pow", []), ("Mod", [0, 1, 2])])
def test_partners_of_which_one_may_not_be_zero(operator: str, expected: list[int]) -> None:
    """Zero divided by anything is zero; to the power of anything it might be one."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "r1"), [0, 1, 2], "g1")
    y = net.node("Sigmoid", [net.conv("input", 6, "two")], "s2")
    attributes = {"fmod": 1} if operator == "Mod" else {}
    x = net.node(operator, [x, y], "both", **attributes)
    model = net.model(net.conv(x, 4, "last"))
    surgery = cut(model)
    assert _cut_columns(model, surgery) == expected
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[0] == 6 - len(expected)


def _cut_columns(model: onnx.ModelProto, surgery: Surgery) -> list[int]:
    """The inputs of `last` that are not there any more."""
    left = {column.tobytes() for column in weight(surgery.model, "last").swapaxes(0, 1)}
    return [i for i, column in enumerate(weight(model, "last").swapaxes(0, 1)) if column.tobytes() not in left]


@pytest.mark.parametrize("operator", ["Div", "Mod", "Pow"])
def test_a_divisor_that_nobody_needs_but_that_is_kept_stays_what_it_was(operator: str) -> None:
    """Channel 1 is closed behind the quotient and kept by its group: 0 / 0 must not come out there."""
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "r1")
    y = net.node("Abs", [net.conv("input", 6, "two")], "s2")
    if operator == "Pow":  # infinite at zero
        x, y = y, net.constant("power", _number(-2))
    attributes = {"fmod": 1} if operator == "Mod" else {}
    x = net.gate(net.node(operator, [x, y], "both", **attributes), [1], "gate")
    model = net.model(net.conv(x, 4, "last", group=2))
    surgery = cut(model)
    assert "gate" not in names(surgery.model)
    assert [entry["reason"] for entry in surgery.report["cuts_not_made"]] == [
        "every group keeps as many channels as the fullest one"
    ]
    assert weight(surgery.model, "two").tobytes() == weight(model, "two").tobytes()


@pytest.mark.parametrize(("divisor", "opens"), [(_number(2), True), (PER_POSITION, True), (PER_POSITION - 1, False)])
def test_a_gate_opens_before_a_quotient_that_stays_finite(divisor: Array, opens: bool) -> None:
    """Its channels are in use elsewhere; divided by zero, what it lets through would be infinite."""
    net = Net()
    trunk = net.relu(net.conv("input", 6, "one"), "act")
    x = net.node("Div", [net.gate(trunk, CLOSED, "gate"), net.constant("divisor", divisor)], "tested")
    x = net.node("Clip", [x, net.constant("low", _number(-9)), net.constant("high", _number(9))], "finite")
    surgery = compress(net.model(net.add(net.conv(x, 4, "two"), net.conv(trunk, 4, "side"), "sum")), verify=opens)
    assert ("gate" in names(surgery.model)) == (not opens)


def test_a_divisor_that_is_replaced_by_constants_is_zero_nowhere() -> None:
    """It is 1 wherever the result is needed; channel 1 of the result is closed and kept by its group."""
    net = Net()
    y = net.gate(net.conv("input", 6, "two"), [0, 2, 3, 4, 5], "gate.y")
    y = net.node("Add", [net.node("Abs", [y], "abs"), net.constant("unit", _number(1))], "divisor")
    x = net.gate(net.node("Div", [net.conv("input", 6, "one"), y], "both"), [1], "gate")
    smaller = cut(net.model(net.conv(x, 4, "last", group=2))).model
    assert not {"two", "divisor"} & names(smaller)
    assert "both" not in names(smaller), "it divides by 1"


def test_a_tensor_that_is_an_operand_twice_is_replaced_twice_or_not_at_all() -> None:
    """All is closed. The tensor keeps six channels as a graph output, the Sum one for the layer behind it."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), range(6), "gate")
    y = net.gate(net.conv("input", 6, "other"), range(6), "gate2")
    surgery = cut(net.model(net.conv(net.node("Sum", [x, y, x], "sum"), 4, "two"), x))
    assert weight(surgery.model, "two").shape[1] == 1
    assert constant(surgery.model, "one.bias").tolist() == [0] * 6


def test_the_input_of_prelu_is_not_replaced_by_something_smaller() -> None:
    """Its slope may not be larger than what it is applied to."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), range(6), "gate")
    x = net.node("Sub", [x, net.constant("two.point", _number(2))], "shifted")
    x = net.node("PRelu", [x, net.conv("input", 6, "slope")], "tested")
    smaller = cut(net.model(net.conv(x, 4, "two"))).model
    assert {"one", "tested", "slope"} <= names(smaller)
    assert not np.any(weight(smaller, "one"))


@pytest.mark.parametrize(("shift", "left"), [(0.5, True), (0.0, False)])
def test_what_is_compared_is_not_replaced_by_a_rounded_constant(shift: float, left: bool) -> None:
    """The other operand may come from the same numbers: equal before, equal after. Zero is the same everywhere."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), range(6), "gate")
    x = net.node("Add", [x, net.constant("shift", _number(shift))], "shifted")
    x = net.node("Less", [x, net.conv("input", 6, "other")], "tested")
    x = net.node("Cast", [x], "number", to=1)
    smaller = cut(net.model(net.conv(x, 4, "two"))).model
    assert ("one" in names(smaller)) == left


def test_a_dividend_that_nobody_needs_becomes_zero() -> None:
    """Channel 1 goes from the divisor's use, not from the divisor: it is needed elsewhere, so that 0 / y is zero."""
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "r1")
    y = net.node("Sigmoid", [net.conv("input", 6, "two")], "s2")
    quotient = net.gate(net.node("Div", [x, y], "both"), CLOSED, "gate")
    side = net.conv(y, 4, "side")
    model = net.model(net.add(net.conv(quotient, 4, "last"), side, "sum"))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 6
    assert not np.any(weight(surgery.model, "one")[list(CLOSED)])
    assert "gate" not in names(surgery.model)


def test_zero_times_infinity_is_not_called_zero() -> None:
    """The graph as given answers NaN where it multiplies them; Max makes a number of it again, the lower bound."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Mul", [x, net.constant("inf", _number(np.inf))], "tested")
    surgery = compress(net.model(net.conv(x, 4, "two")), verify=False)
    assert weight(surgery.model, "one").shape[0] == 6


def test_infinite_factors_do_not_meet_the_zeros_of_a_cut() -> None:
    """tanh(inf * x) is one for x > 0: closed behind it and kept by its group, x may not become zero."""
    net = Net()
    x = net.node("Softplus", [net.conv("input", 6, "one")], "positive")
    x = net.node("Sub", [x, net.constant("half", _number(np.log(2)))], "centred")  # zero where the filter is
    x = net.node("Abs", [x], "abs")
    x = net.node("Tanh", [net.node("Mul", [x, net.constant("inf", _number(np.inf))], "tested")], "tanh")
    model = net.model(net.conv(net.gate(x, [1], "gate"), 4, "two", group=2))
    surgery = cut(model)
    assert "gate" not in names(surgery.model)
    assert np.any(weight(surgery.model, "one")[1])


@pytest.mark.parametrize(("kind", "left"), [(onnx.TensorProto.FLOAT, False), (onnx.TensorProto.FLOAT16, True)])
def test_squares_in_half_precision_overflow(kind: int, left: bool) -> None:
    """The trunk is in use elsewhere. Were the gate to open, squares of up to 90,000 would be infinite in float16."""
    net = Net()
    trunk = net.node("Clip", [net.conv("input", 6, "one"), *_bounds(net)], "trunk")
    x = net.gate(trunk, CLOSED, "gate")
    x = net.conv(net.node("Mul", [x, x], "square"), 4, "two")
    model = net.model(net.add(x, net.conv(trunk, 4, "side"), "sum"))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    surgery = compress(model, verify=False)  # ONNX Runtime does not compute in float16
    assert ("gate" in names(surgery.model)) == left
    assert surgery.report["gates"][0]["outcome"] == ("kept" if left else "folded")


def _bounds(net: Net) -> list[str]:
    return [net.constant("low", _number(-300)), net.constant("high", _number(300))]


@pytest.mark.parametrize(
    ("operator", "threshold", "expected"),
    [
        ("Greater", 0.5, "removed"),
        ("Greater", -0.5, "folded"),
        ("Greater", 0.0, "removed"),
        ("GreaterOrEqual", 0.0, "folded"),
        ("Less", 0.5, "folded"),
        ("Less", 0.0, "removed"),
        ("LessOrEqual", 0.0, "folded"),
        ("LessOrEqual", -1.0, "removed"),
        ("Equal", 0.0, "folded"),
        ("Equal", 1.0, "removed"),
    ],
)
def test_comparisons_with_zero_are_exact(operator: str, threshold: float, expected: str) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node(operator, [x, net.constant("threshold", _number(threshold))], "tested")
    x = net.node("Cast", [x], "number", to=1)
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == expected


@pytest.mark.parametrize(("threshold", "expected"), [(0.4, "folded"), (0.6, "removed"), (0.5, IN_USE), (0.501, IN_USE)])
def test_comparisons_of_computed_constants_need_a_margin(threshold: float, expected: str) -> None:
    """sigmoid(0) is 0.5, or what a runtime makes of it."""
    net = Net()
    x = net.node("Sigmoid", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "half")
    x = net.node("Greater", [x, net.constant("threshold", _number(threshold))], "tested")
    x = net.node("Cast", [x], "number", to=1)
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == expected


@pytest.mark.parametrize(
    ("operator", "other", "expected"),
    [
        ("And", True, "removed"),
        ("And", None, "removed"),
        ("Or", False, "removed"),
        ("Or", True, None),
        ("Or", None, "kept: it goes together with channels in use, in other"),
        ("Xor", False, "removed"),
        ("Xor", True, "folded"),
        ("Xor", None, "kept: it goes together with channels in use, in other"),
        ("Equal", False, "folded"),
    ],
)
def test_logic(operator: str, other: bool | None, expected: str | None) -> None:
    """Closed channels are false. The other operand is true or false in all channels, or computed (None)."""
    net = Net()
    zero = net.constant("zero", _number(0))
    x = net.node("Greater", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate"), zero], "positive")
    if other is None:
        partner = net.node("Greater", [net.conv("input", 6, "other"), zero], "partner")
    else:
        partner = net.constant("partner", np.array(other))
    x = net.node("Cast", [net.node(operator, [x, partner], "tested")], "number", to=1)
    model = net.model(net.conv(x, 4, "two", kernel=1))
    surgery = cut(model)
    if expected is None:  # true in all channels: there is nothing to look at
        assert weight(surgery.model, "one").shape[0] == 1
    else:
        assert outcome(model, surgery) == expected


@pytest.mark.parametrize(("operator", "dropped"), [("And", True), ("Or", False), ("Xor", False)])
def test_logic_with_what_changes_nothing_goes(operator: str, dropped: bool) -> None:
    net = Net()
    x = net.node("Greater", [net.conv("input", 6, "one"), net.constant("zero", _number(0))], "positive")
    x = net.node(operator, [x, net.constant("neutral", np.full((6, 1, 1), dropped))], "tested")
    x = net.node("Cast", [x], "number", to=1)
    assert "tested" not in names(cut(net.model(net.conv(x, 4, "two"))).model)


@pytest.mark.parametrize(
    ("first", "second", "operator"),
    [(7, 2, "Div"), (-7, 2, "Div"), (7, 4, "Mod"), (-7, 4, "Mod"), (100, 100, "Add"), (5, 3, "Pow"), (3, 9, "Sub")],
)
def test_integers_are_computed_as_integers(first: int, second: int, operator: str) -> None:
    """Division goes towards zero, and modulo has the divisor's sign: 3 channels of each outcome lie in a bias."""
    net = Net()
    x = net.node("Cast", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "whole", to=6)
    x = net.node("Add", [x, net.constant("first", np.array(first, np.int32))], "shifted")
    x = net.node(operator, [x, net.constant("second", np.array(second, np.int32))], "tested")
    x = net.node("Cast", [x], "number", to=1)
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == "folded"


def test_integers_that_wrap_around_are_no_constants() -> None:
    net = Net(opset=14)
    x = net.node("Cast", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "whole", to=3)
    x = net.node("Add", [x, net.constant("first", np.array(100, np.int8))], "shifted")
    x = net.node("Add", [x, net.constant("second", np.array(100, np.int8))], "tested")
    x = net.node("Cast", [x], "number", to=1)
    model = net.model(net.conv(x, 4, "two", kernel=1))
    surgery = compress(model)
    assert outcome(model, surgery) == IN_USE


@pytest.mark.parametrize(
    ("operator", "extra", "known"),
    [
        ("Add", _number(1), True),
        ("Add", _number(-1), False),
        ("Sub", _number(1), False),
        ("Mul", _number(2), True),
        ("Mul", _number(-2), False),
        ("Div", _number(2), True),
        ("Mean", _number(1), True),
        ("Min", _number(1), True),
        ("Min", _number(-1), False),
        ("Max", _number(-1), True),
        ("PRelu", _number(-1), True),
        ("Pow", _number(0.5), True),
        ("Mod", _number(-3), True),
    ],
)
def test_a_relu_behind_what_is_never_below_zero_goes(operator: str, extra: Array, known: bool) -> None:
    """What comes in is the result of another Relu."""
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "first")
    attributes = {"fmod": 1} if operator == "Mod" else {}  # it has the sign of what is divided
    x = net.node(operator, [x, net.constant("extra", extra)], "tested", **attributes)
    smaller = compress(net.model(net.conv(net.relu(x, "relu"), 4, "two")), verify=False).model
    assert ("relu" in names(smaller)) == (not known)


@pytest.mark.parametrize(
    ("operator", "extra", "known"),
    [("Pow", 2.0, True), ("Pow", 3.0, False), ("Max", 0.0, True), ("Max", -1.0, False), ("Mul", 0.5, False)],
)
def test_a_relu_behind_even_powers_goes(operator: str, extra: float, known: bool) -> None:
    """What comes in has any sign."""
    net = Net()
    x = net.node(operator, [net.conv("input", 6, "one"), net.constant("extra", _number(extra))], "tested")
    smaller = compress(net.model(net.conv(net.relu(x, "relu"), 4, "two")), verify=False).model
    assert ("relu" in names(smaller)) == (not known)


@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_slopes_a_channel_are_cut(shape: tuple[int, ...]) -> None:
    slopes = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32).reshape(shape)
    surgery = cut(around("PRelu", slopes))
    np.testing.assert_array_equal(constant(surgery.model, "extra0").ravel(), slopes.ravel()[[0, 2, 3, 5]])


@pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (8, 8)])
def test_slopes_that_all_channels_share_stay(shape: tuple[int, ...]) -> None:
    surgery = cut(around("PRelu", np.full(shape, 0.25, np.float32)))
    assert constant(surgery.model, "extra0").shape == shape


def test_terms_of_a_sum_that_are_zero_go() -> None:
    """One of three branches is closed: the Sum has two terms, and the branch is gone."""
    net = Net()
    a, b = net.conv("input", 4, "a"), net.conv("input", 4, "b")
    c = net.gate(net.conv(net.relu(net.conv("input", 4, "c1"), "act"), 4, "c2"), range(4), "gate")
    smaller = cut(net.model(net.node("Sum", [a, c, b], "sum"))).model
    assert [list(node.input) for node in smaller.graph.node if node.name == "sum"] == [["a", "b"]]
    assert not {"c1", "c2"} & names(smaller)


def test_a_mean_counts_what_is_zero() -> None:
    net = Net()
    a = net.conv("input", 4, "a")
    b = net.gate(net.conv("input", 4, "b"), range(4), "gate")
    smaller = cut(net.model(net.node("Mean", [a, b], "mean"))).model
    assert operators(smaller) == {"Conv": 1, "Mean": 1}


def test_tensors_with_channels_on_different_axes() -> None:
    """A weight a position, made by a product over the width, is joined with the trunk: neither disturbs the other."""
    net = Net(size=6)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    y = net.conv("input", 1, "map", kernel=1)
    y = net.node("MatMul", [y, net.constant("w", net.random.standard_normal((6, 6)).astype("f"))], "product")
    net.width[y] = 1
    assert outcome(net.model(net.conv(net.node("Mul", [x, y], "weighted"), 4, "two"))) == "removed"


def test_one_map_for_all_channels() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    y = net.node("Sigmoid", [net.conv("input", 1, "map")], "attention")
    model = net.model(net.conv(net.node("Mul", [x, y], "weighted"), 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert weight(surgery.model, "map").shape[0] == 1


def test_one_channel_spread_over_many_by_a_constant() -> None:
    """[batch, 1, ...] + [6, 1, 1]: six channels of which one filter is the source."""
    net = Net()
    x = net.node("Add", [net.conv("input", 1, "one"), net.constant("six", PER_CHANNEL)], "spread")
    net.width[x] = 6
    x = net.gate(net.relu(x, "act"), CLOSED, "gate")
    smaller = cut(net.model(net.conv(x, 4, "two"))).model
    assert weight(smaller, "one").shape[0] == 1
    assert weight(smaller, "two").shape[1] == 4
    assert constant(smaller, "six").ravel().tolist() == [3, -1, 2, 1]


def test_operands_that_are_no_numbers_or_have_no_elements_are_walls() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    model = net.model(net.node("Add", [x, net.constant("none", np.zeros((0,), np.float32))], "tested"), ranks=[4])
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 1
    surgery = compress(model, verify=False)
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["unsupported"] == [
        {"node": "tested", "operator": "Add", "reason": "one of its inputs has no elements"}
    ]


def test_swiglu_in_the_reference_as_no_runtime_has_it() -> None:
    net = Net(opset=28)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    y = net.gate(net.conv("input", 6, "other"), [0], "gate2")
    model = net.model(net.conv(net.node("SwiGLU", [x, y], "tested", alpha=1.5), 4, "two"))
    surgery = compress(model, verify=False)
    assert fates(model, surgery, closed=(0, *CLOSED)) == ["removed", "removed", "open", "open", "removed", "open"]
    feeds = {"input": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    (expected,), (found,) = (ReferenceEvaluator(m).run(None, feeds) for m in (model, surgery.model))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
