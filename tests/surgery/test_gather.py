"""Gather, GatherND, GatherElements and ReverseSequence: channels are picked by constant indices, or pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.surgery import compress
from tests.surgery.between import Build, between, constant_input, node, remains
from tests.surgery.graphs import Array, Net, constant, cut, names, operators, outcome, weight

REVERSED = "kept: it reverses the channels, or each of them by a length of its own"


def _gather(indices: Any, *, operator: str = "Gather", width: int = 6, **attributes: Any) -> Build:
    return lambda net, x: node(net, operator, x, "tested", width, np.asarray(indices, np.int64), **attributes)


# Indices on axis 1, what is left of filters where 1 and 4 are closed, new indices (None: no Gather), columns of `two`.
PICKED: list[tuple[list[int], list[int], list[int] | None, list[int]]] = [
    ([0, 1, 2, 3, 4, 5], [0, 2, 3, 5], None, [0, 2, 3, 5]),
    ([5, 4, 3, 2, 1, 0], [0, 2, 3, 5], [3, 2, 1, 0], [0, 2, 3, 5]),
    ([0, 2, 4], [0, 2], None, [0, 1]),
    ([-1, -2, 0, 0], [0, 5], [1, 0, 0], [0, 2, 3]),
    ([3, 1, 3, 1, 3], [3], [0, 0, 0], [0, 2, 4]),
    ([1, 2], [2], None, [1]),
]


@pytest.mark.parametrize(("indices", "left", "rewritten", "columns"), PICKED)
def test_gather_picks_channels(
    indices: list[int], left: list[int], rewritten: list[int] | None, columns: list[int]
) -> None:
    """What nobody picks goes, and closed channels with all of their copies."""
    model = between(_gather(indices, width=len(indices), axis=1))
    smaller = cut(model).model
    assert remains(model, smaller) == left
    assert (constant_input(smaller) if "tested" in names(smaller) else None) == rewritten
    np.testing.assert_array_equal(weight(smaller, "two"), weight(model, "two")[:, columns])


def test_picked_channels_go_by_themselves() -> None:
    """Two Gathers of one tensor: each loses what is closed behind it, the tensor what neither needs."""

    def build(net: Net, x: str) -> str:
        first = net.gate(node(net, "Gather", x, "first", 4, np.array([0, 1, 2, 3]), axis=1), [0, 1], "g1")
        second = net.gate(node(net, "Gather", x, "second", 4, np.array([3, 2, 1, 5]), axis=1), [0, 2], "g2")
        return net.node("Concat", [net.conv(first, 3, "three"), net.conv(second, 3, "four")], "both", axis=1)

    model = between(lambda net, x: _width(net, build(net, x), 6), closed=())
    smaller = cut(model).model
    assert remains(model, smaller) == [2, 3, 5]
    assert constant_input(smaller, "first") == [0, 1]
    assert constant_input(smaller, "second") == [0, 2]


def _width(net: Net, x: str, width: int) -> str:
    net.width[x] = width
    return x


def test_a_picked_channel_that_nobody_needs_may_lose_its_source() -> None:
    """It holds its place in a sum: any other channel will do in its stead."""

    def build(net: Net, x: str) -> str:
        picked = node(net, "Gather", x, "tested", 4, np.array([1, 3, 4, 5]), axis=1)
        return net.add(net.gate(picked, [3], "g2"), net.conv("input", 4, "other"), "sum")

    model = between(build)
    smaller = cut(model).model
    assert remains(model, smaller) == [-1, 3, -1], "5 is gone, and 1 and 4 are the zeros that they were"
    assert constant_input(smaller) == [0, 1, 2, 0]
    assert operators(smaller)["Mul"] == 0, "what stands in is a zero by itself"


def test_one_picked_channel_keeps_it() -> None:
    """A scalar index drops the axis of the channels; another one counts as that, and all of it stays."""
    net = Net(size=6)
    x = net.gate(net.conv("input", 6, "one"), [1, 4], "gate")
    y = _gather(2, axis=1, width=6)(net, x)
    y = node(net, "Unsqueeze", y, "again", 1, np.array([1]))
    model = net.model(net.conv(y, 4, "two"))
    smaller = cut(model).model
    assert remains(model, smaller) == [2]
    assert constant_input(smaller) == 0


@pytest.mark.parametrize(
    ("indices", "axis", "back"),
    [
        ([3, 1, 0, 0], 2, []),
        ([[0, 1], [2, 3]], 3, [("Reshape", [0, 6, 8, 4])]),
        ([[0, 1], [2, 3]], -2, [("Reshape", [0, 6, 8, 4])]),
        (5, 3, [("Unsqueeze", [3])]),
        ([0, 0], 0, []),
    ],
)
def test_gathers_of_space_let_channels_pass(indices: Any, axis: int, back: list[tuple[str, list[int]]]) -> None:
    def build(net: Net, x: str) -> str:
        x = _gather(indices, axis=axis)(net, x)
        for operator, values in back:
            x = node(net, operator, x, "back", 6, np.array(values))
        return x

    assert outcome(between(build, kernel=3)) == "removed"


def test_scalar_indices_move_the_channels() -> None:
    """The class token of a transformer: axis 1 goes, the channels move there."""
    net = Net(size=4)
    x = net.gate(net.conv("input", 6, "one"), [1, 4], "gate")
    x = node(net, "Transpose", node(net, "Reshape", x, "rows", 6, np.array([0, 6, 16])), "t", 6, perm=[0, 2, 1])
    x = _gather(0, axis=1)(net, x)
    model = net.model(net.gemm(x, 6, 5, "logits"))
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    assert weight(smaller, "logits").shape == (5, 4)


def test_computed_indices_over_space_let_channels_pass() -> None:
    def build(net: Net, x: str) -> str:
        rows = net.node("ReduceMean", ["input"], "mean", axes=[0, 1, 3], keepdims=0)
        best = net.node("ArgMax", [rows], "best", axis=0)
        net.node("Gather", [x, best], "tested", axis=2)
        net.width["tested"] = 6
        return "tested"

    assert outcome(between(build, kernel=3)) == "removed"


@pytest.mark.parametrize(("operator", "axis"), [("Gather", 1), ("GatherElements", 1)])
def test_computed_indices_that_pick_channels_are_a_wall(operator: str, axis: int) -> None:
    def build(net: Net, x: str) -> str:
        best = net.node("ArgMax", ["input"], "best", axis=1)
        if operator == "Gather":
            best = net.node("Reshape", [best, net.constant("flat", np.array([-1]))], "indices")
        net.node(operator, [x, best], "tested", axis=axis)
        net.width["tested"] = 1
        return net.node("ReduceMean", ["tested"], "few", axes=[1])

    model = between(build)
    reason = (
        "its list of indices is computed" if operator == "Gather" else "its indices pick a channel for each position"
    )
    assert outcome(model) == f"kept: {reason}"


def test_a_matrix_of_channels_is_cut_position_by_position() -> None:
    """Indices [2, 3] make two axes of channels: a column goes where both rows are closed."""

    def build(net: Net, x: str) -> str:
        x = _gather([[0, 1, 2], [3, 4, 5]], axis=1)(net, x)
        return node(net, "Reshape", x, "back", 6, np.array([0, 6, 8, 8]))

    model = between(build, closed=(1, 4, 2))
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 3, 5]
    assert weight(smaller, "two").shape[1] == 4
    assert np.shape(constant_input(smaller)) == (2, 2)


def _table(rows: Array) -> onnx.ModelProto:
    """Numbers are looked up in a table, mixed, and mixed again."""
    net = Net()
    net.inputs = [helper.make_tensor_value_info("input", 7, ["batch", 5])]
    net.constant("table", rows)
    x = net.node("Gather", ["table", "input"], "words", axis=0)
    return net.model(_matmul(net, _matmul(net, x, rows.shape[1], 4, "first"), 4, 3, "second"), ranks=[3])


def _matmul(net: Net, x: str, inputs: int, outputs: int, name: str) -> str:
    weights = net.random.standard_normal((inputs, outputs)).astype(np.float32)
    net.node("MatMul", [x, net.constant(f"{name}.weight", weights)], name)
    net.width[name] = 0
    return name


def test_columns_of_a_table_are_channels() -> None:
    rows = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    rows[:, [0, 3]] = 0
    smaller = compress(_table(rows)).model
    np.testing.assert_array_equal(constant(smaller, "table"), rows[:, [1, 2, 4, 5]])
    assert weight(smaller, "first").shape == (4, 4)


# ---- GatherND and GatherElements


def test_upsampling_as_pytorch_exports_it() -> None:
    """Adaptive pooling from 1 x 1 to 7 x 7: Transpose, GatherND over height and width, Transpose, ReduceMean."""
    net = Net(size=4)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), [1, 4], "gate")
    x = net.node("Transpose", [net.node("GlobalMaxPool", [x], "one by one")], "to", perm=[2, 3, 0, 1])
    x = _gather(np.zeros((7, 1, 7, 1, 2)), operator="GatherND", batch_dims=0)(net, x)
    x = net.node("Transpose", [x], "from", perm=[4, 5, 0, 1, 2, 3])
    x = net.node("ReduceMean", [x], "mean", axes=[-3, -1], keepdims=0)
    x = node(net, "Reshape", x, "flat", 294, np.array([-1, 294]))
    model = net.model(net.gemm(x, 294, 5, "logits"))
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, 2, 3, 5]
    assert weight(surgery.model, "logits").shape == (5, 4 * 49)
    assert surgery.report["unsupported"] == surgery.report["cuts_not_made"] == []


def test_channels_picked_by_gather_nd() -> None:
    """`x[:, [5, 4, 1]]` as PyTorch exports it."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Transpose", x, "to", 6, perm=[1, 0, 2, 3])
        x = _gather([[5], [4], [1], [2]], operator="GatherND", width=4)(net, x)
        return node(net, "Transpose", x, "from", 4, perm=[1, 0, 2, 3])

    model = between(build)
    smaller = cut(model).model
    assert remains(model, smaller) == [2, 5]
    assert constant_input(smaller) == [[1], [0]]


