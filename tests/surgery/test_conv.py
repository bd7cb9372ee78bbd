"""Conv, ConvTranspose and DeformConv: what closed channels do before and behind them, and what padding does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy.surgery import Surgery, compress
from tests.surgery.graphs import CLOSED, Net, constant, cut, fates, names, weight

PADDING = "kept: the constant 0.5 meets the zero padding"
GAPS = "kept: the constant 0.5 meets the gaps of a transposed convolution"


def layer(
    net: Net, operator: str, x: str, shape: Sequence[int], name: str, *, bias: int | None = None, **attributes: Any
) -> str:
    """A layer with random weights of that shape, and a bias of that many numbers."""
    tensors = [x, net.constant(f"{name}.weight", net.random.standard_normal(shape).astype(np.float32))]
    if bias is not None:
        tensors.append(net.constant(f"{name}.bias", net.random.standard_normal(bias).astype(np.float32)))
    net.node(operator, tensors, name, **attributes)
    net.width[name] = shape[0] if operator == "Conv" else shape[1] * attributes.get("group", 1)
    return name


def closed_before(
    operator: str,
    shape: Sequence[int],
    value: float = 0,
    size: Sequence[int | str] = (8, 8),
    closed: Sequence[int] = CLOSED,
    width: int = 6,
    **attributes: Any,
) -> tuple[onnx.ModelProto, Net]:
    """Conv `one`, a gate, an Add that makes `value` of what is closed, and the layer `two` of that weight shape."""
    net = Net()
    rank = len(size)
    net.inputs = [helper.make_tensor_value_info("input", 1, ["batch", 3, *size])]
    x = layer(net, "Conv", "input", (width, 3, *[1] * rank), "one", bias=width)
    factor = np.ones((width, *[1] * rank), np.float32)
    factor[list(closed)] = 0
    x = net.node("Mul", [x, net.constant("factor", factor)], "gate")
    x = net.node("Add", [x, net.constant("shift", np.array(value, np.float32))], "value") if value else x
    outputs = shape[0] if operator == "Conv" else shape[1] * attributes.get("group", 1)
    x = layer(net, operator, x, shape, "two", bias=outputs, **attributes)
    return net.model(x, ranks=[rank + 2]), net


def outcome(model: onnx.ModelProto, closed: Sequence[int] = CLOSED) -> str:
    """The one fate of the closed channels of `one`; all others are open."""
    found = fates(model, cut(model), closed=closed)
    assert all(fate == "open" for i, fate in enumerate(found) if i not in closed), found
    (fate,) = {found[i] for i in closed}
    return fate


SQUARE = (4, 6, 3, 3)


@pytest.mark.parametrize(
    ("shape", "size", "attributes", "expected"),
    [
        ((4, 6, 1, 1), (8, 8), {}, "folded"),
        (SQUARE, (8, 8), {}, "folded"),
        (SQUARE, (8, 8), {"pads": [1, 1, 1, 1]}, PADDING),
        (SQUARE, (8, 8), {"pads": [0, 0, 0, 1]}, PADDING),
        ((4, 6, 1, 1), (8, 8), {"pads": [1, 0, 0, 0]}, PADDING),
        (SQUARE, (8, 8), {"dilations": [2, 2]}, "folded"),
        (SQUARE, (8, 8), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}, PADDING),
        (SQUARE, (8, 8), {"auto_pad": "VALID", "strides": [2, 2]}, "folded"),
        (SQUARE, (8, 8), {"auto_pad": "SAME_UPPER"}, PADDING),
        (SQUARE, (8, 8), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, PADDING),
        ((4, 6, 1, 1), (7, 7), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, "folded"),
        ((4, 6, 2, 2), (8, 8), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, "folded"),
        ((4, 6, 2, 2), (7, 8), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, PADDING),
        # padding that no window reaches
        ((4, 6, 2, 2), (8, 8), {"pads": [0, 0, 1, 1], "strides": [2, 2]}, "folded"),
        # all that lies around the middle of the kernel sees padding, and nothing else, ever
        (SQUARE, (1, 1), {"pads": [1, 1, 1, 1]}, "folded"),
        (SQUARE, (1, 1), {"auto_pad": "SAME_UPPER"}, "folded"),
        (SQUARE, (1, 2), {"pads": [1, 1, 1, 1]}, PADDING),
        (SQUARE, (2, 2), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}, "folded"),
        (SQUARE, (3, 3), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}, PADDING),
        ((4, 6, 2, 2), ("height", "width"), {}, "folded"),
        ((4, 6, 2, 2), ("height", "width"), {"pads": [1, 1, 1, 1]}, PADDING),
        ((4, 6, 1, 1), ("height", "width"), {"auto_pad": "SAME_UPPER"}, "folded"),
        ((4, 6, 3), (8,), {}, "folded"),
        ((4, 6, 3), (8,), {"pads": [1, 1]}, PADDING),
        ((4, 6, 3, 3, 3), (5, 5, 5), {}, "folded"),
        ((4, 6, 3, 3, 3), (5, 5, 5), {"pads": [0, 0, 1, 0, 0, 1]}, PADDING),
    ],
)
def test_constants_before_a_convolution(
    shape: Sequence[int], size: Sequence[int | str], attributes: dict[str, Any], expected: str
) -> None:
    """A channel that holds 0.5 goes where no padding comes in between; one that holds zero goes always."""
    found = [outcome(closed_before("Conv", shape, value, size, **attributes)[0]) for value in (0.0, 0.5)]
    assert found == ["removed", expected]


def test_padding_is_nothing_to_a_kernel_that_is_zero_where_it_comes_in() -> None:
    model, _ = closed_before("Conv", SQUARE, 0.5, pads=[1, 1, 1, 1])
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "two.weight")
    kernels = np.array(numpy_helper.to_array(tensor))
    kernels[:, CLOSED, 0] = kernels[:, CLOSED, 2] = kernels[..., 0][:, CLOSED] = kernels[..., 2][:, CLOSED] = 0
    tensor.CopyFrom(numpy_helper.from_array(kernels, tensor.name))
    surgery = cut(model)
    assert [fates(model, surgery)[i] for i in CLOSED] == ["folded", "folded"]
    moved = 0.5 * kernels[:, CLOSED].sum(axis=(1, 2, 3))
    np.testing.assert_allclose(weight(surgery.model, "two", 2), weight(model, "two", 2) + moved, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size", "attributes", "expected"),
    [
        ((6, 4, 1, 1), (8, 8), {}, "folded"),
        ((6, 4, 1, 1), (8, 8), {"pads": [0, 0, 1, 1]}, GAPS),
        ((6, 4, 1, 1), (8, 8), {"strides": [2, 2]}, GAPS),
        ((6, 4, 1, 1), (8, 8), {"strides": [2, 2], "output_padding": [1, 1]}, GAPS),
        ((6, 4, 1, 1), (8, 8), {"output_shape": [8, 8]}, GAPS),
        ((6, 4, 2, 2), (8, 8), {"strides": [2, 2]}, GAPS),
        ((6, 4, 3, 3), (8, 8), {"pads": [1, 1, 1, 1], "strides": [2, 2], "output_padding": [1, 1]}, GAPS),
        ((6, 4, 3, 3), (8, 8), {"strides": [2, 2], "output_shape": [15, 16]}, GAPS),
        ((6, 4, 3, 3), (8, 8), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, GAPS),
        ((6, 4, 3, 3), (8, 8), {"dilations": [2, 1]}, GAPS),
        ((6, 4, 3), (8,), {"strides": [2]}, GAPS),
        ((6, 4, 2, 2, 2), (4, 4, 4), {"strides": [2, 2, 2]}, GAPS),
    ],
)
def test_constants_before_a_transposed_convolution(
    shape: Sequence[int], size: Sequence[int], attributes: dict[str, Any], expected: str
) -> None:
    found = []
    for value in (0.0, 0.5):
        model, _ = closed_before("ConvTranspose", shape, value, size, **attributes)
        surgery = cut(model)
        kept = 4 if (fate := fates_of(model, surgery)) in ("removed", "folded") else 6
        assert weight(surgery.model, "two").shape == (kept, *shape[1:])
        found.append(fate)
    assert found == ["removed", expected]


def fates_of(model: onnx.ModelProto, surgery: Surgery) -> str:
    found = fates(model, surgery)
    assert [found[i] for i in range(6) if i not in CLOSED] == ["open"] * 4
    (fate,) = {found[i] for i in CLOSED}
    return fate


def test_filters_of_a_transposed_convolution_go() -> None:
    net = Net()
    x = layer(net, "ConvTranspose", net.conv("input", 6, "one"), (6, 4, 2, 2), "up", bias=4, strides=[2, 2])
    x = net.gate(net.relu(x, "act"), [1], "gate")
    model = net.model(net.conv(x, 4, "two"))
    smaller = cut(model).model
    np.testing.assert_array_equal(weight(smaller, "up"), weight(model, "up")[:, [0, 2, 3]])
    np.testing.assert_array_equal(weight(smaller, "up", 2), weight(model, "up", 2)[[0, 2, 3]])


def test_groups_of_a_transposed_convolution() -> None:
    """Of 3 groups with 2 inputs and 2 filters each, the first loses one of both, the last all."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), [1, 4, 5], "gate")
    x = layer(net, "ConvTranspose", x, (6, 2, 2, 2), "up", bias=6, strides=[2, 2], group=3)
    model = net.model(net.conv(net.gate(net.relu(x, "act2"), [0, 4, 5], "gate2"), 4, "two"))
    surgery = cut(model)
    assert weight(surgery.model, "up").shape == (4, 2, 2, 2)
    assert group_of(surgery.model, "up") == 2
    assert surgery.report["cuts_not_made"] == [
        kept("up", "ConvTranspose", 1, layer="one"),
        kept("up", "ConvTranspose", 1),
    ]


