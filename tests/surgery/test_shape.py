"""Reshape, Flatten, Squeeze, Unsqueeze, Transpose, Expand, Tile, Shape: channels are followed to where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from polar_deploy.surgery import compress
from tests.surgery.between import Build, assert_same_at, between, constant_input, node, remains, with_free_size
from tests.surgery.graphs import Net, constant, cut, operators, outcome, weight

TURN = ("Transpose", {"perm": [0, 2, 1]})
SWAP = ("Transpose", {"perm": [0, 1, 3, 2, 4]})
READ = "kept: its shape is read"
COMPUTED = "kept: its shape is computed"


def _chain(*steps: tuple[Any, ...], width: int = 6) -> Build:
    """Nodes one after the other: (operator, constant inputs..., attributes)."""

    def build(net: Net, x: str) -> str:
        for index, (operator, *extra, attributes) in enumerate(steps):
            inputs = [values if values is None else np.asarray(values, np.int64) for values in extra]
            x = node(net, operator, x, f"tested{index}" if index else "tested", width, *inputs, **attributes)
        return x

    return build


@pytest.mark.parametrize(
    ("steps", "opset"),
    [
        ([("Transpose", {"perm": [0, 1, 3, 2]})], 17),
        ([("Transpose", {"perm": [0, 2, 3, 1]}), ("Transpose", {"perm": [0, 3, 1, 2]})], 17),
        ([("Transpose", {}), ("Transpose", {})], 17),
        ([("Unsqueeze", [2, -1], {}), ("Squeeze", [-1, 2], {})], 17),
        ([("Unsqueeze", {"axes": [1]}), ("Squeeze", {"axes": [1]})], 11),
        ([("Reshape", [-1, 6, 64], {}), ("Reshape", [-1, 6, 8, 8], {})], 17),
        ([("Reshape", [0, 0, -1], {}), ("Reshape", [0, -1, 8, 8], {})], 17),
        ([("Reshape", [0, 6, -1], {}), TURN, TURN, ("Reshape", [-1, 6, 8, 8], {"allowzero": 1})], 17),
        ([("Reshape", [-1, 6, 2, 4, 8], {}), SWAP, ("Reshape", [-1, 6, 8, 8], {})], 17),
        ([("Flatten", {"axis": 1}), ("Reshape", [-1, 6, 8, 8], {})], 17),
    ],
)  # fmt: skip
def test_channels_are_followed_there_and_back(steps: list[tuple[Any, ...]], opset: int) -> None:
    assert outcome(between(_chain(*steps), opset=opset, kernel=3)) == "removed"


def test_windows_and_back_with_channels_last() -> None:
    """The window partition of Swin: only batch, height and width are regrouped."""
    windows: list[tuple[Any, ...]] = [
        ("Transpose", {"perm": [0, 2, 3, 1]}),
        ("Reshape", [-1, 2, 4, 2, 4, 6], {}),
        ("Transpose", {"perm": [0, 1, 3, 2, 4, 5]}),
        ("Reshape", [-1, 16, 6], {}),
        ("Reshape", [-1, 2, 2, 4, 4, 6], {}),
        ("Transpose", {"perm": [0, 1, 3, 2, 4, 5]}),
        ("Reshape", [-1, 8, 8, 6], {}),
        ("Transpose", {"perm": [0, 3, 1, 2]}),
    ]
    assert outcome(between(_chain(*windows), kernel=3)) == "removed"


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ([-1, 6, 64], [-1, 4, 64]),
        ([0, 0, -1], [0, 0, -1]),
        ([0, -1, 64], [0, -1, 64]),
        ([-1, 6, 4, 16], [-1, 4, 4, 16]),
    ],
)
def test_only_the_number_of_channels_is_rewritten(asked: list[int], written: list[int]) -> None:
    back = ("Reshape", [-1, 6, 8, 8], {})
    smaller = cut(between(_chain(("Reshape", asked, {}), back))).model
    assert constant_input(smaller) == written
    assert constant_input(smaller, "tested1") == [-1, 4, 8, 8]


def _linear(shape: Sequence[int] | None) -> onnx.ModelProto:
    """Conv, gate, Flatten or Reshape, Gemm."""
    net = Net(size=4)
    x = net.gate(net.conv("input", 6, "one"), [1, 4], "gate")
    if shape is None:
        x = net.node("Flatten", [x], "tested")
    else:
        x = net.node("Reshape", [x, net.constant("shape", np.array(shape))], "tested")
    return net.model(net.gemm(x, 96, 5, "logits"))


@pytest.mark.parametrize("shape", [None, [-1, 96], [0, 96], [0, -1]])
def test_each_channel_has_a_block_of_columns(shape: list[int] | None) -> None:
    model = _linear(shape)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    kept = np.concatenate([np.arange(16) + 16 * channel for channel in (0, 2, 3, 5)])
    np.testing.assert_array_equal(weight(smaller, "logits"), weight(model, "logits")[:, kept])


def test_a_generator_starts_with_a_matrix_product() -> None:
    """Gemm, Reshape to height and width: sixteen of its rows are one channel, all of which have to be closed."""
    net = Net(size=1)
    x = net.node("Flatten", ["input"], "flat")
    x = net.gemm(x, 3, 96, "linear")
    shut = [*range(16, 32), *range(64, 80), *range(5)]
    x = net.gate(net.relu(x, "act"), shut, "gate", shape="1c")
    x = node(net, "Reshape", x, "image", 6, np.array([-1, 6, 4, 4]))
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert weight(surgery.model, "two").shape[1] == 4
    expected = [-1 if i < 5 else i for i in range(96) if i // 16 not in (1, 4)]
    assert remains(model, surgery.model, "linear") == expected
    assert constant_input(surgery.model, "image") == [-1, 4, 4, 4]


def test_squeeze_and_unsqueeze_around_matrix_products() -> None:
    net = Net()
    x = net.node("GlobalAveragePool", [net.gate(net.relu(net.conv("input", 6, "one"), "act"), [1, 4], "gate")], "pool")
    x = node(net, "Squeeze", x, "squeezed", 6, np.array([2, 3]))
    hidden = net.gate(net.relu(net.gemm(x, 6, 8, "hidden"), "r"), [0], "gate2", shape="1c")
    x = node(net, "Unsqueeze", hidden, "unsqueezed", 8, np.array([2, 3]))
    smaller = cut(net.model(net.conv(x, 5, "two", kernel=1))).model
    assert weight(smaller, "hidden").shape == (7, 4)
    assert weight(smaller, "two").shape[1] == 7


@pytest.mark.parametrize(("closed", "left"), [((1, 4), [0, 2, 3, 5]), ((0, 1, 2, 4, 5), [-1, 3])])
def test_squeeze_without_axes_must_not_meet_a_single_channel(closed: tuple[int, ...], left: list[int]) -> None:
    """Were one channel left, its axis would go as well: a second one stays."""
    model = between(_chain(("Unsqueeze", [1], {}), ("Squeeze", {})), closed=closed)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2  # were it 1, that axis would go
    surgery = cut(model)
    assert remains(model, surgery.model) == left
    reasons = {entry["reason"]: entry["channels"] for entry in surgery.report["cuts_not_made"]}
    assert reasons == ({"it squeezes whatever has size 1": 1} if -1 in left else {})


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (
            [("Reshape", [-1, 8, 8], {}), ("Reshape", [-1, 6, 8, 8], {})],
            "joins or splits the channels with a dimension",
        ),
        ([("Reshape", [-1, 4], {}), ("Reshape", [-1, 6, 8, 8], {})], "joins or splits the channels with a dimension"),
    ],
)
def test_channels_that_are_joined_with_the_batch_are_lost(steps: list[tuple[Any, ...]], reason: str) -> None:
    assert reason in outcome(between(_chain(*steps)))


@pytest.mark.parametrize(
    ("turned", "asked", "columns"),
    [
        (False, [0, 12, -1], [0, 1, 4, 5, 6, 7, 10, 11]),
        (False, [0, 6, -1], [0, 2, 3, 5]),
        (True, [0, -1, 12], [0, 2, 3, 5, 6, 8, 9, 11]),
        (True, [0, -1, 6], [0, 2, 3, 5]),
    ],
)
def test_channels_beside_dimensions_of_any_size(turned: bool, asked: list[int], columns: list[int]) -> None:
    """Height and width are free: channels in front of them, or behind them, are followed where they come out even."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), [1, 4], "gate")
    if turned:
        x = node(net, "Transpose", x, "last", 6, perm=[0, 2, 3, 1])
    x = node(net, "Reshape", x, "tested", max(asked), np.array(asked))
    x = net.node("ReduceMax", [x], "largest", axes=[1 if turned else 2], keepdims=0)
    model = with_free_size(net.model(net.gemm(x, max(asked), 5, "logits")))
    surgery = compress(model)
    assert remains(model, surgery.model) == [0, 2, 3, 5]
    np.testing.assert_array_equal(weight(surgery.model, "logits"), weight(model, "logits")[:, columns])
    assert_same_at(model, surgery.model, 2, 3, 4, 10)


