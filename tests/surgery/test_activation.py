"""Functions of one tensor: what a closed channel becomes behind each of them, and what is known of their results."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from polar_deploy.surgery import compress
from polar_deploy.surgery.ops import activation, cast, unary
from polar_deploy.surgery.ops.activation import Unary
from tests.surgery.graphs import CLOSED, Array, Net, around, cut, fates, names, outcome, weight

# The last ONNX Runtime for Python 3.10 is 1.23.
needs_opset_24 = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24), reason="this ONNX Runtime ends at opset 23"
)


def _swish(**attributes: Any) -> Any:
    return pytest.param("Swish", 24, attributes, marks=needs_opset_24)


def _bound(value: float) -> Array:
    return np.array(value, np.float32)


ZERO_AT_ZERO: list[Any] = [
    ("Relu", 17, {}),
    ("LeakyRelu", 17, {"alpha": 0.2}),
    ("ThresholdedRelu", 17, {"alpha": 0.5}),
    ("Elu", 17, {"alpha": 0.5}),
    ("Selu", 17, {}),
    ("Celu", 17, {"alpha": 2.0}),
    ("Gelu", 20, {}),
    ("Gelu", 20, {"approximate": "tanh"}),
    ("HardSwish", 17, {}),
    _swish(alpha=1.5),
    ("Mish", 18, {}),
    ("Tanh", 17, {}),
    ("Softsign", 17, {}),
    ("Shrink", 17, {"lambd": 0.5, "bias": 0.25}),
    ("HardSigmoid", 17, {"beta": 0.0}),
    ("Clip", 10, {"min": -2.0, "max": 2.0}),
    ("Abs", 17, {}),
    ("Neg", 17, {}),
    ("Erf", 17, {}),
    ("Sign", 17, {}),
    ("Floor", 17, {}),
    ("Ceil", 17, {}),
    ("Round", 17, {}),
    ("Sin", 17, {}),
    ("Tan", 17, {}),
    ("Atan", 17, {}),
    ("Sinh", 17, {}),
    ("Asinh", 17, {}),
    ("Identity", 17, {}),
    ("Dropout", 17, {}),
    ("Dropout", 7, {"ratio": 0.3}),
    ("Cast", 17, {"to": 1}),
]
CONSTANT_AT_ZERO = [
    ("Sigmoid", 0.5, {}),
    ("HardSigmoid", 0.6, {"alpha": 0.3, "beta": 0.6}),
    ("Softplus", 0.693147, {}),
    ("Exp", 1, {}),
    ("Cos", 1, {}),
    ("Cosh", 1, {}),
]


@pytest.mark.parametrize(("operator", "opset", "attributes"), ZERO_AT_ZERO)
def test_zero_stays_zero(operator: str, opset: int, attributes: dict[str, Any]) -> None:
    model = around(operator, opset=opset, kernel=3, **attributes)
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert surgery.report["unsupported"] == []


@pytest.mark.parametrize(("operator", "value", "attributes"), CONSTANT_AT_ZERO)
def test_zero_becomes_a_constant(operator: str, value: float, attributes: dict[str, Any]) -> None:
    """It goes into the next bias, or stays where it meets zero padding."""
    assert outcome(around(operator, **attributes)) == "folded"
    padded = outcome(around(operator, kernel=3, **attributes))
    assert padded == f"kept: the constant {value:g} meets the zero padding"


@pytest.mark.parametrize(
    ("bounds", "padded"),
    [
        ((_bound(-1), _bound(6)), "removed"),
        ((_bound(0),), "removed"),
        ((_bound(0.5), _bound(2)), "kept: the constant 0.5 meets the zero padding"),
        ((_bound(-2), _bound(-1)), "kept: the constant -1 meets the zero padding"),
        ((_bound(3), _bound(2)), "kept: the constant 2 meets the zero padding"),  # the upper bound wins
        ((_bound(-np.inf), _bound(np.inf)), "removed"),
    ],
)
def test_clip_with_bounds_as_inputs(bounds: tuple[Array, ...], padded: str) -> None:
    assert outcome(around("Clip", *bounds, kernel=3)) == padded


def test_clip_with_an_upper_bound_only() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Clip", [x, "", net.constant("high", _bound(-0.5))], "tested")
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == "folded"


@pytest.mark.parametrize(
    ("before", "expected"), [(True, "kept: it goes together with channels in use, in tested"), (False, "removed")]
)
def test_clip_with_a_computed_bound(before: bool, expected: str) -> None:
    """Nobody knows what a closed channel becomes; channels that are closed behind it go."""
    net = Net()
    x = net.conv("input", 6, "one")
    x = net.gate(x, CLOSED, "gate") if before else x
    bound = net.node("ReduceMean", ["input"], "bound", keepdims=0)
    x = net.node("Clip", [x, bound], "tested")
    x = x if before else net.gate(x, CLOSED, "gate")
    assert outcome(net.model(net.conv(x, 4, "two"))) == expected


@pytest.mark.parametrize("operator", ["Log", "Reciprocal"])
def test_what_is_infinite_is_no_constant(operator: str) -> None:
    """The Clip behind makes f(0) finite, but what it is clipped from is nothing to compute with."""
    net = Net()
    x = net.node("Abs", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "positive")
    x = net.node(operator, [x], "tested")
    x = net.node("Clip", [x, net.constant("low", _bound(-3)), net.constant("high", _bound(3))], "finite")
    assert (
        outcome(net.model(net.conv(x, 4, "two", kernel=1))) == "kept: it goes together with channels in use, in tested"
    )


DOMAINS = [
    ("Sqrt", 17),
    ("Log", 17),
    ("Reciprocal", 17),
    ("Asin", 17),
    ("Acos", 17),
    ("Acosh", 17),
    ("Atanh", 17),
    ("Exp", 7),
]


@pytest.mark.parametrize(("operator", "opset"), DOMAINS)
def test_functions_with_a_domain_let_closed_channels_go(operator: str, opset: int) -> None:
    """Closed behind the function: layer and function lose them, whatever the function would make of zero."""
    net = Net(opset=opset)
    x = net.node("Sigmoid", [net.conv("input", 6, "one")], "positive")
    if operator == "Acosh":
        x = net.node("Add", [x, net.constant("shift", _bound(1))], "shifted")
    x = net.gate(net.node(operator, [x], "tested"), CLOSED, "gate")
    surgery = cut(model := net.model(net.conv(x, 4, "two")))
    assert fates(model, surgery) == ["open", "removed", "open", "open", "removed", "open"]
    assert "gate" not in names(surgery.model)


@pytest.mark.parametrize(
    ("operator", "needed"),
    [("Reciprocal", True), ("Log", True), ("Sqrt", False), ("Abs", False), ("Exp", False)],
)
def test_kept_channels_that_nobody_needs_stay_finite(operator: str, needed: bool) -> None:
    """One channel of a group is closed and stays because the other group is full: 0 * f(0) must be a number.

    Where f(0) is infinite, the filter keeps its values, else it becomes zero.
    """
    net = Net()
    x = net.node("Abs", [net.conv("input", 6, "one")], "positive")
    x = net.gate(net.node(operator, [x], "tested"), [1], "gate")
    model = net.model(net.conv(x, 4, "two", group=2))
    surgery = cut(model)
    found = fates(model, surgery, closed=[1])
    assert found[1] == "kept: every group keeps as many channels as the fullest one"
    assert np.any(weight(surgery.model, "one")[1]) == needed
    assert "gate" not in names(surgery.model)
    assert not np.any(weight(surgery.model, "two")[:2, 1])


@pytest.mark.parametrize(("operator", "outcome"), [("Exp", "kept"), ("Elu", "folded")])
def test_a_gate_does_not_open_before_what_overflows(operator: str, outcome: str) -> None:
    """Channels that are large and in use elsewhere: Exp of them is infinite, so the gate in front of it stays shut."""
    net = Net()
    trunk = net.conv("input", 6, "one")
    for tensor in net.constants:
        if tensor.name == "one.bias":
            large = np.array([0, 200, 0, 0, 200, 0], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(large, "one.bias"))
    x = net.node(operator, [net.gate(trunk, CLOSED, "gate")], "tested")
    side = net.conv(net.relu(trunk, "act"), 4, "side")
    surgery = cut(net.model(net.add(net.conv(x, 4, "two", kernel=1), side, "sum")))
    assert surgery.report["gates"][0]["outcome"] == outcome
    assert ("gate" in names(surgery.model)) == (outcome == "kept")


KINDS = {"FLOAT16": 10, "DOUBLE": 11, "INT32": 6, "INT8": 3, "UINT8": 2, "INT64": 7, "BOOL": 9, "BFLOAT16": 16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["Cast", "CastLike"])
def test_casts_to_all_kinds_of_numbers_and_back(operator: str, kind: str) -> None:
    net = Net(opset=19)
    x = net.node("Abs", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "positive")
    if operator == "Cast":
        x = net.node("Cast", [x], "there", to=KINDS[kind])
    else:
        dtype = helper.tensor_dtype_to_np_dtype(KINDS[kind])
        x = net.node("CastLike", [x, net.constant("like", np.zeros(1, dtype))], "there")
    x = net.node("Cast", [x], "back", to=1)
    assert outcome(net.model(net.conv(x, 4, "two"))) == "removed"


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (2.7, "INT32", "kept: the constant 2 meets the zero padding"),
        (-2.7, "INT32", "kept: the constant -2 meets the zero padding"),
        (0.5, "BOOL", "kept: the constant 1 meets the zero padding"),
        (-0.5, "INT32", "removed"),
        (
            2.0,
            "INT32",
            "kept: it goes together with channels in use, in there",
        ),  # or 1.9999999 in the layer's precision
        (300.5, "UINT8", "kept: it goes together with channels in use, in there"),  # every runtime has its own answer
        (3.14159, "FLOAT16", "kept: the constant 3.14062 meets the zero padding"),
        (3.14159, "DOUBLE", "kept: the constant 3.14159 meets the zero padding"),
    ],
)
def test_constants_are_cast_as_the_operator_does(value: float, kind: str, expected: str) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("value", _bound(value))], "shifted")
    x = net.node("Clip", [x, net.constant("low", _bound(-9)), net.constant("high", _bound(400))], "clipped")
    x = net.node("Cast", [net.node("Cast", [x], "there", to=KINDS[kind])], "back", to=1)
    assert outcome(net.model(net.conv(x, 4, "two"))) == expected


def test_castlike_asks_its_second_input_for_its_type_only() -> None:
    """All channels of `other` are closed behind it: what is left of it is one channel that says `float`."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    other = net.gate(net.conv("input", 6, "other"), range(6), "gate2")
    x = net.node("CastLike", [x, other], "tested")
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert weight(surgery.model, "other").shape[0] == 1