def kept(node: str, operator: str, channels: int, layer: str | None = None) -> dict[str, Any]:
    reason = "every group keeps as many channels as the fullest one"
    return {"layer": layer or node, "channels": channels, "node": node, "operator": operator, "reason": reason}


def group_of(model: onnx.ModelProto, name: str) -> int:
    node = next(node for node in model.graph.node if node.name == name)
    return next((a.i for a in node.attribute if a.name == "group"), 1)


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_channels_go_with_their_input(operator: str, multiplier: int) -> None:
    """Closed behind the depthwise layer: all three layers lose them (MobileNetV2)."""
    net = Net()
    x = net.relu(net.conv("input", 8, "expand", kernel=1), "act1")
    shape = (8 * multiplier, 1, 3, 3) if operator == "Conv" else (8, multiplier, 3, 3)
    x = layer(net, operator, x, shape, "dw", bias=8 * multiplier, group=8, pads=[1, 1, 1, 1])
    closed, open_ = (
        [i * multiplier + j for i in rows for j in range(multiplier)] for rows in ((0, 2, 3, 7), (1, 4, 5, 6))
    )
    model = net.model(net.head(net.conv(net.gate(net.relu(x, "act2"), closed, "gate"), 4, "project", kernel=1)))
    surgery = cut(model)
    np.testing.assert_array_equal(weight(surgery.model, "expand"), weight(model, "expand")[[1, 4, 5, 6]])
    rows = open_ if operator == "Conv" else [1, 4, 5, 6]
    np.testing.assert_array_equal(weight(surgery.model, "dw"), weight(model, "dw")[rows])
    np.testing.assert_array_equal(weight(surgery.model, "dw", 2), weight(model, "dw", 2)[open_])
    np.testing.assert_array_equal(weight(surgery.model, "project"), weight(model, "project")[:, open_])
    assert group_of(surgery.model, "dw") == 4
    assert surgery.report["cuts_not_made"] == []


