"""Plain chains: convolutions, BatchNorm, activations, and a head with several columns a channel."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from tests.surgery.graphs import Net, constant, cut, half, names, operators, weight


@pytest.mark.parametrize("shape", ["1c11", "c11"])
@pytest.mark.parametrize("left", [False, True])
def test_closed_channels_go_from_both_layers(shape: str, left: bool) -> None:
    net = Net()
    x = net.relu(net.conv("input", 8, "one"), "act")
    x = net.conv(net.gate(x, [1, 4, 5], "gate", shape=shape, left=left), 6, "two")
    model = net.model(net.head(x))
    smaller = cut(model).model

    kept = [0, 2, 3, 6, 7]
    np.testing.assert_array_equal(weight(smaller, "one"), weight(model, "one")[kept])
    np.testing.assert_array_equal(weight(smaller, "one", 2), weight(model, "one", 2)[kept])
    np.testing.assert_array_equal(weight(smaller, "two"), weight(model, "two")[:, kept])
    assert "gate" not in names(smaller)


def test_an_open_gate_vanishes() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [], "gate")
    model = net.model(net.head(x))
    report = cut(model).report
    assert report["operators"]["Mul"] == [1, 0]
    assert report["gates"][0]["outcome"] == "removed"
    assert report["macs"][0] == report["macs"][1]


def test_gate_as_constant_node_identity_and_cast_from_bool() -> None:
    net = Net()
    x = net.relu(net.conv("input", 4, "one"), "act")
    mask = helper.make_tensor("m", 9, [1, 4, 1, 1], [True, False, True, False])
    net.nodes.append(helper.make_node("Constant", [], ["mask"], value=mask))
    net.nodes.append(helper.make_node("Cast", ["mask"], ["float"], to=1))
    net.nodes.append(helper.make_node("Identity", ["float"], ["factor"]))
    x = net.conv(net.node("Mul", [x, "factor"], "gate"), 3, "two")
    smaller = cut(net.model(net.head(x))).model
    assert weight(smaller, "one").shape[0] == weight(smaller, "two").shape[1] == 2
    assert not {"Mul", "Cast", "Identity", "Constant"} & operators(smaller).keys()


def test_batchnorm_between_gate_and_layers() -> None:
    net = Net()
    x = net.bn(net.conv("input", 8, "one", bias=False), "bn")
    x = net.gate(net.relu(x, "act"), half(8, 0), "gate")
    smaller = cut(net.model(net.head(net.conv(x, 4, "two")))).model
    assert weight(smaller, "one").shape[0] == weight(smaller, "two").shape[1] == 4
    assert all(weight(smaller, "bn", index).shape == (4,) for index in (1, 2, 3, 4))


def test_vgg_head_has_several_columns_a_channel() -> None:
    net = Net(size=7)
    x = net.gate(net.relu(net.conv("input", 6, "features"), "act"), [0, 3], "gate")
    x = net.node("Dropout", [net.node("Identity", [x], "same")], "dropout")
    net.constant("shape", np.array([-1, 6 * 49], np.int64))
    x = net.node("Reshape", [x, "shape"], "flat")
    x = net.gate(net.relu(net.gemm(x, 6 * 49, 10, "hidden"), "act2"), [2, 7, 9], "gate2", shape="1c")
    model = net.model(net.gemm(x, 10, 5, "logits"))
    smaller = cut(model).model

    columns = np.arange(6 * 49).reshape(6, 49)[[1, 2, 4, 5]].ravel()
    rows = [0, 1, 3, 4, 5, 6, 8]
    np.testing.assert_array_equal(weight(smaller, "hidden"), weight(model, "hidden")[rows][:, columns])
    assert weight(smaller, "logits").shape == (5, 7)
    assert constant(smaller, "shape").tolist() == [-1, 4 * 49]


def test_flatten_and_adaptive_pooling() -> None:
    net = Net(size=14)
    x = net.gate(net.relu(net.conv("input", 4, "features"), "act"), [3], "gate")
    x = net.node("AveragePool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Flatten", [x], "flat", axis=1)
    smaller = cut(net.model(net.gemm(x, 4 * 49, 5, "logits"))).model
    assert weight(smaller, "logits").shape == (5, 3 * 49)


def test_flatten_of_a_single_channel() -> None:
    net = Net(size=4)
    x = net.node("Flatten", [net.conv("input", 1, "one")], "flat", axis=1)
    y = net.gate(net.conv(net.relu(net.conv("input", 1, "two"), "act"), 1, "three"), [0], "gate")
    x = net.node("Concat", [x, net.node("Flatten", [y], "flat2", axis=1)], "cat", axis=1)
    surgery = cut(net.model(net.gemm(x, 32, 5, "logits")))
    assert names(surgery.model) == {"one", "flat", "logits"}
    assert surgery.report["unsupported"] == []


def test_a_zero_filter_needs_no_gate() -> None:
    net = Net()
    x = net.conv("input", 4, "one", bias=False)
    weights = np.array(constant(net.model(x), "one.weight"))
    weights[2] = 0
    net.constants = []
    net.constant("one.weight", weights)
    smaller = cut(net.model(net.head(net.conv(net.relu(x, "act"), 4, "two")))).model
    assert weight(smaller, "one").shape[0] == 3


def test_channels_that_nobody_reads_go_without_a_gate() -> None:
    net = Net()
    x = net.conv(net.relu(net.conv("input", 4, "one"), "act"), 4, "two")
    weights = np.array(constant(net.model(x), "two.weight"))
    weights[:, [0, 1]] = 0
    net.constants = [t for t in net.constants if t.name != "two.weight"]
    net.constant("two.weight", weights)
    smaller = cut(net.model(net.head(x))).model
    assert weight(smaller, "one").shape[0] == weight(smaller, "two").shape[1] == 2


@pytest.mark.parametrize("operator", ["Sigmoid", "HardSigmoid", "Softplus"])
def test_gate_before_an_activation_without_a_zero_becomes_a_bias(operator: str) -> None:
    """A closed channel comes out as the constant f(0): exact in a bias, as the next kernel is not padded."""
    net = Net()
    x = net.node(operator, [net.gate(net.conv("input", 4, "one"), [1, 2], "gate")], "act")
    model = net.model(net.head(net.conv(x, 4, "two", kernel=1)))
    smaller = cut(model).model
    assert weight(smaller, "one").shape[0] == 2
    at_zero = {"Sigmoid": 0.5, "HardSigmoid": 0.5, "Softplus": np.log(2)}[operator]
    moved = weight(model, "two", 2) + at_zero * weight(model, "two")[:, [1, 2]].sum(axis=(1, 2, 3))
    np.testing.assert_allclose(weight(smaller, "two", 2), moved, rtol=1e-5)


def test_a_constant_does_not_move_through_zero_padding() -> None:
    net = Net()
    x = net.node("Sigmoid", [net.gate(net.conv("input", 4, "one"), [1, 2], "gate")], "act")
    surgery = cut(net.model(net.head(net.conv(x, 4, "two", kernel=3))))
    assert weight(surgery.model, "one").shape[0] == 4
    assert not np.any(weight(surgery.model, "one")[[1, 2]]), "the gate is folded into the filters"
    assert "Mul" not in operators(surgery.model)
    (entry,) = surgery.report["cuts_not_made"]
    assert (entry["node"], entry["operator"], entry["channels"]) == ("two", "Conv", 2)
    assert "0.5" in entry["reason"]
    assert "padding" in entry["reason"]


def test_batchnorm_with_beta_after_a_gate() -> None:
    """A gate before BatchNorm lets beta through: a constant, taken up by the next bias where nothing is padded."""
    net = Net()
    x = net.relu(net.bn(net.gate(net.conv("input", 6, "one"), [0, 4], "gate"), "bn"), "act")
    smaller = cut(net.model(net.head(net.conv(x, 4, "two", kernel=1, bias=False)))).model
    assert weight(smaller, "one").shape[0] == 4
    assert weight(smaller, "two", 2).shape == (4,), "the bias that was not there"


def test_batchnorm_with_beta_after_a_gate_keeps_what_meets_padding() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), [0, 4], "gate")
    net.bn(x, "bn")
    offset = np.array(constant(net.model(x), "bn.offset")) * 0 + np.array([2, 2, 2, 2, -2, 2], np.float32)
    mean = np.zeros(6, np.float32)
    net.constants = [t for t in net.constants if t.name not in ("bn.offset", "bn.mean")]
    net.constant("bn.offset", offset)
    net.constant("bn.mean", mean)
    smaller = cut(net.model(net.head(net.conv(net.relu("bn", "act"), 4, "two")))).model
    # channel 0 comes out of the Relu as 2, channel 4 as 0
    assert weight(smaller, "one").shape[0] == 5
    assert "Mul" not in operators(smaller)


@pytest.mark.parametrize("after", [True, False])
def test_other_factors_fold_into_a_neighbour(after: bool) -> None:
    net = Net()
    x = net.conv("input", 4, "one")
    factors = np.array([0.5, 0, 2, -1])
    x = net.scale(net.relu(x, "act") if after else x, factors, "gate")
    model = net.model(net.head(net.conv(x if after else net.relu(x, "act"), 4, "two")))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 3
    assert "Mul" not in operators(surgery.model)
    gate = surgery.report["gates"][0]
    assert (gate["outcome"], gate["into"]) == ("folded", "two" if after else "one")
    kept = [0, 2, 3]
    if after:
        expected = weight(model, "two")[:, kept] * factors[kept].reshape(1, -1, 1, 1)
        np.testing.assert_array_equal(weight(surgery.model, "two"), expected.astype(np.float32))


def test_other_factors_between_activations_stay() -> None:
    net = Net()
    x = net.scale(net.relu(net.conv("input", 4, "one"), "act"), np.array([0.5, 0, 2, 3]), "gate")
    surgery = cut(net.model(net.head(net.conv(net.node("Tanh", [x], "tanh"), 4, "two"))))
    assert constant(surgery.model, "gate.factor").ravel().tolist() == [0.5, 2, 3]
    assert weight(surgery.model, "one").shape[0] == 3
    gate = surgery.report["gates"][0]
    assert gate["outcome"] == "kept"
    assert gate["reason"]


def test_factors_in_a_row_fold_up_and_down() -> None:
    net = Net()
    x = net.conv("input", 4, "one")
    for name in ("a", "b"):
        x = net.scale(x, np.array([0.5, 3, 2, 3]), name)
    x = net.node("Tanh", [x], "tanh")
    for name in ("c", "d"):
        x = net.scale(x, np.array([0.5, 3, 2, 3]), name)
    surgery = cut(net.model(net.head(net.conv(x, 4, "two"))))
    assert "Mul" not in operators(surgery.model)
    assert [gate["into"] for gate in surgery.report["gates"]] == ["one", "one", "two", "two"]


def test_a_layer_with_all_channels_closed_becomes_its_constant() -> None:
    net = Net()
    x = net.relu(net.conv("input", 4, "one"), "a")
    x = net.gate(net.relu(net.conv(x, 4, "two"), "b"), range(4), "gate")
    x = net.relu(net.conv(x, 4, "three"), "c")  # only its bias is left
    y = net.conv("input", 4, "side")
    smaller = cut(net.model(net.head(net.conv(net.add(x, y, "sum"), 4, "last")))).model
    assert not {"one", "two", "three"} & names(smaller)


def test_everything_closed_leaves_a_graph_that_answers_its_biases() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), range(8), "gate")
    model = net.model(net.head(net.conv(x, 8, "two")))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 1
    assert weight(surgery.model, "logits").shape == (5, 1)
    assert any("one input channel" in entry["reason"] for entry in surgery.report["cuts_not_made"])


def test_channels_of_a_graph_output_keep_their_place() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act"), [1, 3], "gate")
    surgery = cut(net.model(net.conv(x, 6, "two"), x))
    assert weight(surgery.model, "one").shape[0] == 4
    assert not np.any(weight(surgery.model, "one")[[1, 3]])
    assert "Mul" not in operators(surgery.model)
    assert surgery.report["cuts_not_made"][0]["reason"] == "it reaches a graph output"


def test_operating_twice_changes_nothing() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), half(8, 3), "gate")
    once = cut(net.model(net.head(net.conv(x, 4, "two")))).model
    assert cut(once).model.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)