def test_a_cast_to_text_is_a_wall() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Cast", [net.node("Cast", [x], "text", to=8)], "back", to=1)
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "kept: it casts from or to what is no number"


@pytest.mark.parametrize(
    ("operator", "opset", "attributes", "known"),
    [
        ("Relu", 17, {}, True),
        ("Abs", 17, {}, True),
        ("Sigmoid", 17, {}, True),
        ("HardSigmoid", 17, {}, True),
        ("Softplus", 17, {}, True),
        ("Exp", 17, {}, True),
        ("Cosh", 17, {}, True),
        ("Clip", 10, {"min": 0.0, "max": 6.0}, True),
        ("Clip", 10, {"min": 0.0}, True),
        ("ThresholdedRelu", 17, {}, False),  # alpha might be below zero: only what comes in counts
        ("Clip", 10, {"min": -1.0, "max": 6.0}, False),
        ("LeakyRelu", 17, {}, False),
        ("Tanh", 17, {}, False),
        ("Neg", 17, {}, False),
        ("Identity", 17, {}, False),
    ],
)
def test_a_relu_behind_what_is_never_below_zero_goes(
    operator: str, opset: int, attributes: dict[str, Any], known: bool
) -> None:
    net = Net(opset=opset)
    x = net.node(operator, [net.conv("input", 6, "one")], "tested", **attributes)
    smaller = compress(net.model(net.conv(net.relu(x, "relu"), 4, "two")), verify=False).model
    assert ("relu" in names(smaller)) == (not known)