def test_depthwise_channels_closed_before_it_leave_its_bias() -> None:
    """What comes out is the activation of the bias: a constant that the projection takes up."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "expand", kernel=1), "act1"), [0, 2], "gate")
    x = net.relu(net.conv(x, 16, "dw", group=8), "act2")
    model = net.model(net.head(net.conv(x, 4, "project", kernel=1)))
    smaller = cut(model).model
    assert weight(smaller, "expand").shape[0] == 6
    assert weight(smaller, "dw").shape == (12, 1, 3, 3)
    dead = [0, 1, 4, 5]
    constants = np.maximum(weight(model, "dw", 2)[dead], 0)
    moved = weight(model, "project")[:, dead, 0, 0] @ constants
    np.testing.assert_allclose(weight(smaller, "project", 2), weight(model, "project", 2) + moved, rtol=1e-5)


@pytest.mark.parametrize(
    ("closed", "widths"),
    [
        ([0, *range(2, 8)], (1, 1)),  # one group is left, and of it one filter of two
        ([2, 3, 4, 5, 6, 7], (1, 2)),
        ([1, 3, 5, 7], (4, 4)),  # one filter of every group: no multiplier is left
        ([1, 2, 3, 4, 6, 7], (2, 2)),  # two groups with one filter each
        ([1, 4, 5, 6, 7], (2, 4)),  # filter 1 stays, for the other group has two
    ],
)
def test_filters_of_a_depthwise_layer_with_a_multiplier(closed: list[int], widths: tuple[int, int]) -> None:
    """4 groups with 2 filters each, at once as if one group was plain."""
    net = Net()
    x = net.relu(net.conv("input", 4, "one"), "act")
    x = net.gate(net.relu(net.conv(x, 8, "dw", group=4), "act2"), closed, "gate")
    surgery = cut(net.model(net.conv(x, 3, "two")))
    assert weight(surgery.model, "one").shape[0] == widths[0]
    assert weight(surgery.model, "dw").shape == (widths[1], 1, 3, 3)
    assert weight(surgery.model, "two").shape[1] == widths[1]
    assert group_of(surgery.model, "dw") == widths[0]
    again = cut(surgery.model)
    assert again.model.SerializeToString(deterministic=True) == surgery.model.SerializeToString(deterministic=True)


def test_groups_keep_as_many_channels_as_the_fullest_one() -> None:
    """Groups lose 1, 2 and 4 of 4 channels: the third goes altogether, the others keep 3 each."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 12, "one"), "act"), [0, 4, 5, 8, 9, 10, 11], "gate")
    y = net.gate(net.relu(net.conv(x, 12, "grouped", group=3), "act2"), [1, 2, 5, 6, 8, 9, 10, 11], "gate2")
    surgery = cut(net.model(net.head(net.conv(y, 4, "last", kernel=1))))
    assert weight(surgery.model, "one").shape[0] == 6
    assert weight(surgery.model, "grouped").shape == (4, 3, 3, 3)
    assert group_of(surgery.model, "grouped") == 2
    assert weight(surgery.model, "last").shape[1] == 4
    assert surgery.report["cuts_not_made"] == [kept("grouped", "Conv", 1, layer="one")]