@pytest.mark.parametrize(("turned", "asked"), [(False, [0, 3, -1]), (True, [0, -1, 3])])
def test_pairs_of_channels_beside_dimensions_of_any_size(turned: bool, asked: list[int]) -> None:
    """Neighbours share an index, or channels that are three apart: they go together."""
    net = Net()
    closed = [2, 3, 4] if not turned else [1, 4, 2]
    x = net.gate(net.conv("input", 6, "one"), closed, "gate")
    if turned:
        x = node(net, "Transpose", x, "last", 6, perm=[0, 2, 3, 1])
    x = node(net, "Reshape", x, "tested", 3, np.array(asked))
    x = net.node("ReduceMax", [x], "largest", axes=[1 if turned else 2], keepdims=0)
    model = with_free_size(net.model(net.gemm(x, 3, 5, "logits")))
    surgery = compress(model)
    assert remains(model, surgery.model) == ([0, -1, 3, 5] if turned else [0, 1, -1, 5])
    assert weight(surgery.model, "logits").shape == (5, 2)
    assert_same_at(model, surgery.model, 2, 3, 4, 10)


def test_what_was_flattened_is_split_as_it_was() -> None:
    """Whoever reads it: here Slices, of which one wants fewer channels than there are rows."""
    flat = [("Flatten", {}), ("Reshape", [-1, 6, 8, 8], {})]
    model = between(_chain(*flat, ("Slice", [0], [5], [2], {}), ("Slice", [0], [5], [1], {}), width=5))
    assert remains(model, cut(model).model) == [0, 2, 3]


