"""Gates: how they are written, what becomes of them, and that none is left that could go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.surgery import compress
from tests.surgery.graphs import CLOSED, Array, Net, constant, cut, fates, names, operators, outcome, weight

OPEN = np.array([1, 0, 1, 1, 0, 1], bool)
MASK = OPEN.astype(np.float32)


def _constant_node(net: Net, values: Array, name: str) -> str:
    tensor = onnx.numpy_helper.from_array(values, f"{name}.value")
    net.nodes.append(helper.make_node("Constant", [], [name], name=name, value=tensor))
    return name


def _initializer(net: Net) -> str:
    return net.constant("factor", MASK.reshape(1, 6, 1, 1))


def _without_batch(net: Net) -> str:
    return net.constant("factor", MASK.reshape(6, 1, 1))


def _node(net: Net) -> str:
    return _constant_node(net, MASK.reshape(1, 6, 1, 1), "factor")


def _identities(net: Net) -> str:
    x = net.node("Identity", [_node(net)], "same")
    return net.node("Identity", [x], "again")


def _cast_from_bool(net: Net) -> str:
    return net.node("Cast", [_constant_node(net, OPEN.reshape(1, 6, 1, 1), "mask")], "factor", to=1)


def _cast_from_integers(net: Net) -> str:
    return net.node("Cast", [net.constant("mask", OPEN.astype(np.int64).reshape(6, 1, 1))], "factor", to=1)


def _where_of_numbers(net: Net) -> str:
    mask = _constant_node(net, OPEN.reshape(1, 6, 1, 1), "mask")
    return net.node("Where", [mask, _constant_node(net, np.float32(1), "yes"), net.constant("no", np.float32(0))], "f")


def _unsqueezed(net: Net) -> str:
    return net.node("Unsqueeze", [net.constant("flat", MASK), net.constant("axes", np.array([1, 2]))], "factor")


def _scores(net: Net) -> str:
    """`(score > 0).float()`."""
    scores = net.constant("scores", np.where(OPEN, 0.3, -2).astype(np.float32).reshape(1, 6, 1, 1))
    return net.node("Cast", [net.node("Greater", [scores, net.constant("zero", np.float32(0))], "mask")], "f", to=1)


def _one_minus(net: Net) -> str:
    closed = net.constant("closed", 1 - MASK.reshape(1, 6, 1, 1))
    return net.node("Sub", [net.constant("ones", np.float32(1)), closed], "factor")


def _not(net: Net) -> str:
    mask = net.node("Not", [net.constant("closed", ~OPEN.reshape(1, 6, 1, 1))], "mask")
    return net.node("Cast", [mask], "factor", to=1)


def _product(net: Net) -> str:
    """A channel gate times a block gate that is open."""
    return net.node("Mul", [_initializer(net), net.constant("block", np.ones((1, 1, 1, 1), np.float32))], "factors")


WRITTEN = [
    _initializer,
    _without_batch,
    _node,
    _identities,
    _cast_from_bool,
    _cast_from_integers,
    _where_of_numbers,
    _unsqueezed,
    _scores,
    _one_minus,
    _not,
    _product,
]


@pytest.mark.parametrize(("write", "left"), [(write, number % 2 == 1) for number, write in enumerate(WRITTEN)])
def test_factors_however_they_are_written(write: Callable[[Net], str], left: bool) -> None:
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    factor = write(net)
    x = net.node("Mul", [factor, x] if left else [x, factor], "gate")
    net.width[x] = 6
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert operators(surgery.model) == {"Conv": 2, "Relu": 1}
    assert surgery.report["gates"] == [
        {"node": "gate", "width": 6, "closed": 2, "removed_channels": 2, "outcome": "removed"}
    ]


def _where(net: Net, x: str) -> str:
    return net.node("Where", [net.constant("mask", OPEN.reshape(1, 6, 1, 1)), x, _zero(net)], "gate")


def _where_not(net: Net, x: str) -> str:
    return net.node("Where", [net.constant("mask", ~OPEN.reshape(6, 1, 1)), _zero(net), x], "gate")


def _where_zeros(net: Net, x: str) -> str:
    """A zero for every position, and a mask in a Constant node."""
    mask = _constant_node(net, OPEN.reshape(1, 6, 1, 1), "mask")
    return net.node("Where", [mask, x, net.constant("zeros", np.zeros((1, 6, 8, 8), np.float32))], "gate")


def _zero(net: Net) -> str:
    return net.constant("zero", np.float32(0))


@pytest.mark.parametrize("write", [_where, _where_not, _where_zeros])
@pytest.mark.parametrize("before", [False, True])
def test_a_mask_a_channel_is_a_gate(write: Callable[[Net, str], str], before: bool) -> None:
    net = Net()
    x = net.conv("input", 6, "one")
    x = net.relu(write(net, x), "act") if before else write(net, net.relu(x, "act"))
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert operators(surgery.model) == {"Conv": 2, "Relu": 1}
    assert surgery.report["gates"] == [
        {"node": "gate", "width": 6, "closed": 2, "removed_channels": 2, "outcome": "removed"}
    ]


@pytest.mark.parametrize(
    ("value", "kernel", "expected"),
    [
        (2.0, 1, "folded"),
        (2.0, 3, "kept: the constant 2 meets the zero padding"),
        (-np.inf, 1, "kept: it goes together with channels in use, in gate"),
    ],
)
def test_a_mask_with_another_number_than_zero(value: float, kernel: int, expected: str) -> None:
    """What is masked is not read: where the channel stays, its filter becomes zero."""
    net = Net()
    x = net.conv("input", 6, "one")
    number = net.constant("number", np.float32(value))
    x = net.node("Where", [net.constant("mask", OPEN.reshape(1, 6, 1, 1)), x, number], "gate")
    x = net.node("Clip", [x, net.constant("low", np.float32(-5))], "finite")
    model = net.model(net.conv(x, 4, "two", kernel=kernel))
    surgery = cut(model)
    assert outcome(model, surgery) == expected
    if "kept" in expected:
        assert not np.any(weight(surgery.model, "one")[list(CLOSED)])
        assert "gate" in names(surgery.model)


@pytest.mark.parametrize("slope", [0.1, 0.0])
def test_a_computed_mask(slope: float) -> None:
    """LeakyRelu as Where(x > 0, x, slope * x): a closed channel is zero on both sides."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    mask = net.node("Greater", [x, _zero(net)], "mask")
    no = net.node("Mul", [x, net.constant("slope", np.float32(slope))], "scaled") if slope else "zero"
    model = net.model(net.conv(net.node("Where", [mask, x, no], "tested"), 4, "two"))
    assert outcome(model) == "removed"


