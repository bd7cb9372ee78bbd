"""Branches that meet again: inverted bottlenecks, squeeze-excite, Concat, shuffle-like reshapes."""

from __future__ import annotations

import numpy as np

from tests.surgery.graphs import Net, constant, cut, half, names, operators, weight


def test_depthwise_channels_go_with_both_neighbours() -> None:
    """Closed behind the depthwise convolution: all three layers lose them (MobileNetV2)."""
    net = Net()
    x = net.node("Clip", [net.conv("input", 8, "expand", kernel=1), *_bounds(net)], "act1")
    x = net.node("Clip", [net.conv(x, 8, "dw", group=8), "low", "high"], "act2")
    model = net.model(net.head(net.conv(net.gate(x, half(8, 1), "gate"), 4, "project", kernel=1)))
    surgery = cut(model)
    assert weight(surgery.model, "expand").shape[0] == 4
    assert weight(surgery.model, "dw").shape == (4, 1, 3, 3)
    assert weight(surgery.model, "project").shape[1] == 4
    dw = next(node for node in surgery.model.graph.node if node.name == "dw")
    assert next(a.i for a in dw.attribute if a.name == "group") == 4
    assert surgery.report["cuts_not_made"] == []


def _bounds(net: Net) -> list[str]:
    return [net.constant("low", np.array(0, np.float32)), net.constant("high", np.array(6, np.float32))]


def test_squeeze_excite_follows_its_trunk() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [1, 2, 5], "gate")
    s = net.node("ReduceMean", [x], "squeeze", axes=[2, 3], keepdims=1)
    s = net.gate(net.relu(net.conv(s, 4, "fc1", kernel=1), "act2"), [3], "gate2")
    s = net.node("HardSigmoid", [net.conv(s, 8, "fc2", kernel=1)], "excite")
    smaller = cut(net.model(net.head(net.conv(net.node("Mul", [s, x], "scaled"), 4, "two")))).model
    assert weight(smaller, "one").shape[0] == 5
    assert weight(smaller, "fc1").shape == (3, 5, 1, 1)
    assert weight(smaller, "fc2").shape == (5, 3, 1, 1)
    assert weight(smaller, "two").shape[1] == 5


def test_squeeze_excite_that_is_constant_becomes_a_factor_of_the_next_weights() -> None:
    net = Net()
    x = net.relu(net.conv("input", 8, "one"), "act")
    s = net.node("GlobalAveragePool", [x], "squeeze")
    s = net.gate(net.relu(net.conv(s, 4, "fc1", kernel=1), "act2"), range(4), "gate")
    s = net.node("Sigmoid", [net.conv(s, 8, "fc2", kernel=1)], "excite")
    smaller = cut(net.model(net.head(net.conv(net.node("Mul", [x, s], "scaled"), 4, "two")))).model
    assert not {"fc1", "fc2", "squeeze", "scaled"} & names(smaller)


def test_concat_parts_go_one_by_one() -> None:
    """Dense connectivity: BatchNorm behind every Concat, one part closed altogether."""
    net = Net()
    stem = net.relu(net.conv("input", 6, "stem"), "act")
    a = net.gate(net.conv(net.relu(net.bn(stem, "bn1"), "r1"), 4, "a"), [0, 1], "ga")
    joined = net.node("Concat", [stem, a], "cat1", axis=1)
    net.width[joined] = 10
    b = net.gate(net.conv(joined, 4, "b"), range(4), "gb")
    last = net.node("Concat", [joined, b], "cat2", axis=1)
    net.width[last] = 14
    surgery = cut(net.model(net.head(net.conv(last, 3, "last"))))
    assert weight(surgery.model, "a").shape[0] == 2
    assert weight(surgery.model, "last").shape[1] == 8
    assert "b" not in names(surgery.model)
    assert operators(surgery.model)["Concat"] == 1, "a Concat of one part goes"


def test_a_concat_over_another_axis_couples_its_parts() -> None:
    net = Net()
    closed = [0, 3]
    x = net.gate(net.relu(net.conv("input", 4, "one"), "r1"), closed, "g1")
    y = net.gate(net.relu(net.conv("input", 4, "two"), "r2"), [*closed, 1], "g2")
    both = net.node("Concat", [x, y], "cat", axis=3)
    smaller = cut(net.model(net.head(net.conv(both, 4, "last")))).model
    assert weight(smaller, "one").shape[0] == weight(smaller, "two").shape[0] == 2
    assert not np.any(weight(smaller, "two")[0]), "closed in one part only: a zero filter"


def test_shuffle_keeps_groups_of_equal_size() -> None:
    """Reshape, Transpose, Reshape with height, width and channels baked in: position j of all groups goes together."""
    net = Net(size=4)
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [1, 5, 2], "gate")  # positions 1 (both) and 2 (one)
    net.constant("split", np.array([-1, 2, 4, 4, 4], np.int64))
    net.constant("join", np.array([-1, 8, 4, 4], np.int64))
    x = net.node("Transpose", [net.node("Reshape", [x, "split"], "r1")], "t", perm=[0, 2, 1, 3, 4])
    x = net.node("Reshape", [x, "join"], "r2")
    net.width[x] = 8
    model = net.model(net.head(net.conv(x, 4, "two")))
    smaller = cut(model).model
    assert weight(smaller, "one").shape[0] == weight(smaller, "two").shape[1] == 6
    assert constant(smaller, "split").tolist() == [-1, 2, 3, 4, 4]
    assert constant(smaller, "join").tolist() == [-1, 6, 4, 4]


def test_of_two_constant_sides_of_a_sum_the_zero_goes() -> None:
    """A learned number a channel, made as large as the picture, and a branch that is closed: CaiT's class token."""
    net = Net()
    size = net.node("Shape", ["input"], "size")
    learned = net.constant("learned", net.random.standard_normal((1, 3, 1, 1)).astype(np.float32))
    token = net.node("Expand", [learned, size], "token")
    net.width[token] = 3
    branch = net.gate(net.conv(net.relu(net.conv("input", 8, "a"), "act"), 3, "b"), range(3), "gate")
    smaller = cut(net.model(net.head(net.node("Add", [token, branch], "sum")))).model
    assert not {"a", "b", "sum"} & names(smaller)
