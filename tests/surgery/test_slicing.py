"""Slice, Split, Pad and Concat: along the channels, and along other axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.surgery import compress
from tests.surgery.between import Build, assert_same_at, between, constant_input, node, remains, with_free_size
from tests.surgery.graphs import Net, cut, fates, names, operators, outcome, weight

LOWEST = np.iinfo(np.int64).min


def _slice(*bounds: list[int], width: int = 6) -> Build:
    """Slice with starts, ends, axes, steps."""
    return lambda net, x: node(net, "Slice", x, "tested", width, *(np.array(b, np.int64) for b in bounds))


def _pad(pads: list[int], *, value: float | None = None, width: int = 6, **attributes: Any) -> Build:
    extra = [np.array(pads, np.int64), *([] if value is None else [np.array(value, np.float32)])]
    return lambda net, x: node(net, "Pad", x, "tested", width, *extra, **attributes)


def _attributes(model: onnx.ModelProto, name: str = "tested") -> dict[str, Any]:
    found = next(node for node in model.graph.node if node.name == name)
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in found.attribute}


# ---- Slice


@pytest.mark.parametrize(
    "bounds",
    [
        ([1], [7], [3]),
        ([1, 0], [7, 99], [-1, 2], [2, 1]),
        ([-1], [LOWEST], [2], [-1]),
        ([0, 0, 1], [99, 6, 7]),
    ],
    ids=["width", "strides", "upside down", "no axes"],
)
def test_slices_of_space_let_channels_pass(bounds: tuple[list[int], ...]) -> None:
    assert outcome(between(_slice(*bounds), kernel=3)) == "removed"


# Bounds on axis 1, filters left of six where 1 and 4 are closed (-1: a zero one), new starts and ends, None: no Slice.
CHANNELS: list[tuple[tuple[list[int], ...], list[int], tuple[list[int], list[int]] | None]] = [
    (([1], [6], [1]), [2, 3, 5], None),
    (([0], [4], [1]), [0, 2, 3], None),
    (([-4], [-2], [-3]), [2, 3], None),
    (([5], [LOWEST], [1], [-1]), [0, 2, 3, 5], ([3], [-5])),
    (([4], [1], [1], [-1]), [2, 3], ([1], [-3])),
    (([0], [6], [1], [2]), [0, -1, 2], ([0], [3])),  # nothing is taken behind 2
    (([1], [6], [1], [2]), [3, -1, 5], ([0], [3])),
    (([5], [0], [1], [-2]), [3, -1, 5], ([2], [-4])),
    (([2], [6], [1], [3]), [2, -1, -1, 5], ([0], [4])),
]


@pytest.mark.parametrize(("bounds", "left", "rewritten"), CHANNELS)
def test_slices_of_channels(
    bounds: tuple[list[int], ...], left: list[int], rewritten: tuple[list[int], list[int]] | None
) -> None:
    """Channels that are stepped over go with one that is taken, in blocks: a Slice can take what is left."""
    width = len(range(6)[slice(bounds[0][0], bounds[1][0], bounds[3][0] if len(bounds) > 3 else 1)])
    model = between(_slice(*bounds, width=width))
    smaller = cut(model).model
    assert remains(model, smaller) == left
    if rewritten is None:
        assert "tested" not in names(smaller)
    else:
        assert (constant_input(smaller), constant_input(smaller, index=2)) == rewritten


def test_what_is_stepped_over_is_read_by_another_slice() -> None:
    """Even and odd channels: two neighbours make a block, of which both must be closed."""

    def build(net: Net, x: str) -> str:
        even, odd = (
            node(net, "Slice", x, name, 3, *(np.array([n]) for n in (start, 6, 1, 2)))
            for name, start in (("even", 0), ("odd", 1))
        )
        return net.add(even, odd, "sum")

    model = between(build, closed=(2, 3, 4))
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, 1, -1, 5]
    assert weight(surgery.model, "two").shape[1] == 2
    (entry,) = surgery.report["cuts_not_made"]
    assert (entry["layer"], entry["channels"], entry["operator"]) == ("one", 1, "coupling")


@pytest.mark.parametrize(
    ("axes", "starts", "ends", "left", "rewritten"),
    [
        ([1, 2], [1, 1], [6, 8], [2, 3, 5], ([0, 1], [3, 8])),  # channel 0 is read by nobody
        ([2], [1], [5], [0, 2, 3, 5], ([1], [5])),
        (None, [0, 1, 2], [9, 6, 8], [2, 3, 5], ([0, 0, 2], [9, 3, 8])),
    ],
)
def test_slice_by_attributes(
    axes: list[int] | None,
    starts: list[int],
    ends: list[int],
    left: list[int],
    rewritten: tuple[list[int], list[int]],
) -> None:
    attributes = {"starts": starts, "ends": ends, **({} if axes is None else {"axes": axes})}
    width = 6 if axes == [2] else 5
    model = between(lambda net, x: node(net, "Slice", x, "tested", width, **attributes), opset=9)
    smaller = cut(model).model
    assert remains(model, smaller) == left
    assert tuple(_attributes(smaller)[name] for name in ("starts", "ends")) == rewritten


def _computed_half(net: Net, x: str) -> str:
    """The first half of the channels, as `chunk` is exported: the bound is worked out from the shape."""
    shape = net.node("Shape", [x], "shape")
    width = net.node("Gather", [shape, net.constant("one.", np.array([1]))], "width", axis=0)
    end = net.node("Div", [width, net.constant("two.", np.array([2]))], "end")
    net.node("Slice", [x, net.constant("start", np.array([0])), end, net.constant("axis", np.array([1]))], "tested")
    net.width["tested"] = 3
    return "tested"


@pytest.mark.parametrize("free", [False, True])
def test_bounds_that_are_computed_from_the_number_of_channels(free: bool) -> None:
    model = between(_computed_half)
    model = with_free_size(model) if free else model
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2]
    assert not {"Shape", "Gather", "Div", "Slice"} & operators(smaller).keys()


def test_computed_bounds() -> None:
    """Those of space let channels pass; those of channels are not followed where they depend on the input."""

    def build(axis: int) -> Build:
        def made(net: Net, x: str) -> str:
            shape = net.node("Shape", ["input"], "shape")
            end = net.node("Gather", [shape, net.constant("three.", np.array([2]))], "end", axis=0)
            bounds = [net.constant("start", np.array([0])), end, net.constant("axis", np.array([axis]))]
            net.node("Slice", [x, *bounds], "tested")
            net.width["tested"] = 6
            return "tested"

        return made

    assert outcome(with_free_size(between(build(2)))) == "removed"
    model = with_free_size(between(build(1)))
    assert outcome(model, compress(model)) == "kept: its bounds are computed"


# ---- Split


def _split(
    net: Net, x: str, sizes: list[int], *, told: str = "input", read: list[int] | None = None, back: bool = False
) -> str:
    """Split, and a Concat of the parts `read`, in turn or from the last to the first."""
    parts = [f"part{i}" for i in range(len(sizes))]
    inputs = [x, net.constant("sizes", np.array(sizes))] if told == "input" else [x]
    attributes = {"attribute": {"split": sizes}, "number": {"num_outputs": len(sizes)}}.get(told, {})
    net.nodes.append(helper.make_node("Split", inputs, parts, name="tested", axis=1, **attributes))
    chosen = [parts[i] for i in (read if read is not None else range(len(sizes)))]
    net.node("Concat", chosen[::-1] if back else chosen, "joined", axis=1)
    net.width["joined"] = sum(sizes[parts.index(part)] for part in chosen)
    return "joined"


@pytest.mark.parametrize(("told", "opset"), [("attribute", 7), ("attribute", 12), ("input", 13), ("input", 18)])
def test_split_with_sizes(told: str, opset: int) -> None:
    model = between(lambda net, x: _split(net, x, [2, 3, 1], told=told, back=True), opset=opset)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    assert (_attributes(smaller)["split"] if told == "attribute" else constant_input(smaller)) == [1, 2, 1]
    np.testing.assert_array_equal(weight(smaller, "two"), weight(model, "two")[:, [0, 1, 2, 4]])


# How a Split into equal parts is told, how many channels and parts, what is closed, and the parts that are left:
# told by nothing more than their number, or with sizes of their own.
EQUAL = [
    ("number", 18, 6, 2, [1, 4], {"num_outputs": 2}, None),
    ("number", 18, 6, 2, [0, 1], {}, [1, 3]),
    ("number", 18, 6, 3, [0, 2, 3], {}, [1, 2]),
    ("number", 18, 6, 3, [2, 3], {"num_outputs": 2}, None),
    ("number", 18, 5, 2, [0], {"num_outputs": 2}, None),  # three and two before, two and two then
    ("number", 18, 5, 2, [4], {}, [3, 1]),
    ("", 11, 6, 2, [1, 4], {}, None),
    ("", 11, 6, 2, [0, 1], {"split": [1, 3]}, None),
    ("", 13, 6, 2, [1, 4], {}, None),
    ("", 13, 6, 2, [0, 1], {}, [1, 3]),
]


@pytest.mark.parametrize(("told", "opset", "width", "parts", "closed", "attributes", "sizes"), EQUAL)
def test_split_into_equal_parts(
    told: str,
    opset: int,
    width: int,
    parts: int,
    closed: list[int],
    attributes: dict[str, Any],
    sizes: list[int] | None,
) -> None:
    size = -(-width // parts)
    given = [size] * (parts - 1) + [width - size * (parts - 1)]
    model = between(lambda net, x: _split(net, x, given, told=told, back=True), width=width, closed=closed, opset=opset)
    smaller = cut(model).model
    assert fates(model, cut(model), closed=closed) == ["removed" if i in closed else "open" for i in range(width)]
    found = _attributes(smaller)
    assert found.pop("axis") == 1
    assert found == attributes
    split = next(node for node in smaller.graph.node if node.name == "tested")
    assert (constant_input(smaller) if len(split.input) > 1 else None) == sizes


def test_sizes_that_are_computed() -> None:
    """Half of the number of channels each: constants take the place of the arithmetic."""

    def build(net: Net, x: str) -> str:
        shape = net.node("Shape", [x], "shape", start=1, end=2)
        half = net.node("Div", [shape, net.constant("two.", np.array([2]))], "half")
        sizes = net.node("Concat", [half, half], "sizes", axis=0)
        net.nodes.append(helper.make_node("Split", [x, sizes], ["left", "right"], name="tested", axis=1))
        net.width["left"] = net.width["right"] = 3
        net.node("Concat", ["right", "left"], "joined", axis=1)
        net.width["joined"] = 6
        return "joined"

    model = between(build, closed=(1, 2, 4))
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, 3, 5]
    assert constant_input(surgery.model) == [1, 2]
    assert "Shape" not in operators(surgery.model)


def test_a_part_that_is_gone_takes_its_output_along() -> None:
    model = between(lambda net, x: _split(net, x, [2, 3, 1], back=True), closed=(2, 3, 4))
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 1, 5]
    split = next(node for node in smaller.graph.node if node.name == "tested")
    assert list(split.output) == ["part0", "part2"]
    assert constant_input(smaller) == [2, 1]


def test_a_split_of_one_part_goes() -> None:
    model = between(lambda net, x: _split(net, x, [2, 3, 1]), closed=(0, 1, 3, 5))
    smaller = cut(model).model
    assert remains(model, smaller) == [2, 4]
    assert not {"Split", "Concat"} & operators(smaller).keys()


def test_a_part_that_nobody_reads() -> None:
    model = between(lambda net, x: _split(net, x, [2, 3, 1], read=[0, 2]))
    assert remains(model, cut(model).model) == [0, 5]


def test_a_part_that_is_an_output_keeps_its_place() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), [0, 1, 4], "gate")
    joined = _split(net, x, [2, 3, 1], read=[0, 1])
    net.width["part1"] = 3
    model = net.model(net.conv(joined, 4, "two"), "part1")
    smaller = cut(model).model
    assert remains(model, smaller) == [2, 3, -1]
    assert operators(smaller)["Split"] == 0, "one part is left: the name moves to what makes it"


def test_split_of_space_couples_its_parts() -> None:
    def build(net: Net, x: str) -> str:
        net.nodes.append(helper.make_node("Split", [x], ["upper", "lower"], name="tested", axis=2))
        net.width["upper"] = net.width["lower"] = 6
        return net.add(net.relu("upper", "act"), "lower", "sum")

    assert outcome(between(build, kernel=3)) == "removed"


# ---- Pad


@pytest.mark.parametrize(
    ("pads", "attributes", "opset"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], {}, 17),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "edge"}, 17),
        ([0, 0, 1, 2, 0, 0, 3, 1], {"mode": "reflect"}, 17),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"mode": "wrap"}, 19),
        ([0, 0, -1, 0, 0, 0, 0, -1], {}, 17),
    ],
)
def test_pads_of_space_let_channels_pass(pads: list[int], attributes: dict[str, Any], opset: int) -> None:
    assert outcome(between(_pad(pads, **attributes), opset=opset, kernel=3)) == "removed"


@pytest.mark.parametrize(
    ("value", "before", "expected"),
    [(0.0, "Sigmoid", "in use"), (0.5, "Sigmoid", "folded"), (2.0, "Neg", "in use"), (-0.0, "Neg", "removed")],
)
def test_a_border_of_another_value_makes_a_constant_none(value: float, before: str, expected: str) -> None:
    build = _pad([0, 0, 1, 1, 0, 0, 1, 1], value=value)
    assert expected in outcome(between(lambda net, x: build(net, net.node(before, [x], "before"))))


def test_pad_by_attributes() -> None:
    def build(net: Net, x: str) -> str:
        return node(net, "Pad", x, "tested", 8, pads=[0, 2, 1, 1, 0, 0, 1, 1], value=0.0)

    model = between(build, opset=10)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    assert _attributes(smaller)["pads"] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_pad_of_some_axes() -> None:
    def build(net: Net, x: str) -> str:
        return node(net, "Pad", x, "tested", 8, np.array([1, 2, 1, 0]), None, np.array([3, -3]))

    model = between(build, opset=18)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    assert constant_input(smaller) == [1, 0, 1, 0]


# Pads on axis 1 and their value, then the fate of each channel and the Pad that is left.
PADS = [
    ([1, 2], None, ["open", "removed", "open", "open", "removed", "open"], None),
    ([1, 2], 3.0, ["open", "folded", "open", "open", "folded", "open"], None),
    ([-1, 0], None, ["removed", "removed", "open", "open", "removed", "open"], None),
    ([-2, 1], None, ["removed", "removed", "open", "open", "removed", "open"], None),
    ([0, -3], None, ["open", "removed", "open", "removed", "removed", "removed"], None),
]


@pytest.mark.parametrize(("pads", "value", "expected", "left"), PADS)
def test_pads_of_channels(pads: list[int], value: float | None, expected: list[str], left: list[int] | None) -> None:
    """What is added is known, what is cropped is read by nobody: the Pad is without work."""
    model = between(_pad([0, pads[0], 0, 0, 0, pads[1], 0, 0], value=value, width=6 + sum(pads)))
    surgery = cut(model)
    assert fates(model, surgery) == expected
    assert ("Pad" in operators(surgery.model)) == (left is not None)


def test_channels_that_are_added_stay_where_others_hold_their_place() -> None:
    """Behind an Add with open channels, a Pad goes on adding zeros, fewer of them."""

    def build(net: Net, x: str) -> str:
        padded = _pad([0, 2, 0, 0, 0, -3, 0, 0], width=5)(net, x)
        other = net.gate(net.conv("input", 5, "other"), [1, 3], "gate2")
        return net.add(padded, other, "sum")

    model = between(build)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2]
    assert remains(model, smaller, "other") == [0, 2, 4]
    assert constant_input(smaller) == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap"])
def test_channels_that_are_mirrored_are_a_wall(mode: str) -> None:
    model = between(_pad([0, 1, 0, 0, 0, 1, 0, 0], mode=mode, width=8), opset=19)
    assert outcome(model) == f"kept: it pads the channels by 1 and 1 in mode {mode}"


def test_a_value_that_is_computed() -> None:
    """Padded channels are not known then, and stay."""

    def build(net: Net, x: str) -> str:
        value = net.node("ReduceMax", ["input"], "value", keepdims=0)
        net.node("Pad", [x, net.constant("pads", np.array([0, 1, 0, 0, 0, 0, 0, 0])), value], "tested")
        net.width["tested"] = 7
        return "tested"

    model = between(build)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    assert weight(smaller, "two").shape[1] == 5


def test_widths_that_are_computed() -> None:
    """To a multiple of 5, as exporters write it: known for a fixed size, and only those of space vary otherwise."""

    def build(net: Net, x: str) -> str:
        shape = net.node("Shape", [x], "shape")
        height = net.node("Gather", [shape, net.constant("two.", np.array([2]))], "height", axis=0)
        left = net.node("Mod", [height, net.constant("five", np.array([5]))], "left")
        zeros = net.constant("zeros", np.zeros(5, np.int64))
        pads = net.node("Concat", [net.constant("none", np.zeros(2, np.int64)), left, zeros], "pads.", axis=0)
        net.node("Pad", [x, pads], "tested")
        net.width["tested"] = 6
        return "tested"

    assert outcome(between(build, kernel=3)) == "removed"
    model = with_free_size(between(build, kernel=3))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert_same_at(model, surgery.model, 2, 3, 7, 11)


def test_widths_of_channels_that_are_computed() -> None:
    """As many channels again, of zeros, behind those of a conv that is added."""

    def build(net: Net, x: str) -> str:
        width = net.node("Shape", [x], "width", start=1, end=2)
        zeros = [net.constant(f"zeros{n}", np.zeros(n, np.int64)) for n in (5, 2)]
        pads = net.node("Concat", [zeros[0], width, zeros[1]], "pads.", axis=0)
        net.node("Pad", [x, pads], "tested")
        net.width["tested"] = 12
        return net.add(net.gate(net.conv("input", 12, "other"), (1, 4, 7), "gate2"), "tested", "sum")

    model = between(build)
    smaller = cut(model).model
    assert remains(model, smaller) == [0, 2, 3, 5]
    assert remains(model, smaller, "other") == [0, 2, 3, 5, 6, 8, 9, 10, 11]
    assert constant_input(smaller) == [0, 0, 0, 0, 0, 5, 0, 0]


# ---- Concat


def test_concat_of_constant_parts() -> None:
    """Zeros and ones that the model holds, beside and between what is computed."""

    def build(net: Net, x: str) -> str:
        ones = np.ones((1, 3, 8, 8), np.float32) * np.array([0, 1, 2], np.float32).reshape(3, 1, 1)
        ones[0, 2, 0, 0] = 5  # no constant channel
        net.node("Concat", [net.constant("held", ones), x, "held"], "tested", axis=1)
        net.width["tested"] = 12
        return "tested"

    model = between(build)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, 2, 3, 5]
    kept = [2, 3, 5, 6, 8, 11]
    np.testing.assert_array_equal(weight(surgery.model, "two"), weight(model, "two")[:, kept])


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_concat_whose_part_goes_beside_a_constant_that_is_cut(order: str) -> None:
    """Part a is closed as a whole, of b two channels, of the constant c one: wherever c stands, it stays a constant."""
    net = Net()
    closed = {"a": [*range(6)], "b": [0, 3], "c": [2]}
    parts = {name: net.gate(net.conv("input", 6, name), closed[name], f"gate.{name}") for name in "ab"}
    held = net.random.standard_normal((1, 4, 8, 8)).astype(np.float32)
    held[:, closed["c"]] = 0
    parts["c"] = net.constant("held", held)
    widths = {"a": 6, "b": 6, "c": 4}
    net.node("Concat", [parts[name] for name in order], "joined", axis=1)
    net.width["joined"] = 16
    model = net.model(net.conv("joined", 4, "two", kernel=1))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    surgery = cut(model)
    assert "a" not in names(surgery.model)
    kept = [(name, i) for name in order for i in range(widths[name]) if i not in closed[name]]
    first = {name: sum(widths[x] for x in order[: order.index(name)]) for name in order}
    np.testing.assert_array_equal(
        weight(surgery.model, "two"), weight(model, "two")[:, [first[name] + i for name, i in kept]]
    )


def test_concat_along_another_axis_with_a_constant() -> None:
    """The constant loses its channels like the tensors it is joined with."""

    def build(net: Net, x: str) -> str:
        border = net.random.standard_normal((1, 6, 1, 8)).astype(np.float32)
        return node(net, "Concat", x, "tested", 6, border, axis=-2)

    model = between(build, kernel=3)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    surgery = cut(model)
    assert outcome(model, surgery) == "kept: it goes together with channels in use, in tested"
