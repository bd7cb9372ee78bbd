"""Resize, Upsample, DepthToSpace, SpaceToDepth, CenterCropPad: height and width change, channels pass or go in sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from polar_deploy.surgery import compress
from tests.surgery.between import Build, assert_same_at, between, constant_input, node, remains, with_free_size
from tests.surgery.graphs import Net, cut, fates, newest_opset, operators, outcome, weight

EMPTY = np.zeros(0, np.float32)


def _scales(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, np.float32)


def _resize(*extra: Any, operator: str = "Resize", width: int = 6, **attributes: Any) -> Build:
    return lambda net, x: node(net, operator, x, "tested", width, *extra, **attributes)


def _fixed(model: onnx.ModelProto, batch: int = 2) -> onnx.ModelProto:
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return model


@pytest.mark.parametrize(
    ("build", "opset"),
    [
        (_resize(operator="Upsample", scales=[1.0, 1.0, 2.0, 2.0]), 7),
        (_resize(_scales(1, 1, 2, 2), operator="Upsample", mode="linear"), 9),
        (_resize(_scales(1, 1, 2, 2)), 10),
        (_resize(EMPTY, _scales(1, 1, 2, 0.5), mode="linear", coordinate_transformation_mode="align_corners"), 11),
        (_resize(None, _scales(1, 1, 2, 2), mode="cubic"), 13),
        (_resize(None, _scales(1, 1, 1.5, 2), mode="nearest", nearest_mode="floor"), 17),
        (_resize(None, _scales(0.5, 2), mode="linear", axes=[2, 3], antialias=1), 18),
        (_resize(None, None, np.array([5, 12]), mode="linear", axes=[-2, -1]), 18),
        (_resize(None, None, np.array([5, 12]), axes=[2, 3], keep_aspect_ratio_policy="not_larger"), 18),
    ],
)
def test_resizing_space_lets_channels_pass(build: Build, opset: int) -> None:
    model = between(build, opset=opset, kernel=3)
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert "tested" in {node.name for node in surgery.model.graph.node}


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_constants_are_what_they_are_at_every_size(mode: str) -> None:
    def build(net: Net, x: str) -> str:
        return _resize(None, _scales(1, 1, 2, 2), mode=mode)(net, net.node("Sigmoid", [x], "half"))

    assert outcome(between(build)) == "folded"


@pytest.mark.parametrize(
    ("outside", "expected"), [(0.0, "removed"), (3.0, "kept: it goes together with channels in use, in tested")]
)
def test_what_lies_outside_of_the_image(outside: float, expected: str) -> None:
    corners = _scales(0, 0, -0.5, 0, 1, 1, 1, 1.5)
    mode = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": outside, "mode": "linear"}
    assert outcome(between(_resize(corners, _scales(1, 1, 2, 2), **mode))) == expected


@pytest.mark.parametrize(
    ("extra", "attributes", "opset", "reason"),
    [
        ((None, _scales(1, 2, 1, 1)), {}, 17, "6 channels come in and 12 go out"),
        ((None, _scales(1, 1.1, 2, 2)), {}, 17, "it resizes the channels"),
        (
            (_scales(0, 0.2, 0, 0, 1, 0.9, 1, 1), _scales(1, 1, 2, 2)),
            {"coordinate_transformation_mode": "tf_crop_and_resize", "mode": "linear"},
            17,
            "it crops the channels",
        ),
        (
            (None, None, np.array([2, 6, 8, 8])),
            {"keep_aspect_ratio_policy": "not_larger"},
            18,
            "it keeps a ratio of sizes that the channels are one of",
        ),
    ],
)
def test_resized_channels_are_a_wall(extra: Any, attributes: dict[str, Any], opset: int, reason: str) -> None:
    def build(net: Net, x: str) -> str:
        x = _resize(*extra, **attributes)(net, x)
        net.width[x] = 12 if "12" in reason else 6
        return net.node("Relu", [x], "act")

    model = _fixed(between(build, opset=opset))
    assert outcome(model, compress(model, verify=False)) == f"kept: {reason}"


@pytest.mark.parametrize("opset", [11, 17, 18])
def test_constant_sizes_hold_the_number_of_channels(opset: int) -> None:
    roi = EMPTY if opset < 13 else None
    model = _fixed(between(_resize(roi, EMPTY if opset < 13 else None, np.array([2, 6, 5, 12])), opset=opset, kernel=3))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert constant_input(surgery.model, index=3) == [2, 4, 5, 12]


def _computed(net: Net, x: str, *, like: str | None = None, width: int | None = None, crop: bool = False) -> str:
    """Sizes put together: batch and channels of `like`, or a number of channels; height and width 5 and 12."""
    shape = net.node("Shape", [like or x], "shape")
    ends = [net.constant(f"end{i}", np.array([i])) for i in (0, 2 if width is None else 1)]
    parts = [net.node("Slice", [shape, *ends], "front")]
    parts += [] if width is None else [net.constant("width", np.array([width]))]
    sizes = net.node("Concat", [*parts, net.constant("back", np.array([5, 12]))], "sizes", axis=0)
    corners = net.constant("corners", _scales(0, 0, 0, 0, 1, 1, 1, 1)) if crop else ""
    mode = "tf_crop_and_resize" if crop else "half_pixel"
    net.node("Resize", [x, corners, "", sizes], "tested", mode="linear", coordinate_transformation_mode=mode)
    net.width["tested"] = 6
    return "tested"


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("opset", [13, 18])
def test_sizes_that_are_computed_from_the_tensor_follow_it(opset: int, free: bool) -> None:
    """As PyTorch exports `interpolate(x, size)`: batch and channels come from the shape."""
    model = between(_computed, opset=opset, kernel=3)
    model = with_free_size(model) if free else model
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert operators(surgery.model)["Shape"] == 1, "the input stays as it was"
    assert_same_at(model, surgery.model, 2, 3, *((5, 9) if free else (8, 8)))


def test_sizes_of_another_tensor_tie_it_to_the_channels() -> None:
    """Both lose what is closed in both."""

    def build(net: Net, x: str) -> str:
        other = net.gate(net.conv("input", 6, "other"), [1, 2], "gate2")
        pooled = net.conv(net.node("GlobalMaxPool", [other], "pool"), 4, "four", kernel=1)
        return net.add(net.conv(_computed(net, x, like=other), 4, "three"), pooled, "sum")

    model = between(build)
    surgery = cut(model)
    assert remains(model, surgery.model) == [0, 2, 3, -1, 5]
    assert remains(model, surgery.model, "other") == [0, -1, 3, 4, 5]


@pytest.mark.parametrize(
    ("opset", "crop", "expected"),
    [(18, False, "removed"), (17, False, "kept: its sizes are computed"), (18, True, "kept: its sizes are computed")],
)
def test_a_number_of_channels_baked_into_computed_sizes(opset: int, crop: bool, expected: str) -> None:
    """Since opset 18, sizes can be told for height and width alone, unless corners are told for all axes."""
    model = between(lambda net, x: _computed(net, x, width=6, crop=crop), opset=opset, kernel=3)
    surgery = cut(model)
    assert outcome(model, surgery) == expected
    if expected == "removed":
        assert constant_input(surgery.model, index=3) == [5, 12]
        assert "Shape" not in operators(surgery.model)


# ---- blocks


@pytest.mark.parametrize(
    ("attributes", "opset", "blocks"),
    [
        ({}, 10, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"mode": "DCR"}, 17, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"mode": "CRD"}, 17, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_depth_to_space(attributes: dict[str, str], opset: int, blocks: list[list[int]]) -> None:
    """A block goes as a whole; with one channel of it in use, all of it stays."""
    build = _resize(operator="DepthToSpace", width=2, blocksize=2, **attributes)
    first, second = blocks
    model = between(build, width=8, closed=[*first, second[0]], opset=opset, kernel=3)
    surgery = cut(model)
    assert remains(model, surgery.model) == [-1 if i == second[0] else i for i in second]
    np.testing.assert_array_equal(weight(surgery.model, "two"), weight(model, "two")[:, 1:])


@pytest.mark.parametrize(("attributes", "opset"), [({}, 17), ({"mode": "DCR"}, 28), ({"mode": "CRD"}, 28)])
def test_space_to_depth(attributes: dict[str, str], opset: int) -> None:
    """The copies of a channel lie six apart, or side by side."""
    if opset > newest_opset():
        pytest.skip("this ONNX Runtime ends before opset 28")
    model = between(_resize(operator="SpaceToDepth", width=24, blocksize=2, **attributes), kernel=3, opset=opset)
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    if attributes.get("mode") == "CRD":
        columns = [channel * 4 + block for channel in (0, 2, 3, 5) for block in range(4)]
    else:
        columns = [block * 6 + channel for block in range(4) for channel in (0, 2, 3, 5)]
    np.testing.assert_array_equal(weight(surgery.model, "two"), weight(model, "two")[:, columns])


def test_a_constant_block_is_a_constant() -> None:
    """Four channels that are closed make one that is; Sigmoid makes it 0.5, which the next bias takes up."""

    def build(net: Net, x: str) -> str:
        x = _resize(operator="DepthToSpace", width=2, blocksize=2, mode="CRD")(net, x)
        return net.node("Sigmoid", [x], "half")

    closed = (0, 1, 2, 3)
    model = between(build, width=8, closed=closed)
    assert fates(model, cut(model), closed=closed) == ["folded"] * 4 + ["open"] * 4


def test_a_block_of_differing_constants_is_none() -> None:
    """Four closed channels that hold 0, 1, 2 and 3 when they are put side by side."""

    def build(net: Net, x: str) -> str:
        steps = net.constant("steps", np.arange(8, dtype=np.float32).reshape(8, 1, 1))
        return _resize(operator="DepthToSpace", width=2, blocksize=2, mode="CRD")(net, net.add(x, steps, "more"))

    model = between(build, width=8, closed=(0, 1, 2, 3))
    assert remains(model, cut(model).model) == [-1, -1, -1, -1, 4, 5, 6, 7]


@pytest.mark.parametrize(("size", "expected"), [([5, 6], "folded"), ([5, 9], "in use")])
def test_zeros_that_are_added_around_a_constant(size: list[int], expected: str) -> None:
    def build(net: Net, x: str) -> str:
        return _resize(np.array(size), operator="CenterCropPad", axes=[2, 3])(net, net.node("Sigmoid", [x], "half"))

    assert expected in outcome(between(build, opset=18))


@pytest.mark.parametrize(
    ("size", "axes", "expected"),
    [
        ([5, 9], [2, 3], "removed"),
        ([6, 5, 9], [1, 2, 3], "removed"),
        ([8, 5], [1, 3], "kept: 6 channels come in and 8 go out"),
    ],
)
def test_center_crop_pad(size: list[int], axes: list[int], expected: str) -> None:
    def build(net: Net, x: str) -> str:
        x = _resize(np.array(size), operator="CenterCropPad", axes=axes)(net, x)
        net.width[x] = size[0] if 1 in axes else 6
        return x

    model = between(build, opset=18, kernel=3)
    surgery = cut(model)
    assert outcome(model, surgery) == expected
    if axes[0] == 1 and expected == "removed":
        assert constant_input(surgery.model) == [4, 5, 9]
