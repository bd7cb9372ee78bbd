"""Local functions, branches that are always taken, and constants that come out of nodes with several results."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.surgery import compress
from tests.surgery.graphs import Net, assert_same, cut, names, weight


def _branches(net: Net, x: str, condition: str, *, shared: bool = False) -> str:
    """An If whose branches close the channels 0 and 1, or 2; the same names are in both, and outside."""
    bodies = []
    for closed in ((0, 1), (2,)):
        mask = np.ones((1, 6, 1, 1), np.float32)
        mask[:, closed] = 0
        held = onnx.numpy_helper.from_array(mask, "mask")
        nodes = [
            helper.make_node("Relu", [x], ["inner"], name="relu"),
            helper.make_node("Mul", ["inner", "mask"], ["gated"], name="mul"),
        ]
        results = [helper.make_tensor_value_info("gated", 1, None)]
        bodies.append(helper.make_graph(nodes, "body", [], results, [held]))
    y = net.node("If", [condition], "if", then_branch=bodies[0], else_branch=bodies[1])
    net.width[y] = 6
    return y


@pytest.mark.parametrize(("chosen", "left"), [(True, 4), (False, 5)])
@pytest.mark.parametrize("how", ["initializer", "Constant", "computed"])
def test_a_branch_that_is_always_taken(how: str, chosen: bool, left: int) -> None:
    net = Net()
    if how == "initializer":
        condition = net.constant("yes", np.array(chosen))
    elif how == "Constant":
        condition = net.node("Constant", [], "yes", value=onnx.numpy_helper.from_array(np.array(chosen)))
    else:
        numbers = [net.constant(name, np.array(i)) for name, i in (("a", 3), ("b", 3 if chosen else 4))]
        condition = net.node("Equal", numbers, "yes")
    x = net.relu(net.conv("input", 6, "one"), "act")
    surgery = cut(net.model(net.conv(_branches(net, x, condition), 4, "two")))
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[1] == left
    assert "if" not in names(surgery.model)


def test_one_branch_twice_with_the_same_names() -> None:
    net = Net()
    condition = net.constant("yes", np.array(True))
    x = _branches(net, net.conv("input", 6, "one"), condition)
    for node in net.nodes:
        if node.name == "if":
            node.name, node.output[0] = "first", "first"
    net.width["first"] = 6
    y = _branches(net, net.conv("first", 6, "two"), condition)
    surgery = cut(net.model(net.conv(y, 4, "three")))
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "two").shape[0] == 4
    assert x == y


def test_a_branch_that_depends_on_the_input_stays() -> None:
    net = Net()
    largest = net.node("ReduceMax", ["input"], "largest", keepdims=0)
    condition = net.node("Greater", [largest, net.constant("zero", np.array(0, np.float32))], "yes")
    surgery = cut(net.model(net.conv(_branches(net, net.conv("input", 6, "one"), condition), 4, "two")))
    assert weight(surgery.model, "one").shape[0] == 6
    assert "if" in names(surgery.model)


def test_local_functions() -> None:
    """A function that holds a gate, called twice."""
    net = Net()
    mask = np.ones((1, 6, 1, 1), np.float32)
    mask[:, 3:] = 0
    body = [
        helper.make_node("Constant", [], ["mask"], value=onnx.numpy_helper.from_array(mask)),
        helper.make_node("Relu", ["x"], ["act"]),
        helper.make_node("Mul", ["act", "mask"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("local", "Gated", ["x"], ["y"], body, opsets)
    x = net.node("Gated", [net.conv("input", 6, "one")], "first", "local")
    x = net.node("Gated", [net.conv(x, 6, "two")], "second", "local")
    model = net.model(net.conv(x, 4, "three"))
    model.functions.append(function)
    surgery = compress(model)
    assert_same(model, surgery.model)
    assert [weight(surgery.model, layer).shape[0] for layer in ("one", "two")] == [3, 3]


@pytest.mark.parametrize(("operator", "opset", "left"), [("Relu", 16, 4), ("Softmax", 12, 6)])
def test_a_function_in_another_opset(operator: str, opset: int, left: int) -> None:
    """Its nodes take its place where they mean the same in the model's opset; Softmax does not."""
    net = Net(opset=18)
    x = net.gate(net.node("Own", [net.conv("input", 6, "one")], "own", "local"), (1, 4), "gate")
    model = net.model(net.conv(x, 4, "two"))
    node = helper.make_node(operator, ["x"], ["y"])
    model.functions.append(helper.make_function("local", "Own", ["x"], ["y"], [node], [helper.make_opsetid("", opset)]))
    surgery = compress(model)
    assert_same(model, surgery.model)
    assert weight(surgery.model, "one").shape[0] == left