@pytest.mark.parametrize(
    ("operator", "opset", "attributes", "known"),
    [
        ("Sqrt", 17, {}, True),
        ("Floor", 17, {}, True),
        ("Ceil", 17, {}, True),
        ("Round", 17, {}, True),
        ("Sign", 17, {}, True),
        ("Tanh", 17, {}, True),
        ("Erf", 17, {}, True),
        ("Atan", 17, {}, True),
        ("Sinh", 17, {}, True),
        ("Softsign", 17, {}, True),
        ("LeakyRelu", 17, {}, True),
        ("ThresholdedRelu", 17, {"alpha": -1.0}, True),
        ("Elu", 17, {}, True),
        ("Celu", 17, {}, True),
        ("Gelu", 20, {}, True),
        ("HardSwish", 17, {}, True),
        ("Mish", 18, {}, True),
        ("Identity", 17, {}, True),
        ("Dropout", 17, {}, True),
        ("Clip", 10, {"min": -1.0, "max": 6.0}, True),
        ("Clip", 10, {"max": -1.0}, False),
        ("Selu", 17, {"gamma": -1.0}, False),
        ("Shrink", 17, {"lambd": 0.5, "bias": 1.0}, False),
        ("Neg", 17, {}, False),
        ("Sin", 17, {}, False),
        ("Cos", 17, {}, False),
    ],
)
def test_a_second_relu_goes_where_the_function_keeps_the_sign(
    operator: str, opset: int, attributes: dict[str, Any], known: bool
) -> None:
    net = Net(opset=opset)
    x = net.node(operator, [net.relu(net.conv("input", 6, "one"), "first")], "tested", **attributes)
    smaller = compress(net.model(net.conv(net.relu(x, "relu"), 4, "two")), verify=False).model
    assert ("relu" in names(smaller)) == (not known)