@pytest.mark.parametrize(
    ("closed", "expected"), [(([1, 4], [1, 4]), "removed"), (([1, 4], []), "kept"), (([], [1, 4]), "kept")]
)
def test_a_computed_choice_between_two_tensors(closed: tuple[list[int], list[int]], expected: str) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), closed[0], "gate")
    y = net.gate(net.conv("input", 6, "other"), closed[1], "gate2")
    mask = net.node("Greater", [net.conv("input", 6, "third"), _zero(net)], "mask")
    model = net.model(net.conv(net.node("Where", [mask, x, y], "tested"), 4, "two"))
    surgery = cut(model)
    widths = [weight(surgery.model, name).shape[0] for name in ("one", "other", "third")]
    assert widths == ([4, 4, 4] if expected == "removed" else [6, 6, 6])
    assert weight(surgery.model, "two").shape[1] == widths[0]


def test_a_computed_choice_between_two_constants() -> None:
    """A closed channel is 0 where the mask is true and 1 where it is not: it is no constant."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    mask = net.node("Greater", [net.conv("input", 6, "third"), _zero(net)], "mask")
    more = net.node("Add", [x, net.constant("unit", np.float32(1))], "more")
    surgery = cut(net.model(net.conv(net.node("Where", [mask, x, more], "tested"), 4, "two")))
    assert weight(surgery.model, "two").shape[1] == 6
    assert [row.any() for row in weight(surgery.model, "one")] == OPEN.tolist()


def test_one_computed_mask_for_all_channels() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    mask = net.node("Greater", [net.conv("input", 1, "map"), _zero(net)], "mask")
    net.width["mask"] = 1
    x = net.node("Where", [mask, x, "zero"], "tested")
    net.width[x] = 6
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert weight(surgery.model, "map").shape[0] == 1


def test_a_constant_choice_between_two_tensors() -> None:
    """Channels 0, 2, 3, 5 come from the one, 1 and 4 from the other; 0 and 4 are closed where they come from."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), [0, 1], "gate")
    y = net.gate(net.conv("input", 6, "other"), [4, 5], "gate2")
    mask = net.constant("mask", OPEN.reshape(1, 6, 1, 1))
    surgery = cut(net.model(net.conv(net.node("Where", [mask, x, y], "tested"), 4, "two")))
    one, other = weight(surgery.model, "one"), weight(surgery.model, "other")
    assert [row.any() for row in one] == [False, True, True, True], "channels 1, 2, 3, 5"
    assert [row.any() for row in other] == [True, False, False, False]
    assert constant(surgery.model, "mask").ravel().tolist() == [False, True, True, True]
    assert "Mul" not in operators(surgery.model)