def test_groups_of_a_norm_stay_whole() -> None:
    """[N, groups, -1] in front of an InstanceNormalization and back, at any size: here with a closed group."""

    def build(net: Net, x: str) -> str:
        x = node(net, "Reshape", x, "grouped", 3, np.array([0, 3, -1]))
        x = node(net, "Abs", x, "norm", 3)
        return node(net, "Reshape", x, "tested", 6, np.array([0, 6, 8, 8]))

    model = between(build, closed=(2, 3, 4))
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 1, -1, 5]
    assert constant_input(smaller, "grouped") == [0, 2, -1]
    assert constant_input(smaller) == [0, 4, 8, 8]


# ---- shapes that are computed


def _size(net: Net, of: str, axis: int, name: str) -> str:
    """The size of a tensor along an axis, in a list of one, as exporters get it."""
    shape = net.node("Shape", [of], f"{name}.shape")
    number = net.node("Gather", [shape, net.constant(f"{name}.axis", np.array(axis))], f"{name}.number", axis=0)
    return net.node("Unsqueeze", [number, net.constant(f"{name}.zero", np.array([0]))], name)


def _told(net: Net, x: str, parts: Sequence[str | list[int]], name: str = "tested", operator: str = "Reshape") -> str:
    """A node that is told a shape put together from sizes and constants."""
    inputs = [
        part if isinstance(part, str) else net.constant(f"{name}.{i}", np.array(part)) for i, part in enumerate(parts)
    ]
    shape = net.node("Concat", inputs, f"{name}.concat", axis=0)
    net.node(operator, [x, shape], name)
    net.width[name] = 6
    return name


def _back(net: Net, x: str) -> str:
    """To [N, 6, 8, 8] again, by a constant."""
    return node(net, "Reshape", x, "back", 6, np.array([-1, 6, 8, 8]))


