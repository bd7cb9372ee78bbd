"""Channels on several axes: shuffles, pixel shuffles, groups and heads written as Reshape, Transpose, Reshape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from onnx import helper

from tests.surgery.between import Build, assert_same_at, between, constant_input, node, remains, with_free_size
from tests.surgery.graphs import Net, cut, operators, weight


def _turned(split: Sequence[int], order: Sequence[int], join: Sequence[int], width: int, name: str = "x") -> Build:
    """Reshape, Transpose, Reshape; the result has `width` channels."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Reshape", x, f"{name}.split", width, np.array(split))
        x = node(net, "Transpose", x, f"{name}.turn", width, perm=list(order))
        return node(net, "Reshape", x, f"{name}.join", width, np.array(join))

    return build


# Groups, what is closed of 8 channels, what is left of the filters (-1: zero) and in which order the reader sees it.
SHUFFLES = [
    (2, [1, 5], [0, 2, 3, 4, 6, 7], [0, 4, 2, 6, 3, 7]),
    (2, [1, 5, 2], [0, -1, 3, 4, 6, 7], [0, 4, 2, 6, 3, 7]),
    (2, [0, 4, 3, 7], [1, 2, 5, 6], [1, 5, 2, 6]),
    (4, [0, 2, 4, 6], [1, 3, 5, 7], [1, 3, 5, 7]),
    (4, [0, 2, 4], [-1, 1, -1, 3, -1, 5, 6, 7], [0, 2, 4, 6, 1, 3, 5, 7]),
]