@pytest.mark.parametrize(("side", "left"), [("one", "other"), ("other", "one")])
def test_a_choice_of_the_same_side_everywhere_goes(side: str, left: str) -> None:
    """All channels that are needed come from one side: the other one goes altogether."""
    net = Net()
    x, y = net.conv("input", 6, "one"), net.conv("input", 6, "other")
    mask = net.constant("mask", OPEN.reshape(1, 6, 1, 1))
    x = net.node("Where", [mask, x, y] if side == "one" else [mask, y, x], "tested")
    inputs = [x, net.constant("w", np.where(MASK, 1, 0).astype(np.float32).reshape(1, 6, 1, 1))]
    smaller = cut(net.model(net.conv(net.node("Mul", inputs, "gate"), 4, "two"))).model
    kept, gone = ("one", "other") if side == "one" else ("other", "one")
    assert gone not in names(smaller)
    assert weight(smaller, kept).shape[0] == 4
    assert "tested" not in names(smaller)


def test_a_choice_whose_result_is_a_constant_keeps_its_shape() -> None:
    """Mask and chosen side are constants, the other side says how large the result is; padding keeps it."""
    net = Net()
    closed = net.gate(net.conv("input", 6, "one"), range(6), "gate")
    x = net.node("Add", [closed, net.constant("more", np.float32(2))], "chosen")
    mask = net.node("Greater", [x, net.constant("least", np.float32(1))], "mask")
    x = net.node("Where", [mask, x, net.conv("input", 6, "other")], "tested")
    smaller = cut(net.model(net.conv(x, 4, "two"))).model
    assert "one" not in names(smaller)
    assert {"tested", "other"} <= names(smaller)