def test_a_computed_shape_becomes_a_constant_one() -> None:
    """Batch from Shape, channels baked in or computed, sizes that are fixed: nothing of the arithmetic is left."""

    def build(net: Net, x: str) -> str:
        batch, width = _size(net, x, 0, "batch"), _size(net, x, 1, "width")
        tokens = _told(net, x, [batch, width, [64]], "tokens")
        return _told(net, tokens, [batch, [6], _size(net, x, 2, "height"), [-1]])

    model = between(build)
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert constant_input(surgery.model, "tokens") == [0, 4, 64]
    assert constant_input(surgery.model) == [0, 4, 8, 8]
    assert "Shape" not in operators(surgery.model)


def test_zeros_that_are_meant_literally_are_not_written() -> None:
    """Where leading dimensions are to be copied, `allowzero` is switched off."""

    def build(net: Net, x: str) -> str:
        x = _told(net, x, [_size(net, x, 0, "batch"), [6], [64]])
        net.nodes[-1].attribute.append(onnx.helper.make_attribute("allowzero", 1))
        return _back(net, x)

    surgery = cut(between(build))
    assert constant_input(surgery.model) == [0, 4, 64]
    tested = next(node for node in surgery.model.graph.node if node.name == "tested")
    assert [entry.i for entry in tested.attribute if entry.name == "allowzero"] == [0]


def _tokens_and_back(net: Net, x: str, *middle: str) -> str:
    """[N, C, H, W] to tokens and back where height and width are free: the second shape stays computed."""
    batch = _size(net, "input", 0, "batch")
    tokens = node(net, "Reshape", x, "tokens", 6, np.array([0, 6, -1]))
    return _told(net, tokens, [batch, *middle, _size(net, x, 2, "height"), _size(net, x, 3, "columns")])


@pytest.mark.parametrize("where", ["baked in", "computed", "one shape", "of the tensor", "of another"])
def test_shapes_that_stay_computed(where: str) -> None:
    """The number of channels is left to be inferred, or follows the tensor that it is the size of."""

    def build(net: Net, x: str) -> str:
        if where == "baked in":
            middle = net.constant("six", np.array([6]))
        elif where == "computed":
            middle = net.node("Mul", [_size(net, x, 1, "width"), net.constant("once", np.array([1]))], "six")
        elif where == "one shape":
            whole = net.node("Shape", [x], "whole")
            sizes = [
                net.node("Gather", [whole, net.constant(f"at{i}", np.array([i]))], f"size{i}", axis=0) for i in range(4)
            ]
            return _told(net, node(net, "Reshape", x, "tokens", 6, np.array([0, 6, -1])), sizes)
        else:
            other = x if where == "of the tensor" else net.relu(x, "other")
            shape = net.node("Shape", [other], "both.shape")
            ends = [net.constant(f"both.{i}", np.array([i])) for i in (0, 2)]
            both = net.node("Slice", [shape, *ends], "both")
            sizes = [both, _size(net, x, 2, "height"), _size(net, x, 3, "columns")]
            return _told(net, node(net, "Reshape", x, "tokens", 6, np.array([0, 6, -1])), sizes)
        return _tokens_and_back(net, x, middle)

    model = with_free_size(between(build, kernel=3))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert_same_at(model, surgery.model, 2, 3, 5, 9)


def test_one_computed_shape_for_two_tensors() -> None:
    """Each has lost another number of channels, so none is written; with channels on different axes: not followed."""

    def build(net: Net, x: str) -> str:
        first = _tokens_and_back(net, x, net.constant("six", np.array([6])))
        other = net.gate(net.conv("input", 6, "other"), [0, 1, 2], "gate2")
        tokens = node(net, "Reshape", other, "tokens2", 6, np.array([0, 6, -1]))
        net.node("Reshape", [tokens, "tested.concat"], "second")
        net.width["second"] = 6
        return net.add(net.conv(first, 3, "three"), net.conv("second", 3, "four"), "sum")

    model = with_free_size(between(build))
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, 2, 3, 5]
    assert remains(model, surgery.model, "other") == [3, 4, 5]
    assert_same_at(model, surgery.model, 2, 3, 4, 7)


