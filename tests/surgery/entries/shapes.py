"""Operators that move channels about: split, slice, pad, reshape, resize."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.surgery.entries.entry import Entry
from tests.surgery.random_graphs import RandomGraph


def _split(g: RandomGraph, x: str) -> str:
    """Along the channels; the parts are joined in one of several ways."""
    width = g.width[x]
    first = width // 2 if width % 2 == 0 and g.chance(6) else g.pick(range(1, width)) if width > 1 else 0
    if first == 0:
        return x
    sizes = [first, width - first]
    if first * 2 == width and g.chance(5):
        extra: dict[str, Any] = {"num_outputs": 2} if g.opset >= 18 else {}
        parts = g.ops("Split", x, axis=1, widths=sizes, **extra)
    elif g.opset < 13:
        parts = g.ops("Split", x, axis=1, widths=sizes, split=sizes)
    else:
        parts = g.ops("Split", x, np.array(sizes), axis=g.pick((1, -3)), widths=sizes)
    kind = g.pick(("concat", "glu", "one")) if first * 2 == width else g.pick(("concat", "one"))
    if kind == "glu":
        return g.op("Mul", parts[0], g.op("Sigmoid", parts[1]))
    if kind == "one":
        return parts[g.pick((0, 1))]
    return g.op("Concat", parts[1], g.act(parts[0]), axis=1, width=width)


def _split_rows(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    if height % 2:
        return x
    extra = {"num_outputs": 2} if g.opset >= 18 else {}
    upper, lower = g.ops("Split", x, axis=2, widths=[g.width[x]] * 2, space=(height // 2, across), **extra)
    return g.op("Add", upper, lower)


def _slice(g: RandomGraph, x: str) -> str:
    """Some channels in a row, also counted from the end; every second one; backwards; or some rows."""
    width, (height, across) = g.width[x], g.space[x]
    start = g.pick(range(width))
    stop = g.pick(range(start + 1, width + 1))
    kind = g.pick(("channels", "from the end", "both axes", "every second", "backwards"))
    if kind == "every second" and g.opset >= 10:
        return _sliced(g, x, [0], [width], [1], [2], len(range(0, width, 2)), (height, across))
    if kind == "backwards" and g.opset >= 10:
        return _sliced(g, x, [-1], [-99], [1], [-1], width, (height, across))
    if kind == "both axes" and height > 1:
        return _sliced(g, x, [1, start], [99, stop], [2, 1], None, stop - start, (height - 1, across))
    if kind == "from the end" and stop < width:
        return _sliced(g, x, [start - width], [stop - width], [-3], None, stop - start, (height, across))
    return _sliced(g, x, [start], [stop], [1], None, stop - start, (height, across))


def _sliced(
    g: RandomGraph,
    x: str,
    starts: list[int],
    ends: list[int],
    axes: list[int],
    steps: list[int] | None,
    width: int,
    space: tuple[int, int],
) -> str:
    if g.opset < 10:
        return g.op("Slice", x, starts=starts, ends=ends, axes=[axis % 4 for axis in axes], width=width, space=space)
    lists = [starts, ends, axes] if steps is None else [starts, ends, axes, steps]
    return g.op("Slice", x, *(np.array(values, np.int64) for values in lists), width=width, space=space)


def _gather(g: RandomGraph, x: str) -> str:
    """Channels in any order, some twice, also counted from the end; or one alone, which loses its axis."""
    width = g.width[x]
    if g.chance(2):
        one = g.op("Gather", x, np.array(g.pick(range(width))), axis=1)
        return g.axes("Unsqueeze", one, [1], 13, width=1)
    if g.chance(3):
        order = g.random.permutation(width)
    else:
        order = np.array([g.pick(range(-width if g.opset >= 11 else 0, width)) for _ in range(g.pick((3, 2, 5)))])
    return g.op("Gather", x, order.astype(np.int64), axis=1, width=len(order))


def _gather_rows(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    rows = np.array([0, height - 1, 0])
    return g.op("Gather", x, rows, axis=2, space=(3, across))


def _concat(g: RandomGraph, x: str) -> str:
    """Along the channels: with others, with itself, with a constant a sample."""
    parts = [x, g.partner(x, width=g.pick((2, 4, 6)))]
    if g.chance(3):
        parts.insert(0, g.pick((x, g.partner(x))))
    return g.op("Concat", *parts, axis=g.pick((1, -3)), width=sum(g.width[part] for part in parts))


def _concat_constant(g: RandomGraph, x: str) -> str:
    """Along the channels, of means over the batch and a constant."""
    parts = [g.axes("ReduceMean", part, [0], 18, keepdims=1) for part in (x, g.partner(x, width=4))]
    widths = [*(g.width[part] for part in parts), 2]
    parts.append(g.value(g.normal(1, 2, *g.space[x])))
    order = g.pick(((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)))
    joined = g.op("Concat", *(parts[i] for i in order), axis=1, width=sum(widths))
    return g.op("Add", joined, g.conv_of(x, sum(widths)))


def _concat_rows(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    if height > 8:
        return x
    return g.op("Concat", x, g.partner(x), axis=2, space=(2 * height, across))


def _pad(g: RandomGraph, x: str) -> str:
    """Around, and in front of and behind the channels; zeros, other numbers, or what is there."""
    width, (height, across) = g.width[x], g.space[x]
    front, back = g.pick((0, 1, 2)), g.pick((0, 1, 2))
    mode = g.pick(("constant", "edge", "reflect")) if min(height, across) > 1 else "constant"
    if mode != "constant":
        front = back = 0
    rows = g.pick((0, 1))
    widths = [0, front, rows, 0, 0, back, rows, 0]
    value = np.float32(g.pick((0, 0.5)))
    new: dict[str, Any] = {"width": width + front + back, "space": (height + 2 * rows, across)}
    if g.opset < 11:
        return g.op("Pad", x, pads=widths, mode=mode, value=float(value), **new)
    if g.opset >= 18 and g.chance(3):
        pairs = np.array([front, rows, back, rows])
        return g.op("Pad", x, pairs, value, np.array([1, 2]), mode=mode, **new)
    return g.op("Pad", x, np.array(widths), *([value] if mode == "constant" else []), mode=mode, **new)


def _expand(g: RandomGraph, x: str) -> str:
    """One row of numbers a channel, or one channel, spread over the image."""
    width, space = g.width[x], g.space[x]
    if g.chance(4):
        one = g.axes("ReduceMean", x, [1], 18, keepdims=1)
        return g.op("Add", x, g.op("Expand", one, np.array([1, width, 1, 1])))
    small = g.op("GlobalAveragePool", x, space=(1, 1))
    return g.op("Mul", x, g.op("Sigmoid", g.op("Expand", small, np.array([1, 1, *space]), space=space)))


def _tile(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    if g.chance(5) and g.width[x] <= 6:
        return g.op("Tile", x, np.array([1, 2, 1, 1]), width=2 * g.width[x])
    return g.op("Tile", x, np.array([1, 1, 2, 1]), space=(2 * height, across)) if height <= 4 else g.act(x)


def _reshape(g: RandomGraph, x: str) -> str:
    """There and back, in between something that knows nothing of images."""
    width, (height, across) = g.width[x], g.space[x]
    shapes = {
        "flat": [0, width, height * across],
        "rest": [0, width, -1],
        "batch": [-1, width, height, across],
        "rows": [0, width * height, across],
        "spread": [0, 1, width, height * across],
        "all": [0, width * height * across],
    }
    y = g.act(g.op("Reshape", x, np.array(shapes[g.pick(tuple(shapes))])))
    return g.op("Reshape", y, np.array(g.pick(([0, width, height, across], [-1, width, height, across]))))


def _shuffle(g: RandomGraph, x: str) -> str:
    """The channel shuffle of ShuffleNet."""
    width, space = g.width[x], g.space[x]
    groups = next(groups for groups in (3, 2, 1) if width % groups == 0)
    y = g.op("Reshape", x, np.array([0, groups, width // groups, *space]))
    y = g.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    return g.op("Reshape", y, np.array([0, width, *space]))


def _transpose(g: RandomGraph, x: str) -> str:
    """Channels last and back; or height for width."""
    if g.chance(3):
        return g.op("Transpose", x, perm=[0, 1, 3, 2], space=g.space[x][::-1])
    y = g.op("Transpose", x, perm=[0, 2, 3, 1])
    y = g.act(y) if g.chance(5) else g.op("Mul", y, g.around_one(g.width[x]))
    return g.op("Transpose", y, perm=[0, 3, 1, 2])


def _transpose_channels(g: RandomGraph, x: str) -> str:
    """Rows become channels, and are mixed."""
    width, (height, across) = g.width[x], g.space[x]
    if height > 8:
        return x
    y = g.op("Transpose", x, perm=[0, 2, 1, 3], width=height, space=(width, across))
    return g.conv_of(y, 4)


def _squeeze(g: RandomGraph, x: str) -> str:
    pooled = g.op("GlobalAveragePool", x, space=(1, 1))
    vector = g.axes("Squeeze", pooled, g.pick(([2, 3], [-1, -2] if g.opset >= 11 else [2, 3])), 13)
    return g.merge(x, g.as_image(g.act(vector), g.width[x]))


def _unsqueeze(g: RandomGraph, x: str) -> str:
    """A third dimension in space, and back."""
    return g.axes("Squeeze", g.act(g.axes("Unsqueeze", x, [2], 13)), [2], 13)


def _flatten(g: RandomGraph, x: str) -> str:
    """Flatten, then Gemm: several columns a channel."""
    width, (height, across) = g.width[x], g.space[x]
    if height * across > 36:
        height, across = height // 2, across // 2
        x = g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], space=(height, across))
    flat = g.op("Flatten", x, axis=1)
    hidden = g.gemm_of(flat, width * height * across, width)
    return g.merge(g.images[-1] if g.width[g.images[-1]] == width else x, g.as_image(g.act(hidden), width))


def _shape(g: RandomGraph, x: str) -> str:
    """Reshape to a shape that is read from the tensor itself."""
    width = g.width[x]
    dims = g.op("Shape", x)
    batch, channels = (g.op("Gather", dims, np.array([i]), axis=0) for i in (0, 1))
    y = g.op("Reshape", x, g.op("Concat", batch, channels, np.array([-1]), axis=0))
    return g.op("Reshape", g.act(y), dims, width=width, space=g.space[x])


def _resize(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    if height > 4:
        height, across = height // 2, across // 2
        x = g.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], space=(height, across))
    space, scales = (2 * height, 2 * across), np.array([1, 1, 2, 2], np.float32)
    mode = g.pick(("nearest", "linear"))
    if g.opset < 11:
        return g.op("Resize" if g.opset == 10 else "Upsample", x, scales, mode=mode, space=space)
    extra: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": "asymmetric", "space": space}
    empty = "" if g.opset >= 13 else np.zeros(0, np.float32)
    if g.chance(3) and g.opset >= 18:
        return g.op("Resize", x, empty, scales[2:], axes=[2, 3], **extra)
    return g.op("Resize", x, empty, scales, **extra)


def _depth_to_space(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    x = x if g.width[x] % 4 == 0 else g.gated(g.conv_of(x, 8))
    mode = {"mode": g.pick(("DCR", "CRD"))} if g.opset >= 11 else {}
    y = g.op("DepthToSpace", x, blocksize=2, width=g.width[x] // 4, space=(2 * height, 2 * across), **mode)
    return g.conv_of(y, 6, kernel=3, strides=[2, 2], space=(height, across))


def _space_to_depth(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    if min(height, across) < 2:  # nothing would be left
        return x
    if height % 2 or across % 2 or g.width[x] > 4:
        x, height, across = g.gated(g.act(g.conv_of(x, 2))), height // 2 * 2, across // 2 * 2
        x = g.op("Slice", x, *(np.array(v) for v in ([0, 0], [height, across], [2, 3]))) if g.opset >= 10 else x
    if g.opset < 10 and (g.space[x][0] % 2 or g.space[x][1] % 2):
        return x
    mode = {"mode": g.pick(("DCR", "CRD"))} if g.opset >= 28 else {}
    return g.op("SpaceToDepth", x, blocksize=2, width=4 * g.width[x], space=(height // 2, across // 2), **mode)


def _crop(g: RandomGraph, x: str) -> str:
    """The middle, or more around it."""
    width, (height, across) = g.width[x], g.space[x]
    if g.chance(5):
        size = (max(1, height - 2), across + 1)
        return g.op("CenterCropPad", x, np.array(size), axes=[2, 3], space=size)
    new = max(1, width - 2)
    return g.op("CenterCropPad", x, np.array([new]), axes=[1], width=new)


def _filled(g: RandomGraph, x: str) -> str:
    """A constant of the tensor's own shape."""
    value = onnx.helper.make_tensor("value", 1, [1], [0.5])
    return g.op("Add", x, g.op("ConstantOfShape", g.op("Shape", x), value=value))