@pytest.mark.parametrize(("groups", "closed", "left", "order"), SHUFFLES)
def test_channel_shuffle(groups: int, closed: list[int], left: list[int], order: list[int]) -> None:
    """Position j of all groups goes together; a closed channel whose partners are open becomes a zero filter."""
    build = _turned([-1, groups, 8 // groups, 8, 8], [0, 2, 1, 3, 4], [-1, 8, 8, 8], 8)
    model = between(build, width=8, closed=closed, kernel=3)
    smaller = cut(model).model
    assert remains(model, smaller) == left
    whole = np.arange(8).reshape(groups, -1).T.ravel().tolist()  # where each channel comes from
    kept = [whole.index(channel) for channel in order]
    expected = weight(model, "two")[:, kept].copy()
    expected[:, [order.index(channel) for channel in closed if channel in order]] = 0
    np.testing.assert_array_equal(weight(smaller, "two"), expected)
    assert constant_input(smaller, "x.split")[1:3] == [groups, len(left) // groups]
    assert constant_input(smaller, "x.join")[1] == len(left)


def test_shuffle_at_any_size() -> None:
    """Batch, height and width are computed, the groups stand between them: the cut dimension is left to be inferred."""

    def build(net: Net, x: str) -> str:
        shape = net.node("Shape", ["input"], "shape")
        sizes = [
            net.node(
                "Slice",
                [shape, net.constant(f"{i}.from", np.array([i])), net.constant(f"{i}.to", np.array([i + 1]))],
                f"{i}.size",
            )
            for i in (0, 2, 3)
        ]
        two, four, eight = (net.constant(f"number{i}", np.array([i])) for i in (2, 4, 8))
        split = net.node("Concat", [sizes[0], two, four, *sizes[1:]], "split", axis=0)
        join = net.node("Concat", [sizes[0], eight, *sizes[1:]], "join", axis=0)
        x = net.node("Reshape", [x, split], "apart")
        x = node(net, "Transpose", x, "turn", 8, perm=[0, 2, 1, 3, 4])
        net.node("Reshape", [x, join], "together")
        net.width["together"] = 8
        return "together"

    model = with_free_size(between(build, width=8, closed=[1, 5, 2], kernel=3))
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, -1, 3, 4, 6, 7]
    assert_same_at(model, surgery.model, 2, 3, 5, 9)


def test_units_of_shufflenet() -> None:
    """Split, one half goes through layers, Concat, shuffle: twice, so that the orbits reach across both units.

    With x the channels of `one`, y and z those of the units' layers, x1, y1, z2 and z3 go together, and x4 alone.
    """

    def unit(net: Net, x: str, name: str) -> str:
        net.nodes.append(
            helper.make_node("Split", [x], [f"{name}.a", f"{name}.b"], name=f"{name}.halves", axis=1, num_outputs=2)
        )
        net.width[f"{name}.a"] = net.width[f"{name}.b"] = 4
        y = net.relu(net.conv(f"{name}.b", 4, f"{name}.conv", kernel=1), f"{name}.act")
        y = net.gate(y, closed[name], f"{name}.gate")
        node(net, "Concat", f"{name}.a", f"{name}.cat", 8, axis=1)
        net.nodes[-1].input.append(y)
        return _turned([-1, 2, 4, 8, 8], [0, 2, 1, 3, 4], [-1, 8, 8, 8], 8, name)(net, f"{name}.cat")

    closed = {"u": [1], "v": [2, 3]}
    model = between(lambda net, x: unit(net, unit(net, x, "u"), "v"), width=8, closed=[1, 4], opset=18)
    surgery = cut(model)
    assert surgery.report["unsupported"] == []
    assert surgery.report["cuts_not_made"] == []
    assert remains(model, surgery.model) == [0, 2, 3, 5, 6, 7]
    shapes = {name: weight(surgery.model, name).shape[:2] for name in ("u.conv", "v.conv", "two")}
    assert shapes == {"u.conv": (3, 3), "v.conv": (2, 4), "two": (4, 4)}
    assert operators(surgery.model)["Mul"] == 0


@pytest.mark.parametrize(
    ("split", "order", "join", "blocks"),
    [
        ([-1, 2, 2, 2, 8, 8], [0, 1, 4, 2, 5, 3], [-1, 2, 16, 16], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([-1, 2, 2, 2, 8, 8], [0, 3, 4, 1, 5, 2], [-1, 2, 16, 16], [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ([-1, 1, 2, 2, 2, 8, 8], [0, 1, 2, 5, 3, 6, 4], [-1, 2, 16, 16], [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([-1, 1, 2, 2, 2, 8, 8], [0, 1, 2, 5, 3, 6, 4], [-1, 1, 2, 16, 16], [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
    ids=["channels first", "channels last", "one group", "one group that stays"],
)
def test_pixel_shuffle(split: list[int], order: list[int], join: list[int], blocks: list[list[int]]) -> None:
    """The four channels behind one go together, whichever way they lie."""

    def build(net: Net, x: str) -> str:
        x = _turned(split, order, join, 2)(net, x)
        return x if len(join) == 4 else node(net, "Squeeze", x, "squeezed", 2, np.array([1]))

    first, second = blocks
    model = between(build, width=8, closed=[*first, second[1]], kernel=3)
    smaller = cut(model).model
    assert remains(model, smaller) == [-1 if i == second[1] else i for i in second]
    assert weight(smaller, "two").shape[1] == 1
    assert constant_input(smaller, "x.join") == [-1, *join[1:-3], 1, 16, 16]


def test_pixel_unshuffle() -> None:
    model = between(_turned([-1, 6, 4, 2, 4, 2], [0, 1, 3, 5, 2, 4], [-1, 24, 4, 4], 24), kernel=3)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    assert weight(smaller, "two").shape[1] == 16
    assert constant_input(smaller, "x.split") == [-1, 4, 4, 2, 4, 2]


@pytest.mark.parametrize(
    ("split", "closed", "left"),
    [([-1, 3, 2, 8, 8], (1, 2, 3), [0, -1, 4, 5]), ([-1, 2, 3, 8, 8], (1, 4, 2), [0, -1, 3, 5])],
)
def test_the_axis_of_more_sets_is_cut(split: list[int], closed: tuple[int, ...], left: list[int]) -> None:
    """Three pairs of neighbours, or of channels that are three apart."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Reshape", x, "split", 6, np.array(split))
        x = net.node("ReduceMax", [x], "rows", axes=[4])
        x = net.node("Expand", [x, net.constant("wide", np.array([1, 1, 1, 1, 8]))], "again")
        return node(net, "Reshape", x, "join", 6, np.array([-1, 6, 8, 8]))

    model = between(build, closed=closed)
    assert remains(model, cut(model).model) == left


def test_readers_tell_the_axis() -> None:
    """[N, 24] becomes [N, 2, 12] for a convolution over two channels, though twelve positions were more sets."""
    net = Net(size=2)
    x = net.gate(net.conv("input", 6, "one"), [3, 4, 5], "gate")
    x = node(net, "Reshape", node(net, "Flatten", x, "flat", 24), "rows", 2, np.array([-1, 2, 12]))
    kernel = net.constant("kernel", net.random.standard_normal((4, 2, 1)).astype(np.float32))
    net.node("Conv", [x, kernel], "tested")
    net.width["tested"] = 4
    model = net.model("tested", ranks=[3])
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 1, 2]
    assert weight(smaller, "tested").shape == (4, 1, 1)


def test_groups_that_are_summed() -> None:
    """[N, 3, 2, H, W] summed over the pairs: a pair goes as a whole."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Reshape", x, "pairs", 6, np.array([-1, 3, 2, 8, 8]))
        return node(net, "ReduceSum", x, "sum", 3, np.array([2]), keepdims=0)

    model = between(build, closed=(1, 2, 3))
    smaller = cut(model).model
    assert remains(model, smaller) == [0, -1, 4, 5]
    assert constant_input(smaller, "pairs") == [-1, 2, 2, 8, 8]


def test_channels_that_are_repeated_one_by_one() -> None:
    """`repeat_interleave`: Unsqueeze, Expand, Reshape."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Unsqueeze", x, "u", 6, np.array([2]))
        x = node(net, "Expand", x, "e", 6, np.array([1, 1, 2, 1, 1]))
        return node(net, "Reshape", x, "r", 12, np.array([-1, 12, 8, 8]))

    model = between(build)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    np.testing.assert_array_equal(weight(smaller, "two"), weight(model, "two")[:, [0, 1, 4, 5, 6, 7, 10, 11]])
    assert constant_input(smaller, "r") == [-1, 8, 8, 8]


def test_channels_stacked_on_a_new_axis() -> None:
    """Two halves, each unsqueezed, concatenated and flattened: as a mixed Concat of the channels."""

    def build(net: Net, x: str) -> str:
        halves = [
            node(
                net,
                "Unsqueeze",
                node(net, "Slice", x, f"h{i}", 3, *(np.array([n]) for n in (3 * i, 3 * i + 3, 1))),
                f"u{i}",
                3,
                np.array([1]),
            )
            for i in (0, 1)
        ]
        net.node("Concat", halves, "stack", axis=1)
        return node(net, "Reshape", "stack", "r", 6, np.array([-1, 6, 8, 8]))

    model = between(build)
    assert remains(model, cut(model).model) == [0, 2, 3, 5]