def test_a_computed_shape_that_others_read_is_not_touched() -> None:
    """An Expand would not understand a -1."""

    def build(net: Net, x: str) -> str:
        back = _tokens_and_back(net, x, net.constant("six", np.array([6])))
        wide = net.node("Expand", [net.node("ReduceMax", ["input"], "most", axes=[1, 2, 3]), "tested.concat"], "wide")
        return net.node("Mul", [back, net.node("ReduceMax", [wide], "all", axes=[1, 2, 3])], "product")

    assert outcome(with_free_size(between(build))) == COMPUTED


def test_sizes_of_a_part_of_a_shape() -> None:
    """Since opset 15 Shape gives a part: what is not in it is not read."""

    def build(net: Net, x: str) -> str:
        batch = net.node("Shape", [x], "batch", start=0, end=1)
        rest = net.node("Shape", [x], "rest", start=2)
        tokens = node(net, "Reshape", x, "tokens", 6, np.array([0, 6, -1]))
        return _told(net, tokens, [batch, [6], rest])

    model = with_free_size(between(build))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert_same_at(model, surgery.model, 2, 3, 5, 9)


def test_a_size_that_looks_fixed_at_the_usual_sizes_is_not_written() -> None:
    """Height over 200 is 1 for images of 224 to 256 pixels, and 2 for larger ones."""

    def build(net: Net, x: str) -> str:
        parts = net.node("Div", [_size(net, "input", 2, "height"), net.constant("large", np.array([200]))], "parts")
        rest = net.constant("rest", np.array([-1]))
        batch, six = _size(net, "input", 0, "batch"), net.constant("six", np.array([6]))
        x = net.node("GlobalAveragePool", [x], "pooled")
        x = net.node("Expand", [x, net.constant("expanded", np.array([1, 1, 2, 2]))], "wide")
        net.width[x] = 6
        return _told(net, x, [batch, six, parts, rest])

    model = with_free_size(between(build))
    surgery = compress(model)
    assert outcome(model, surgery) == COMPUTED
    assert_same_at(model, surgery.model, 1, 3, 224, 230)
    assert_same_at(model, surgery.model, 1, 3, 448, 224)


# ---- Shape and Size


@pytest.mark.parametrize(
    ("attributes", "index", "opset", "expected"),
    [
        ({}, 0, 17, "removed"),
        ({}, 2, 17, "removed"),
        ({}, -1, 17, "removed"),
        ({}, 1, 17, READ),
        ({}, -3, 17, READ),
        ({"start": 1}, 0, 17, READ),
        ({"start": 1}, 1, 17, "removed"),
        ({"start": -2}, 0, 17, "removed"),
        ({"end": 1}, 0, 17, "removed"),
        ({"start": 0, "end": -2}, 1, 17, READ),
    ],
)
def test_who_reads_the_number_of_channels_keeps_them(
    attributes: dict[str, int], index: int, opset: int, expected: str
) -> None:
    def build(net: Net, x: str) -> str:
        shape = net.node("Shape", [x], "shape", **attributes)
        number = net.node("Gather", [shape, net.constant("which", np.array([index]))], "number", axis=0)
        factor = net.node("Cast", [number], "factor", to=1)
        return net.node("Mul", [x, factor], "tested")

    assert outcome(between(build, opset=opset)) == expected


def test_channels_whose_number_is_read_may_be_emptied() -> None:
    model = between(lambda net, x: net.node("Mul", [x, net.node("Cast", [_size(net, x, 1, "n")], "f", to=1)], "tested"))
    assert remains(model, cut(model).model) == [0, -1, 2, 3, -1, 5]


def test_the_number_of_elements_counts_channels() -> None:
    def build(net: Net, x: str) -> str:
        return net.node("Div", [x, net.node("Cast", [net.node("Size", [x], "size")], "count", to=1)], "tested")

    assert outcome(between(build)) == READ


def test_a_shape_that_is_an_output() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), [1, 4], "gate")
    shape = net.node("Shape", [x], "shape")
    model = net.model(net.conv(x, 4, "two"), ranks=[4])
    model.graph.output.append(onnx.helper.make_tensor_value_info(shape, 7, [4]))
    assert outcome(model) == READ