def test_a_mask_over_positions_is_no_gate() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    mask = net.constant("mask", np.tril(np.ones((8, 8), bool)))
    model = net.model(net.conv(net.node("Where", [mask, x, _zero(net)], "tested"), 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert [gate["node"] for gate in surgery.report["gates"]] == ["gate"]


def test_a_mask_that_is_one_value_for_all() -> None:
    for value, gone in ((True, "other"), (False, "one")):
        net = Net()
        x, y = net.conv("input", 6, "one"), net.conv("input", 6, "other")
        smaller = cut(net.model(net.node("Where", [net.constant("mask", np.array([value])), x, y], "tested"))).model
        assert names(smaller) == {"one", "other"} - {gone}


def test_a_mask_opens_where_its_channels_stay_and_nobody_needs_them() -> None:
    """They are in use elsewhere."""
    net = Net()
    trunk = net.relu(net.conv("input", 6, "one"), "act")
    x = net.conv(_where(net, trunk), 4, "two")
    surgery = cut(net.model(net.add(x, net.conv(trunk, 4, "side"), "sum")))
    assert weight(surgery.model, "one").shape[0] == 6
    assert not np.any(weight(surgery.model, "two")[:, list(CLOSED)])
    assert "gate" not in names(surgery.model)
    assert surgery.report["gates"][0]["outcome"] == "folded"


@pytest.mark.parametrize("write", [_where, _where_not, lambda net, x: net.gate(x, CLOSED, "gate")])
def test_a_gate_stays_where_what_it_closes_is_needed_and_in_use_elsewhere(write: Callable[[Net, str], str]) -> None:
    """Its result is a graph output, and the tensor in front of it has other readers: the report says so."""
    net = Net()
    trunk = net.relu(net.conv("input", 6, "one"), "act")
    x = write(net, trunk)
    surgery = cut(net.model(x, net.conv(trunk, 4, "side")))
    (gate,) = surgery.report["gates"]
    assert (gate["outcome"], "gate" in names(surgery.model)) == ("kept", True)
    assert gate["reason"]


@pytest.mark.parametrize("write", [_where, _where_not, lambda net, x: net.gate(x, CLOSED, "gate")])
def test_a_gate_at_a_graph_output_becomes_zero_filters(write: Callable[[Net, str], str]) -> None:
    net = Net()
    model = net.model(write(net, net.conv("input", 6, "one")))
    surgery = cut(model)
    assert operators(surgery.model) == {"Conv": 1}
    (left,) = [node.name for node in surgery.model.graph.node]
    assert [row.any() for row in weight(surgery.model, left)] == OPEN.tolist()
    assert surgery.report["gates"][0]["outcome"] == "folded"


# Gates on channels that are not on axis 1: how they get there, the shape of the gate, and how they get back.
LAYOUTS: list[Any] = [
    ("channels last", [("Transpose", {"perm": [0, 2, 3, 1]})], (6,), [("Transpose", {"perm": [0, 3, 1, 2]})]),
    (
        "channels last, full",
        [("Transpose", {"perm": [0, 2, 3, 1]})],
        (1, 1, 1, 6),
        [("Transpose", {"perm": [0, 3, 1, 2]})],
    ),
    (
        "tokens",
        [("Reshape", [0, 6, 64]), ("Transpose", {"perm": [0, 2, 1]})],
        (1, 1, 6),
        [("Transpose", {"perm": [0, 2, 1]}), ("Reshape", [-1, 6, 8, 8])],
    ),
    ("channels first", [("Transpose", {"perm": [1, 0, 2, 3]})], (6, 1, 1, 1), [("Transpose", {"perm": [1, 0, 2, 3]})]),
]


@pytest.mark.parametrize(("there", "shape", "back"), [layout[1:] for layout in LAYOUTS], ids=[x[0] for x in LAYOUTS])
@pytest.mark.parametrize("operator", ["Mul", "Where"])
def test_gates_on_other_axes(there: list[Any], shape: tuple[int, ...], back: list[Any], operator: str) -> None:
    net = Net()
    x = _moved(net, net.conv("input", 6, "one"), there, "there")
    if operator == "Mul":
        x = net.node("Mul", [net.constant("factor", MASK.reshape(shape)), x], "gate")
    else:
        x = net.node("Where", [net.constant("mask", OPEN.reshape(shape)), x, _zero(net)], "gate")
    net.width[x] = 6
    model = net.model(net.conv(_moved(net, x, back, "back"), 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert "gate" not in names(surgery.model)


def _moved(net: Net, x: str, moves: list[Any], name: str) -> str:
    for number, (operator, how) in enumerate(moves):
        if operator == "Reshape":
            x = net.node("Reshape", [x, net.constant(f"{name}{number}.shape", np.array(how))], f"{name}{number}")
        else:
            x = net.node(operator, [x], f"{name}{number}", **how)
    return x


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)])
def test_one_gate_for_a_whole_block(value: float, shape: tuple[int, ...]) -> None:
    """Shut, it takes the branch and its Add with it; open, it goes."""
    net = Net()
    x = net.relu(net.conv("input", 4, "stem"), "act")
    branch = net.conv(net.relu(net.conv(x, 6, "one"), "r"), 4, "two")
    branch = net.node("Mul", [branch, net.constant("switch", np.full(shape, value, np.float32))], "gate")
    surgery = cut(net.model(net.conv(net.add(x, branch, "sum"), 3, "last")))
    expected = {"stem", "act", "last"} | ({"one", "r", "two", "sum"} if value else set())
    assert names(surgery.model) == expected
    (gate,) = surgery.report["gates"]
    assert (gate["closed"], gate["outcome"]) == (0 if value else 4, "removed")


def test_one_gate_that_is_shut_before_an_output() -> None:
    """The output is zero; the layer becomes so where nobody else reads it."""
    net = Net()
    x = net.node("Mul", [net.conv("input", 4, "one"), net.constant("switch", np.float32(0))], "gate")
    surgery = cut(net.model(x))
    assert operators(surgery.model) == {"Conv": 1}
    (left,) = surgery.model.graph.node
    assert not np.any(weight(surgery.model, left.name))
    assert surgery.report["gates"][0]["outcome"] == "folded"


def test_one_gate_that_is_shut_stays_so_for_all_or_for_none() -> None:
    """Channel 0 is read behind the gate only, so that its filter could be zero; the others are in use elsewhere."""
    net = Net()
    trunk = net.conv("input", 4, "one")
    side = net.conv(trunk, 3, "side")
    model = net.model(net.node("Mul", [trunk, net.constant("switch", np.float32(0))], "gate"), side)
    for tensor in model.graph.initializer:
        if tensor.name == "side.weight":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[:, 0] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    surgery = cut(model)
    assert [row.any() for row in weight(surgery.model, "one")] == [False, True, True, True]
    assert constant(surgery.model, "switch") == 0
    assert surgery.report["gates"][0]["outcome"] == "kept"


def test_a_scale_of_all_channels_is_no_gate() -> None:
    """0.5 in a Gelu, or one over the root of a width: runtimes look for these patterns."""
    net = Net()
    x = net.node("Mul", [net.conv("input", 6, "one"), net.constant("half", np.float32(0.5))], "scaled")
    surgery = cut(net.model(net.conv(x, 4, "two")))
    assert surgery.report["gates"] == []
    assert operators(surgery.model) == {"Conv": 2, "Mul": 1}


def test_two_gates_in_a_row() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), [1], "gate")
    x = net.gate(x, [4], "gate2", left=True)
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert operators(surgery.model) == {"Conv": 2, "Relu": 1}
    assert [(gate["closed"], gate["outcome"]) for gate in surgery.report["gates"]] == [(1, "removed")] * 2