def test_tuples_that_pick_channels_and_positions_are_a_wall() -> None:
    def build(net: Net, x: str) -> str:
        x = node(net, "Transpose", x, "to", 6, perm=[1, 2, 0, 3])
        x = _gather([[[0, 1], [5, 2]]], operator="GatherND")(net, x)
        return node(net, "Transpose", x, "from", 2, perm=[2, 1, 0, 3])

    assert outcome(between(build)) == "kept: its indices pick channels together with positions"


def test_gather_nd_behind_a_batch_dimension() -> None:
    """Each image by an index of its own, over height; channels last."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Transpose", x, "last", 6, perm=[0, 2, 3, 1])
        rows = net.node("ReduceMean", ["input"], "mean", axes=[1, 3], keepdims=0)
        best = net.node("ArgMax", [rows], "best", axis=1, keepdims=1)
        net.node("GatherND", [x, best], "tested", batch_dims=1)
        x = node(net, "Unsqueeze", "tested", "row", 6, np.array([1]))
        return node(net, "Transpose", x, "first", 6, perm=[0, 3, 1, 2])

    assert outcome(between(build)) == "removed"


def test_gather_elements_over_space() -> None:
    """Constant indices lose the channels, too; those for fewer channels leave the others unread."""
    random = np.random.default_rng(0)

    def build(channels: int) -> Build:
        return _gather(random.integers(-8, 8, (1, channels, 8, 3)), operator="GatherElements", width=channels, axis=3)

    for channels, left in ((6, [0, 2, 3, 5]), (3, [0, 2])):
        model = between(build(channels))
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
        smaller = cut(model).model
        assert remains(model, smaller) == left
        assert np.shape(constant_input(smaller)) == (1, len(left), 8, 3)


def test_gather_elements_by_sorting() -> None:
    """Computed indices go with the channels that they are for."""

    def build(net: Net, x: str) -> str:
        net.nodes.append(
            helper.make_node("TopK", ["other", net.constant("k", np.array([3]))], ["top", "which"], name="top", axis=3)
        )
        net.width["which"] = 6
        net.node("GatherElements", [x, "which"], "tested", axis=3)
        return _width(net, net.node("Mul", ["tested", net.relu("top", "act")], "product"), 6)

    def both(net: Net, x: str) -> str:
        net.gate(net.conv("input", 6, "before"), [1, 4], "other")
        return build(net, x)

    assert outcome(between(both)) == "removed"


@pytest.mark.parametrize(
    ("order", "time", "expected"),
    [
        ([2, 3, 0, 1], 0, "removed"),
        ([2, 3, 0, 1], 1, "removed"),
        ([1, 2, 0, 3], 0, REVERSED),
        ([1, 2, 0, 3], 1, REVERSED),
    ],
)
def test_reverse_sequence(order: list[int], time: int, expected: str) -> None:
    """Of the first two axes (ONNX Runtime wants those) one is reversed, by lengths for the other."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Transpose", x, "to", 6, perm=order)
        lengths = np.full(6 if order[1 - time] == 1 else 8, 5)
        x = node(net, "ReverseSequence", x, "tested", 6, lengths, time_axis=time, batch_axis=1 - time)
        return node(net, "Transpose", x, "from", 6, perm=np.argsort(order).tolist())

    assert outcome(between(build, kernel=3)) == expected