def test_a_tensor_of_which_only_the_shape_is_read_keeps_a_channel() -> None:
    """All channels are closed, and the batch size is read off the closed tensor."""

    def build(net: Net, x: str) -> str:
        other = net.conv("input", 6, "other")
        shape = net.node("Concat", [_size(net, x, 0, "batch"), net.constant("rest", np.array([6, -1]))], "s", axis=0)
        x = net.node("Reshape", [other, shape], "tokens")
        return _told(net, x, [[-1], [6], _size(net, "gate", 2, "height"), [8]])

    model = with_free_size(between(build, closed=range(6)))
    surgery = compress(model)
    assert len(remains(model, surgery.model)) <= 1
    assert_same_at(model, surgery.model, 2, 3, 6, 8)


# ---- Expand, ConstantOfShape, Tile


def _pooled(build: Build) -> Build:
    """`build` behind a global pooling."""
    return lambda net, x: build(net, net.node("GlobalAveragePool", [x], "pooled"))


@pytest.mark.parametrize(
    ("asked", "written"),
    [([1, 1, 3, 5], [1, 1, 3, 5]), ([1, 6, 3, 5], [1, 4, 3, 5]), ([6, 1, 2], [4, 1, 2]), ([2], [2])],
)
def test_expand_over_space(asked: list[int], written: list[int]) -> None:
    model = between(_pooled(_chain(("Expand", asked, {}))), kernel=3)
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert constant_input(surgery.model) == written


def test_expand_to_a_higher_rank_moves_the_channels() -> None:
    steps: list[tuple[Any, ...]] = [("Expand", [1, 1, 6, 1, 1], {}), ("Squeeze", [0], {})]
    assert outcome(between(_chain(*steps))) == "removed"


@pytest.mark.parametrize("free", [False, True])
def test_expand_to_a_computed_shape(free: bool) -> None:
    """As `expand(-1, -1, height, width)` and `expand_as` are written."""

    def build(net: Net, x: str) -> str:
        pooled = net.node("GlobalAveragePool", [x], "pooled")
        wide = _told(net, pooled, [[1, 1], _size(net, x, 2, "h"), _size(net, x, 3, "w")], "wide", "Expand")
        net.node("Expand", [pooled, net.node("Shape", [x], "as")], "tested")
        net.width["tested"] = 6
        return net.add(wide, "tested", "sum")

    model = between(build, kernel=3)
    model = with_free_size(model) if free else model
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert_same_at(model, surgery.model, 2, 3, *((5, 9) if free else (8, 8)))


@pytest.mark.parametrize("told", [False, True])
def test_expand_with_the_question_whether_a_size_is_minus_one(told: bool) -> None:
    """The older exporter's `expand(-1, c, h, w)`, or -1 for c: Where(shape == -1, 1, shape)."""

    def build(net: Net, x: str) -> str:
        pooled = net.node("GlobalAveragePool", [x], "pooled")
        minus = net.constant("minus", np.array([-1]))
        sizes = [_size(net, x, 1, "c") if told else minus, _size(net, x, 2, "h"), _size(net, x, 3, "w")]
        shape = net.node("Concat", [minus, *sizes], "asked", axis=0)
        ones = net.node("ConstantOfShape", [net.node("Shape", [shape], "rank")], "ones")
        net.nodes[-1].attribute.append(onnx.helper.make_attribute("value", numpy_helper.from_array(np.array([1]))))
        negative = net.node("Mul", [ones, net.constant("-1", np.array(-1))], "negative")
        chosen = net.node("Where", [net.node("Equal", [shape, negative], "is"), ones, shape], "chosen")
        net.node("Expand", [pooled, chosen], "tested")
        net.width["tested"] = 6
        return "tested"

    model = with_free_size(between(build, kernel=3))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert_same_at(model, surgery.model, 2, 3, 5, 9)


def _one_map(net: Net, expand: Build) -> onnx.ModelProto:
    """A single channel that becomes six, multiplied with six of which two are closed."""
    x = net.gate(net.conv("input", 6, "one"), [1, 4], "gate")
    wide = expand(net, net.conv("input", 1, "map", kernel=1))
    return net.model(net.conv(net.node("Mul", [x, wide], "product"), 4, "two"))