def _gelu(net: Net, x: str) -> str:
    """As exporters write it: Div, Erf, Add, Mul, Mul."""
    scaled = net.node("Div", [x, net.constant("root", _bound(2**0.5))], "scaled")
    inner = net.node("Add", [net.node("Erf", [scaled], "erf"), net.constant("one1", _bound(1))], "inner")
    return net.node("Mul", [net.node("Mul", [x, inner], "product"), net.constant("half", _bound(0.5))], "gelu")


def _gelu_tanh(net: Net, x: str) -> str:
    cube = net.node("Pow", [x, net.constant("three", _bound(3))], "cube")
    cube = net.node("Mul", [cube, net.constant("factor", _bound(0.044715))], "scaled")
    inner = net.node("Mul", [net.add(x, cube, "poly"), net.constant("root", _bound((2 / np.pi) ** 0.5))], "inner")
    inner = net.node("Add", [net.node("Tanh", [inner], "tanh"), net.constant("one1", _bound(1))], "shifted")
    return net.node("Mul", [net.node("Mul", [x, net.constant("half", _bound(0.5))], "halved"), inner], "gelu")


def _silu(net: Net, x: str) -> str:
    return net.node("Mul", [x, net.node("Sigmoid", [x], "sigmoid")], "silu")


def _mish(net: Net, x: str) -> str:
    return net.node("Mul", [x, net.node("Tanh", [net.node("Softplus", [x], "softplus")], "tanh")], "mish")


def _hard_swish(net: Net, x: str) -> str:
    x3 = net.node("Add", [x, net.constant("three", _bound(3))], "shifted")
    x6 = net.node("Clip", [x3, net.constant("low", _bound(0)), net.constant("high", _bound(6))], "relu6")
    return net.node("Div", [net.node("Mul", [x, x6], "product"), net.constant("six", _bound(6))], "hardswish")


@pytest.mark.parametrize("write", [_gelu, _gelu_tanh, _silu, _mish, _hard_swish])
@pytest.mark.parametrize("before", [True, False])
def test_activations_in_pieces_let_closed_channels_go(write: Any, before: bool) -> None:
    """Closed before the pieces or behind them."""
    net = Net()
    x = net.conv("input", 6, "one")
    x = write(net, net.gate(x, CLOSED, "gate")) if before else net.gate(write(net, x), CLOSED, "gate")
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert "gate" not in names(surgery.model)
    assert surgery.report["cuts_not_made"] == []