def test_a_model_with_functions_and_nothing_to_cut_comes_back_as_it_is() -> None:
    net = Net()
    function = helper.make_function(
        "local", "Same", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], [helper.make_opsetid("", 17)]
    )
    model = net.model(net.conv(net.node("Same", ["input"], "same", "local"), 4, "one"))
    model.functions.append(function)
    assert compress(model).model == model


def test_weights_that_a_norm_in_training_mode_makes() -> None:
    """Weight standardisation as PyTorch exports it: a BatchNormalization of the weight, with three results."""
    net = Net(opset=15)
    x = net.gate(net.conv("input", 6, "one"), [0, 3], "gate")
    raw = net.constant("raw", net.random.standard_normal((1, 8, 6 * 9)).astype(np.float32))
    given = [net.constant(f"given{i}", np.full(8, value, np.float32)) for i, value in enumerate((1, 0, 0, 1))]
    net.nodes.append(
        helper.make_node("BatchNormalization", [raw, *given], ["norm", "mean", "var"], training_mode=1, name="norm")
    )
    shaped = net.node("Reshape", ["norm", net.constant("shape", np.array([8, 6, 3, 3]))], "shaped")
    y = net.node("Conv", [x, shaped], "two", pads=[1] * 4)
    net.width[y] = 8
    surgery = cut(net.model(net.conv(net.gate(y, range(4), "gate2"), 4, "three")))
    assert weight(surgery.model, "two").shape == (4, 4, 3, 3)


def test_gates_that_a_split_of_a_constant_makes() -> None:
    net = Net()
    mask = np.ones((1, 12, 1, 1), np.float32)
    mask[:, [0, 1, 6]] = 0
    held = net.constant("mask", mask)
    net.nodes.append(helper.make_node("Split", [held], ["left", "right"], axis=1, name="split"))
    x = net.node("Mul", [net.conv("input", 6, "one"), "left"], "gate1")
    y = net.node("Mul", [net.conv(x, 6, "two"), "right"], "gate2")
    surgery = cut(net.model(net.conv(y, 4, "three")))
    assert [weight(surgery.model, layer).shape[0] for layer in ("one", "two")] == [4, 5]


def test_padding_that_is_computed_from_a_fixed_size() -> None:
    """As 'same' padding is written: max((ceil(size / 2) - 1) * 2 + 3 - size, 0), half of it before."""
    net = Net(size=9)
    x = net.gate(net.conv("input", 6, "one"), [0, 3], "gate")

    def number(name: str, value: float, dtype: type = np.int64) -> str:
        return net.constant(name, np.array([value], dtype))

    size = net.node("Slice", [net.node("Shape", [x], "shape"), number("at", 2), number("to", 3)], "size")
    half = net.node("Div", [net.node("Cast", [size], "real", to=1), number("f", 2, np.float32)], "half")
    steps = net.node("Cast", [net.node("Ceil", [half], "ceil")], "steps", to=7)
    span = net.node("Mul", [net.node("Sub", [steps, number("a", 1)], "less"), number("b", 2)], "span")
    short = net.node("Sub", [net.node("Add", [span, number("c", 3)], "reach"), size], "short")
    total = net.node("Max", [short, number("d", 0)], "total")
    before = net.node("Div", [total, number("e", 2)], "before")
    after = net.node("Sub", [total, before], "after")
    zero = number("none", 0)
    pads = net.node("Concat", [zero, zero, before, before, zero, zero, after, after], "pads", axis=0)
    y = net.node("Pad", [x, pads], "pad")
    net.width[y] = 6
    surgery = cut(net.model(net.conv(y, 4, "two", pads=[0] * 4, strides=[2, 2])))
    assert weight(surgery.model, "one").shape[0] == 4