def test_a_group_that_nobody_reads_goes_with_its_inputs() -> None:
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    x = net.gate(net.relu(net.conv(x, 6, "grouped", group=3), "act2"), [0, 1], "gate")
    model = net.model(net.conv(x, 4, "two"))
    smaller = cut(model).model
    np.testing.assert_array_equal(weight(smaller, "one"), weight(model, "one")[2:])
    np.testing.assert_array_equal(weight(smaller, "grouped"), weight(model, "grouped")[2:])


def test_one_group_that_is_left_is_plain() -> None:
    """Its filters and inputs need not be as many any more as those of the others."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), [2], "gate")
    x = net.gate(net.relu(net.conv(x, 8, "grouped", group=2), "act2"), [0, 4, 5, 6, 7], "gate2")
    surgery = cut(net.model(net.conv(x, 4, "two")))
    assert weight(surgery.model, "grouped").shape == (3, 2, 3, 3)
    assert group_of(surgery.model, "grouped") == 1
    assert surgery.report["cuts_not_made"] == []


def test_constants_before_groups_move_into_their_biases() -> None:
    model, _ = closed_before("Conv", (4, 3, 3, 3), 0.5, group=2, closed=[0, 3])
    surgery = cut(model)
    assert fates(model, surgery, closed=[0, 3]) == ["folded", "open", "open"] * 2
    moved = 0.5 * weight(model, "two")[:, 0].sum(axis=(1, 2))
    np.testing.assert_allclose(weight(surgery.model, "two", 2), weight(model, "two", 2) + moved, rtol=1e-6)


def test_groups_over_another_axis_than_the_channels_all_stay() -> None:
    """Nobody knows the inputs' channels here, so they stay, and with them every group."""
    net = Net()
    x = net.node("Transpose", [net.conv("input", 6, "one")], "turned", perm=[0, 2, 1, 3])
    net.width[x] = 8
    x = net.gate(net.relu(net.conv(x, 4, "grouped", group=2), "act"), [0, 1, 2], "gate")
    surgery = cut(net.model(net.conv(x, 3, "two")))
    assert weight(surgery.model, "grouped").shape == (2, 4, 3, 3)
    assert group_of(surgery.model, "grouped") == 2
    assert surgery.report["cuts_not_made"] == [kept("grouped", "Conv", 1)]


@pytest.mark.parametrize("tap", [0, 4, 8])
def test_one_tap_is_enough_to_need_a_channel(tap: int) -> None:
    """Nobody reads channel 1; one tap reads channel 4, all taps the others."""
    net = Net()
    kernels = net.random.standard_normal((4, 6, 9)).astype(np.float32)
    kernels[:, CLOSED] = 0
    kernels[3, 4, tap] = 1
    x = [net.conv("input", 6, "one"), net.constant("two.weight", kernels.reshape(4, 6, 3, 3))]
    net.node("Conv", [*x, net.constant("two.bias", np.ones(4, np.float32))], "two")
    net.width["two"] = 4
    model = net.model("two")
    assert fates(model, cut(model), closed=[1]) == ["open", "removed", *["open"] * 4]