@pytest.mark.parametrize("write", [_gelu, _gelu_tanh, _silu, _mish, _hard_swish])
def test_a_gate_before_an_activation_in_pieces_opens_where_its_channels_stay(write: Any) -> None:
    """They are in use elsewhere; behind the gate nobody needs them, so that it can open and go."""
    net = Net()
    trunk = net.relu(net.conv("input", 6, "one"), "act")
    x = write(net, net.gate(trunk, CLOSED, "gate"))
    surgery = cut(net.model(net.add(net.conv(x, 4, "two"), net.conv(trunk, 4, "side"), "sum")))
    assert weight(surgery.model, "one").shape[0] == 6
    assert "gate" not in names(surgery.model)
    assert not np.any(weight(surgery.model, "two")[:, CLOSED])


def test_a_dropout_whose_mask_is_used_is_a_wall() -> None:
    net = Net()
    x = net.node("Dropout", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "tested")
    net.nodes[-1].output.append("mask")
    net.width["mask"] = 6
    both = net.node("Mul", [x, net.node("Cast", ["mask"], "floats", to=1)], "both")
    assert outcome(net.model(net.conv(both, 4, "two"))) == "kept: its mask is used"


def test_a_dropout_in_training_mode_is_a_wall() -> None:
    """It draws random numbers, so that nothing can be compared."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Dropout", [x, "", net.constant("training", np.array(True))], "tested")
    model = net.model(net.conv(x, 4, "two"))
    assert outcome(model, compress(model, verify=False)) == "kept: it is in training mode"


@pytest.mark.parametrize("operator", ["IsNaN", "IsInf"])
def test_questions_about_numbers(operator: str) -> None:
    """A closed channel holds a number: the answer is no, which is zero behind a Cast."""
    net = Net(opset=20)
    x = net.node(operator, [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "asked")
    assert outcome(net.model(net.conv(net.node("Cast", [x], "back", to=1), 4, "two"))) == "removed"


def test_not() -> None:
    net = Net()
    x = net.node("Cast", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "truth", to=9)
    x = net.node("Cast", [net.node("Not", [x], "tested")], "back", to=1)
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == "folded"


VALUES = np.array([-3.5, -1, -0.51, 0, 0.3, 0.5, 1, 2.5, 3], np.float32)
ATTRIBUTES: dict[str, list[dict[str, Any]]] = {
    "LeakyRelu": [{}, {"alpha": 0.1}],
    "ThresholdedRelu": [{}, {"alpha": 0.4}],
    "Elu": [{}, {"alpha": 2.0}],
    "Selu": [{}, {"alpha": 2.0, "gamma": 3.0}],
    "Celu": [{}, {"alpha": 2.0}],
    "Gelu": [{}, {"approximate": "tanh"}],
    "HardSigmoid": [{}, {"alpha": 0.3, "beta": 0.1}],
    "Swish": [{}, {"alpha": 2.0}],
    "Shrink": [{}, {"lambd": 0.4, "bias": 0.7}],
}
OPSETS = {"Gelu": 20, "Mish": 18, "Swish": 24}
FUNCTIONS = [
    pytest.param(name, handler, attributes, marks=[needs_opset_24] if name == "Swish" else [])
    for name, handler in {**activation.HANDLERS, **unary.HANDLERS}.items()
    if name not in ("Clip", "Not", "IsNaN", "IsInf")  # tested above
    for attributes in ATTRIBUTES.get(name, [{}])
]


@pytest.mark.parametrize(("operator", "handler", "attributes"), FUNCTIONS)
def test_functions_are_those_of_onnx_runtime(operator: str, handler: Unary, attributes: dict[str, Any]) -> None:
    value = helper.make_tensor_value_info("x", 1, [len(VALUES)])
    result = helper.make_tensor_value_info("y", 1, [len(VALUES)])
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], **attributes)], "one", [value], [result])
    opset = helper.make_opsetid("", OPSETS.get(operator, 17))
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": VALUES})
    with np.errstate(all="ignore"):
        found = handler.function(VALUES.astype(np.float64), attributes)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


def test_every_function_stands_in_a_table_of_this_file() -> None:
    listed = {entry.values[0] if hasattr(entry, "values") else entry[0] for entry in [*ZERO_AT_ZERO, *CONSTANT_AT_ZERO]}
    listed |= {operator for operator, _ in DOMAINS} | {"CastLike", "Not", "IsNaN", "IsInf"}
    assert listed == {*activation.HANDLERS, *unary.HANDLERS, *cast.HANDLERS}