FACTORS = np.array([0.5, 0, 2, -1, 0, 3], np.float32)


@pytest.mark.parametrize(
    ("before", "behind", "into"),
    [([], ["Tanh"], "one"), (["Tanh"], [], "two"), (["Tanh"], ["Identity"], None), (["Tanh"], ["Tanh"], None)],
)
def test_factors_other_than_one_fold_into_a_neighbour_or_stay(
    before: list[str], behind: list[str], into: str | None
) -> None:
    net = Net()
    x = net.conv("input", 6, "one")
    for operator in before:
        x = net.node(operator, [x], f"{operator}.before")
    x = net.scale(x, FACTORS, "gate")
    for operator in behind:
        x = net.node(operator, [x], f"{operator}.behind")
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    kept = [0, 2, 3, 5]
    (gate,) = surgery.report["gates"]
    assert (gate["outcome"], gate.get("into")) == ("folded" if into else "kept", into)
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[1] == 4
    if into == "one":
        expected = weight(model, "one")[kept] * FACTORS[kept].reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(weight(surgery.model, "one"), expected)
    elif into == "two":
        expected = weight(model, "two")[:, kept] * FACTORS[kept].reshape(1, -1, 1, 1)
        np.testing.assert_array_equal(weight(surgery.model, "two"), expected)
    else:
        assert constant(surgery.model, "gate.factor").ravel().tolist() == FACTORS[kept].tolist()


def test_layer_scale_folds_into_the_product_in_front_of_it() -> None:
    """As in transformers: MatMul, bias, scale, residual; hidden channels are gated, the scale has no zeros."""
    net = Net(channels=6)
    x = net.node("Transpose", ["input"], "last", perm=[0, 2, 3, 1])
    weights = {
        name: net.random.standard_normal(shape).astype("f") for name, shape in (("up", (6, 8)), ("down", (8, 6)))
    }
    hidden = net.node("MatMul", [x, net.constant("up.weight", weights["up"])], "up")
    net.width[hidden] = 8
    mask = np.ones(8, np.float32)
    mask[[2, 5]] = 0
    hidden = net.node("Mul", [net.relu(hidden, "act"), net.constant("mask", mask)], "gate")
    y = net.node("MatMul", [hidden, net.constant("down.weight", weights["down"])], "down")
    net.width[y] = 6
    scale = np.linspace(0.5, 2, 6).astype(np.float32)
    y = net.node("Mul", [y, net.constant("scale", scale)], "scaled")
    surgery = cut(net.model(net.node("Transpose", [net.add(x, y, "sum")], "first", perm=[0, 3, 1, 2])))
    assert weight(surgery.model, "up").shape == (6, 6)
    kept = mask > 0
    np.testing.assert_allclose(weight(surgery.model, "down"), weights["down"][kept] * scale, rtol=1e-6)
    assert "Mul" not in operators(surgery.model)