def test_a_bias_that_was_not_there_is_made() -> None:
    net = Net()
    x = net.node("Sigmoid", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "half")
    model = net.model(net.conv(x, 4, "two", kernel=1, bias=False))
    smaller = cut(model).model
    assert weight(smaller, "two").shape == (4, 4, 1, 1)
    np.testing.assert_allclose(weight(smaller, "two", 2), 0.5 * weight(model, "two")[:, CLOSED, 0, 0].sum(axis=1))


def test_a_computed_weight_is_a_wall() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    kernel = net.node("GlobalAveragePool", [net.conv("input", 6, "weights")], "kernel")
    net.node("ReduceMean", [kernel], "mean", axes=[0])
    x = net.node("Conv", [x, "mean"], "tested")
    net.width[x] = 1
    surgery = cut(net.model(x))
    assert weight(surgery.model, "one").shape[0] == 6
    assert {"node": "tested", "operator": "Conv", "reason": "its weight is computed"} in surgery.report["unsupported"]


def test_a_sparse_weight_is_a_wall() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    model = net.model(net.conv(x, 4, "tested", bias=False))
    (dense,) = (each for each in model.graph.initializer if each.name == "tested.weight")
    values = numpy_helper.to_array(dense)
    places = np.flatnonzero(values > 0)
    stored = numpy_helper.from_array(values.ravel()[places], dense.name)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(stored, numpy_helper.from_array(places, "places"), dense.dims)
    )
    model.graph.initializer.remove(dense)
    surgery = compress(model)  # onnx's full check knows no sparse weights
    assert weight(surgery.model, "one").shape[0] == 6
    (note,) = surgery.report["unsupported"]
    assert note == {"node": "tested", "operator": "Conv", "reason": "its weight is a sparse tensor"}


def test_a_computed_bias_is_a_wall() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    bias = net.node("ReduceMean", [net.conv("input", 4, "biases")], "bias", axes=[0, 2, 3], keepdims=0)
    x = net.node("Conv", [x, net.constant("w", net.random.standard_normal((4, 6, 1, 1)).astype("f")), bias], "tested")
    net.width[x] = 4
    surgery = cut(net.model(x))
    assert weight(surgery.model, "one").shape[0] == 6
    assert {"node": "tested", "operator": "Conv", "reason": "its bias is computed"} in surgery.report["unsupported"]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_deformable_convolution(value: float) -> None:
    """Sampling points come from another layer, all of whose channels count."""
    net = Net(opset=19)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("shift", np.array(value, np.float32))], "value") if value else x
    offset = net.gate(net.conv("input", 18, "offset"), [3], "gate3")
    mask = net.node("Sigmoid", [net.conv("input", 9, "mask")], "strength")
    tensors = [x, net.constant("w", net.random.standard_normal((4, 6, 3, 3)).astype("f")), offset]
    tensors += [net.constant("b", net.random.standard_normal(4).astype("f")), mask]
    net.node("DeformConv", tensors, "deform", pads=[1, 1, 1, 1])
    net.width["deform"] = 4
    surgery = cut(net.model(net.conv(net.gate("deform", [2], "gate2"), 4, "two")))
    reasons = ["the constant 0.5 meets sampling points outside of the input"] if value else []
    assert [e["reason"] for e in surgery.report["cuts_not_made"] if e["layer"] == "one"] == reasons
    assert weight(surgery.model, "one").shape[0] == (6 if value else 4)
    assert weight(surgery.model, "deform").shape == (3, 6 if value else 4, 3, 3)
    assert weight(surgery.model, "deform", 3).shape == (3,)
    assert weight(surgery.model, "offset").shape[0] == 18
    assert surgery.report["unsupported"] == []