def _size(g: RandomGraph, x: str) -> str:
    """The number of elements as a factor."""
    count = g.op("Cast", g.op("Size", x), to=onnx.TensorProto.FLOAT)
    return g.op("Mul", x, g.op("Div", count, np.float32(256)), width=g.width[x], space=g.space[x])


def _gather_nd(g: RandomGraph, x: str) -> str:
    """The first sample."""
    return g.op("Add", x, g.op("GatherND", x, np.array([[0]])))


def _gather_elements(g: RandomGraph, x: str) -> str:
    """For every element of the first sample, which channel (or row) to read."""
    shape = (1, g.width[x], *g.space[x])
    axis = g.pick((2, 1))
    return g.op("Add", x, g.op("GatherElements", x, g.random.integers(0, shape[axis], shape), axis=axis))


def _reverse(g: RandomGraph, x: str) -> str:
    return g.op("ReverseSequence", x, np.ones(g.width[x], np.int64), batch_axis=1, time_axis=0)


ENTRIES: dict[str, Entry] = {
    "Split": Entry(_split),
    "Split rows": Entry(_split_rows, fixed=True),
    "Slice": Entry(_slice, fixed=True),
    "Gather": Entry(_gather),
    "Gather rows": Entry(_gather_rows, fixed=True),
    "GatherND": Entry(_gather_nd, 11),
    "GatherElements": Entry(_gather_elements, 11, fixed=True),
    "ReverseSequence": Entry(_reverse, 10),
    "Concat": Entry(_concat),
    "Concat constant": Entry(_concat_constant, fixed=True),
    "Concat rows": Entry(_concat_rows, fixed=True),
    "Pad": Entry(_pad, fixed=True),
    "CenterCropPad": Entry(_crop, 18, fixed=True),
    "Expand": Entry(_expand, fixed=True),
    "Tile": Entry(_tile, fixed=True),
    "ConstantOfShape": Entry(_filled),
    "Size": Entry(_size),
    "Reshape": Entry(_reshape, fixed=True),
    "Reshape shuffle": Entry(_shuffle, fixed=True),
    "Transpose": Entry(_transpose),
    "Transpose channels": Entry(_transpose_channels, fixed=True),
    "Squeeze": Entry(_squeeze),
    "Unsqueeze": Entry(_unsqueeze),
    "Flatten": Entry(_flatten, fixed=True),
    "Shape": Entry(_shape),
    "Resize": Entry(_resize, 10, fixed=True),
    "Upsample": Entry(_resize, 9, 9, fixed=True),
    "DepthToSpace": Entry(_depth_to_space, fixed=True),
    "SpaceToDepth": Entry(_space_to_depth, fixed=True),
}