@pytest.mark.parametrize("last", ["Sigmoid", "HardSigmoid"])
def test_squeeze_excite_with_gates_of_its_own(last: str) -> None:
    """The trunk is gated behind the product, the hidden channels behind their activation."""
    net = Net()
    trunk = net.relu(net.conv("input", 8, "one"), "act")
    s = net.node("GlobalAveragePool", [trunk], "squeeze")
    s = net.gate(net.relu(net.conv(s, 4, "fc1", kernel=1), "r"), [0, 3], "gate.fc")
    s = net.node(last, [net.conv(s, 8, "fc2", kernel=1)], "excite")
    x = net.gate(net.node("Mul", [trunk, s], "scaled"), [1, 2, 7], "gate")
    surgery = cut(net.model(net.conv(x, 4, "two")))
    assert weight(surgery.model, "fc1").shape[:2] == (2, 8), "the squeeze reads all channels of the trunk"
    assert weight(surgery.model, "one").shape[0] == 8
    assert not np.any(weight(surgery.model, "two")[:, [1, 2, 7]])
    assert operators(surgery.model)["Mul"] == 1


def test_squeeze_excite_behind_the_gate_of_its_trunk() -> None:
    net = Net()
    trunk = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [1, 2, 7], "gate")
    s = net.node("GlobalAveragePool", [trunk], "squeeze")
    s = net.gate(net.relu(net.conv(s, 4, "fc1", kernel=1), "r"), [0, 3], "gate.fc")
    s = net.node("HardSigmoid", [net.conv(s, 8, "fc2", kernel=1)], "excite")
    surgery = cut(net.model(net.conv(net.node("Mul", [s, trunk], "scaled"), 4, "two")))
    widths = [weight(surgery.model, name).shape[:2] for name in ("one", "fc1", "fc2", "two")]
    assert widths == [(5, 3), (2, 5), (5, 2), (4, 5)]
    assert [gate["outcome"] for gate in surgery.report["gates"]] == ["removed", "removed"]


def test_gates_of_integers_and_in_half_precision() -> None:
    for kind, dtype in ((6, np.int32), (10, np.float16)):
        net = Net()
        x = net.node("Cast", [net.conv("input", 6, "one")], "there", to=kind)
        x = net.node("Mul", [x, net.constant("factor", MASK.astype(dtype).reshape(6, 1, 1))], "gate")
        model = net.model(net.conv(net.node("Cast", [x], "back", to=1), 4, "two"))
        surgery = compress(model)
        assert fates(model, surgery) == ["open", "removed", "open", "open", "removed", "open"]
        assert "gate" not in names(surgery.model)


def test_a_layer_scale_moves_through_bias_and_transpose() -> None:
    """As ConvNeXt writes it: a product and its bias on the last axis, back to NCHW, and a factor a channel."""
    net = Net(size=6)
    x = net.node("Transpose", [net.conv("input", 6, "one")], "last", perm=[0, 2, 3, 1])
    weights, bias = (net.random.standard_normal(shape).astype(np.float32) for shape in ((6, 8), 8))
    x = net.node("MatMul", [x, net.constant("weights", weights)], "product")
    x = net.node("Add", [net.constant("bias", bias), x], "shifted")
    x = net.node("Transpose", [x], "back", perm=[0, 3, 1, 2])
    net.width[x] = 8
    factors = net.random.uniform(0.2, 2, 8).astype(np.float32)
    surgery = cut(net.model(net.head(net.relu(net.conv(net.scale(x, factors, "scale", shape="c11"), 8, "two"), "r"))))
    assert (surgery.report["gates"][0]["outcome"], surgery.report["gates"][0]["into"]) == ("folded", "product")
    assert operators(surgery.model)["Mul"] == 0
    np.testing.assert_array_equal(constant(surgery.model, "weights"), weights * factors)
    np.testing.assert_array_equal(constant(surgery.model, "bias"), bias * factors)
