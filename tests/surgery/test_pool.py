"""Pooling and sampling of images, in one, two and three dimensions: which constants come out as they go in."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.surgery import compress
from tests.surgery.graphs import CLOSED, Array, Net, around, cut, names, outcome, weight

ZEROS = "kept: the constant 0.5 meets zeros outside the image"
PADS = [1, 1, 1, 1]
NINE = {"kernel_shape": [3, 3]}


@pytest.mark.parametrize(
    ("operator", "opset", "attributes"),
    [
        ("MaxPool", 17, {**NINE, "pads": PADS}),
        ("MaxPool", 8, {**NINE, "auto_pad": "SAME_LOWER"}),
        ("MaxPool", 12, {**NINE, "dilations": [2, 2], "ceil_mode": 1}),
        ("AveragePool", 7, {**NINE, "pads": PADS}),
        ("AveragePool", 17, {**NINE, "pads": PADS, "count_include_pad": 1}),
        ("AveragePool", 22, {**NINE, "strides": [2, 2], "ceil_mode": 1}),
        ("LpPool", 11, {**NINE, "pads": PADS, "p": 1}),
        ("LpPool", 18, NINE),
        ("GlobalAveragePool", 17, {}),
        ("GlobalMaxPool", 17, {}),
        ("GlobalLpPool", 17, {"p": 3}),
    ],
)
def test_zero_stays_zero(operator: str, opset: int, attributes: dict[str, Any]) -> None:
    assert outcome(around(operator, opset=opset, kernel=3, **attributes)) == "removed"


def _halves(operator: str, opset: int = 17, dynamic: bool = False, **attributes: Any) -> onnx.ModelProto:
    """Closed channels are 0.5 everywhere when they come to the operator."""
    net = Net(opset=opset)
    x = net.node("Sigmoid", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "half")
    model = net.model(net.conv(net.node(operator, [x], "tested", **attributes), 4, "two", kernel=1))
    for axis, name in ((2, "height"), (3, "width")) if dynamic else ():
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return model


@pytest.mark.parametrize(
    ("operator", "opset", "attributes", "factor"),
    [
        ("MaxPool", 17, {**NINE, "pads": PADS}, 1),
        ("MaxPool", 17, {**NINE, "strides": [2, 2], "ceil_mode": 1}, 1),
        ("AveragePool", 7, NINE, 1),
        ("AveragePool", 17, {**NINE, "pads": PADS}, 1),
        ("AveragePool", 17, {**NINE, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 1),
        ("AveragePool", 19, {**NINE, "count_include_pad": 1}, 1),
        ("AveragePool", 17, {**NINE, "pads": PADS, "count_include_pad": 1}, None),
        ("AveragePool", 10, {**NINE, "strides": [2, 2], "ceil_mode": 1}, None),
        ("AveragePool", 19, {**NINE, "auto_pad": "SAME_UPPER", "count_include_pad": 1}, None),
        ("LpPool", 17, NINE, 3),
        ("LpPool", 17, {"kernel_shape": [2, 2], "p": 1, "auto_pad": "VALID"}, 4),
        ("LpPool", 22, {**NINE, "pads": PADS}, None),
        ("GlobalAveragePool", 17, {}, 1),
        ("GlobalMaxPool", 17, {}, 1),
        ("GlobalLpPool", 17, {}, 8),
        ("GlobalLpPool", 17, {"p": 1}, 64),
    ],
)
def test_another_constant(operator: str, opset: int, attributes: dict[str, Any], factor: float | None) -> None:
    """It comes out `factor` times as large; None: not as one number."""
    model = _halves(operator, opset, **attributes)
    surgery = cut(model)
    assert outcome(model, surgery) == (ZEROS if factor is None else "folded")
    if factor is not None:
        moved = 0.5 * factor * weight(model, "two")[:, list(CLOSED), 0, 0].sum(axis=1)
        np.testing.assert_allclose(weight(surgery.model, "two", 2), weight(model, "two", 2) + moved, rtol=1e-5)


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ("GlobalAveragePool", "folded"),
        ("GlobalLpPool", "kept: the constant 0.5 meets a number of positions that is not fixed"),
    ],
)
def test_images_of_any_size(operator: str, expected: str) -> None:
    assert outcome(_halves(operator, dynamic=True)) == expected


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool", "LpPool", "GlobalAveragePool"])
def test_one_and_three_dimensions(operator: str, dims: int) -> None:
    net = Net()
    net.inputs = [helper.make_tensor_value_info("input", 1, ["batch", 3, *[6] * dims])]
    ones = [1] * dims

    def conv(x: str, inputs: int, width: int, name: str) -> str:
        values = net.random.standard_normal((width, inputs, *ones)).astype(np.float32)
        net.node(
            "Conv",
            [x, net.constant(f"{name}.weight", values), net.constant(f"{name}.bias", values.ravel()[:width])],
            name,
        )
        net.width[name] = width
        return name

    factor = np.ones((1, 6, *ones), np.float32)
    factor[0, list(CLOSED)] = 0
    x = net.node("Mul", [conv("input", 3, 6, "one"), net.constant("factor", factor)], "gate")
    attributes = {} if operator.startswith("Global") else {"kernel_shape": [3] * dims, "pads": [1] * 2 * dims}
    x = net.node(operator, [x], "tested", **attributes)
    assert outcome(net.model(conv(x, 6, 4, "two"), ranks=[dims + 2])) == "removed"


def _unpooled(size: int, *, read: bool = False, shape: Array | None = None) -> onnx.ModelProto:
    """SegNet: indices go from a MaxPool to the MaxUnpool behind two layers more. `read`: to somebody else as well."""
    net = Net(size=size)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    x = net.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    net.nodes[-1].output.append("indices")
    x = net.gate(net.relu(net.conv(x, 6, "middle"), "act2"), CLOSED, "gate2")
    extra = [] if shape is None else [net.constant("shape", shape)]
    x = net.node("MaxUnpool", [x, "indices", *extra], "tested", kernel_shape=[2, 2], strides=[2, 2])
    outputs = [net.conv(x, 4, "two")]
    if read:
        outputs.append(net.node("Cast", ["indices"], "floats", to=1))
        net.width["floats"] = 6
    return net.model(*outputs)


def test_unpooling() -> None:
    """Indices count through all channels: pool and unpool lose the same ones."""
    model = _unpooled(8)
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert weight(surgery.model, "middle").shape == (4, 4, 3, 3)


def test_indices_that_are_part_of_the_result() -> None:
    model = _unpooled(8, read=True)
    surgery = cut(model)
    assert outcome(model, surgery) == "kept: its indices are used"
    assert weight(surgery.model, "middle").shape[0] == 6


@pytest.mark.parametrize(
    ("size", "shape", "reason"),
    [
        (9, None, "its indices were not made for images of the size that it makes"),
        (9, np.array([2, 6, 9, 9]), "its output shape is an input"),
    ],
)
def test_indices_that_may_reach_over_to_the_next_channel(size: int, shape: Array | None, reason: str) -> None:
    """ONNX Runtime stops at some of them."""
    model = _unpooled(size, shape=shape)
    surgery = compress(model, verify=False)
    assert outcome(model, surgery) == f"kept: {reason}"
    assert weight(surgery.model, "middle").shape[0] == 6


def _sampled(operator: str, act: str, kernel: int = 1, opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    """Places are an input of the graph: for GridSample a grid, for the others boxes."""
    net = Net(opset=opset)
    x = net.node(act, [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "act")
    if operator == "GridSample":
        net.inputs.append(helper.make_tensor_value_info("grid", 1, ["batch", 4, 4, 2]))
        inputs = [x, "grid"]
    else:
        boxes = np.array([[0, 1, 1, 5, 5], [0, 0, 2, 7, 7], [0, 3, 3, 3, 3]], np.float32)
        inputs = [x, net.constant("boxes", boxes if operator == "MaxRoiPool" else boxes[:, 1:])]
        if operator == "RoiAlign":
            inputs.append(net.constant("images", np.array([0, 0, 0])))
    x = net.node(operator, inputs, "tested", **attributes)
    return net.model(net.conv(x, 4, "two", kernel=kernel))


@pytest.mark.parametrize(
    ("operator", "act", "opset", "attributes", "expected"),
    [
        ("MaxRoiPool", "Relu", 17, {"pooled_shape": [2, 2]}, "removed"),
        ("MaxRoiPool", "Sigmoid", 17, {"pooled_shape": [2, 2]}, ZEROS),
        ("RoiAlign", "Relu", 17, {"output_height": 3, "output_width": 2}, "removed"),
        ("RoiAlign", "Relu", 10, {"mode": "max"}, "removed"),
        ("RoiAlign", "Sigmoid", 17, {"output_height": 3}, ZEROS),
        ("GridSample", "Relu", 17, {}, "removed"),
        ("GridSample", "Relu", 20, {"mode": "cubic"}, "removed"),
        ("GridSample", "Sigmoid", 17, {}, ZEROS),
        ("GridSample", "Sigmoid", 17, {"padding_mode": "border"}, "folded"),
        ("GridSample", "Sigmoid", 20, {"padding_mode": "reflection", "mode": "cubic"}, "folded"),
    ],
)
def test_sampling(operator: str, act: str, opset: int, attributes: dict[str, Any], expected: str) -> None:
    assert outcome(_sampled(operator, act, opset=opset, **attributes)) == expected


def test_places_that_are_computed_stay() -> None:
    """The offsets that a layer makes for GridSample are no channels of the image."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    grid = net.gate(net.conv("input", 2, "offsets"), [1], "gate2")
    grid = net.node("Transpose", [grid], "grid", perm=[0, 2, 3, 1])
    model = net.model(net.conv(net.node("GridSample", [x, grid], "tested"), 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert weight(surgery.model, "offsets").shape[0] == 2
    reasons = {entry["layer"]: entry["reason"] for entry in surgery.report["cuts_not_made"]}
    assert reasons == {"offsets": "it reads places there"}


def test_pooling_over_the_channels() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    x = net.node("Transpose", [x], "turn", perm=[0, 2, 3, 1])
    x = net.node("MaxPool", [x], "tested", kernel_shape=[3, 1])
    x = net.node("Transpose", [x], "back", perm=[0, 3, 1, 2])
    surgery = cut(net.model(net.conv(x, 4, "two")))
    assert "tested" in names(surgery.model)
    assert surgery.report["unsupported"] == [
        {"node": "tested", "operator": "MaxPool", "reason": "the channels of its input are not on axis 1"}
    ]