def test_sampling_points_of_their_own_for_parts_of_the_channels_are_a_wall() -> None:
    net = Net(opset=19)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    tensors = [
        x,
        net.constant("w", net.random.standard_normal((4, 6, 1, 1)).astype("f")),
        net.conv("input", 4, "offset"),
    ]
    net.node("DeformConv", tensors, "deform", offset_group=2)
    net.width["deform"] = 4
    surgery = cut(net.model("deform"))
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["unsupported"] == [
        {"node": "deform", "operator": "DeformConv", "reason": "its sampling points differ between channels"}
    ]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions(dtype: type) -> None:
    """A constant of 0.5 moves into the bias; it is added up in double precision and rounded once."""
    net = Net(opset=22)
    x = net.node("Sigmoid", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "half")
    x = net.scale(net.conv(x, 4, "two", kernel=1), np.array([2, 1, 0, 1]), "scale")
    model = net.model(net.conv(x, 3, "three"))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    smaller = compress(model, verify=dtype != ml_dtypes.bfloat16).model  # which no runtime here convolves
    onnx.checker.check_model(smaller, full_check=True)
    rows, open_ = [0, 1, 3], [0, 2, 3, 5]
    assert names(smaller) == {"one", "half", "two", "three"}
    assert weight(smaller, "one").shape[0] == 4
    factor = np.array([2, 1, 1], dtype).reshape(3, 1, 1, 1)
    two = weight(model, "two")
    np.testing.assert_array_equal(weight(smaller, "two"), two[rows][:, open_] * factor)
    bias = weight(model, "two", 2).astype(np.float64) + 0.5 * two[:, CLOSED].astype(np.float64).sum(axis=(1, 2, 3))
    found = weight(smaller, "two", 2)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, bias.astype(dtype)[rows] * factor.ravel())


def half_precision(net: Net, *outputs: str) -> onnx.ModelProto:
    model = net.model(*outputs)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model


@pytest.mark.parametrize("value", [0.5, 5e4])
def test_a_constant_that_the_bias_cannot_hold_stays(value: float) -> None:
    """Half precision ends at 65504."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Add", [x, net.constant("shift", np.array(value, np.float16))], "value")
    tensors = [x, net.constant("two.weight", np.ones((4, 6, 1, 1), np.float32)), net.constant("b", np.ones(4, "f"))]
    net.node("Conv", tensors, "two")
    net.width["two"] = 4
    model = half_precision(net, "two")
    surgery = compress(model, verify=False)
    reason = "kept: the constant 49984 meets a bias that cannot hold it"
    assert fates(model, surgery)[1] == ("folded" if value == 0.5 else reason)


@pytest.mark.parametrize(("factor", "folds"), [(100, True), (1e4, False)])
def test_a_factor_that_the_weights_cannot_hold_stays(factor: float, folds: bool) -> None:
    net = Net()
    net.node("Conv", ["input", net.constant("w", np.full((4, 3, 1, 1), 10, np.float32))], "one")
    net.width["one"] = 4
    x = net.relu(net.scale("one", np.full(4, factor), "scaled"), "act")
    model = half_precision(net, net.conv(x, 3, "two"))
    assert ("scaled" not in names(compress(model, verify=False).model)) == folds


def test_emptied_filters_and_columns_that_have_to_stay() -> None:
    """Channel 1 is closed in both branches, 2 in one: it stays in both, as a zero filter in the one."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 4, "one"), "act1"), [1, 2], "gate1")
    y = net.gate(net.relu(net.conv("input", 4, "other"), "act2"), [1], "gate2")
    model = net.model(net.conv(net.add(x, y, "sum"), 3, "two"), net.conv(x, 3, "three"))
    smaller = cut(model).model
    assert weight(smaller, "one").shape[0] == weight(smaller, "other").shape[0] == 3
    assert not weight(smaller, "one")[1].any()
    assert not weight(smaller, "three")[:, 1].any(), "it reads nothing of what is zero"
    assert weight(smaller, "two")[:, 1].all()
    assert constant(smaller, "one.bias")[1] == 0


def test_factors_along_another_axis_do_not_fold() -> None:
    """There are as many of them as channels."""
    net = Net(size=4)
    x = net.conv("input", 4, "one")
    x = net.node("Mul", [x, net.constant("factor", np.array([1, 2, 3, 4], np.float32))], "scaled")
    assert "scaled" in names(cut(net.model(net.conv(x, 4, "two"))).model)


def test_layers_that_nothing_is_closed_at_stay_as_they_are() -> None:
    net = Net()
    model = net.model(net.conv(net.relu(net.conv("input", 4, "one"), "act"), 4, "two", group=2))
    smaller = cut(model).model
    assert list(smaller.graph.node) == list(model.graph.node)
    assert {t.name: t.SerializeToString() for t in smaller.graph.initializer} == {
        t.name: t.SerializeToString() for t in model.graph.initializer
    }