@pytest.mark.parametrize("operator", ["Expand", "Tile"])
def test_one_channel_becomes_as_many_as_are_kept(operator: str) -> None:
    model = _one_map(Net(), _chain((operator, [1, 6, 1, 1], {})))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert remains(model, surgery.model, "map") == [0]
    assert constant_input(surgery.model) == [1, 4, 1, 1]


@pytest.mark.parametrize(
    ("asked", "expected", "token"),
    [(1, "removed", [7, 2, 3, 5]), (6, "kept: its shape is computed", [7, 0, 2, 3, 0, 5])],
)
def test_a_token_for_every_image(asked: int, expected: str, token: list[int]) -> None:
    """A constant that is expanded over the batch: each of its numbers is a constant channel."""

    def build(net: Net, x: str) -> str:
        tokens = node(
            net, "Transpose", node(net, "Reshape", x, "rows", 6, np.array([0, 6, 64])), "t", 6, perm=[0, 2, 1]
        )
        net.constant("token", np.array([7, 0, 2, 3, 0, 5], np.float32).reshape(1, 1, 6))
        shape = net.node("Concat", [_size(net, x, 0, "n"), net.constant("r", np.array([1, asked]))], "shape", axis=0)
        cls = net.node("Expand", ["token", shape], "cls")
        net.node("Concat", [cls, tokens], "tested", axis=1)
        net.node("Slice", ["tested", *(net.constant(f"s{i}", np.array([v])) for i, v in enumerate((1, 65, 1)))], "s")
        net.node("Transpose", ["s"], "u", perm=[0, 2, 1])
        return _back(net, "u")

    model = between(build, kernel=3)
    surgery = cut(model)
    assert constant(surgery.model, "token").ravel().tolist() == token
    assert outcome(model, surgery) == expected


@pytest.mark.parametrize("written", [False, True])
def test_zeros_are_joined_to_the_channels(written: bool) -> None:
    """ConstantOfShape for three more channels: read by nobody, they go; where their number is worked out, they stay."""

    def build(net: Net, x: str) -> str:
        sizes = [_size(net, x, 2, "h"), _size(net, x, 3, "w")]
        three = net.constant("three", np.array([3]))
        parts = (
            [_size(net, x, 0, "n"), three, *sizes]
            if not written
            else [net.constant("one.", np.array([1])), three, *sizes]
        )
        zeros = net.node("ConstantOfShape", [net.node("Concat", parts, "asked", axis=0)], "zeros")
        net.node("Concat", [zeros, x], "tested", axis=1)
        net.width["tested"] = 9
        return "tested"

    model = between(build)
    if written:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, 2, 3, 5]
    assert weight(surgery.model, "two").shape[1] == (4 if written else 7)


@pytest.mark.parametrize(
    ("repeats", "width", "columns"),
    [([1, 1, 2, 3], 6, [0, 2, 3, 5]), ([1, 2, 1, 1], 12, [0, 2, 3, 5, 6, 8, 9, 11])],
)
def test_tile(repeats: list[int], width: int, columns: list[int]) -> None:
    """Along the channels, copy follows copy; a channel goes with all of its copies."""
    model = between(_chain(("Tile", repeats, {}), width=width))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    np.testing.assert_array_equal(weight(surgery.model, "two"), weight(model, "two")[:, columns])


def test_how_often_channels_are_repeated_may_not_depend_on_the_input() -> None:
    def build(net: Net, x: str) -> str:
        times = net.node("Div", [_size(net, "input", 2, "h"), net.constant("h.", np.array([8]))], "times")
        ones = net.constant("ones", np.array([1]))
        net.node("Tile", [x, net.node("Concat", [ones, times, ones, ones], "repeats", axis=0)], "tested")
        net.width["tested"] = 6
        return net.node("GlobalAveragePool", ["tested"], "pool")

    model = with_free_size(between(build))
    surgery = compress(model, verify=False)
    assert outcome(model, surgery) == "kept: how often it repeats is computed"
