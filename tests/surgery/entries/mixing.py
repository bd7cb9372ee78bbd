"""Convolutions, linear layers and pooling."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.surgery.entries.entry import Add, Entry
from tests.surgery.random_graphs import RandomGraph


def _conv(g: RandomGraph, x: str) -> str:
    """Plain ones: kernels 1 and 3, strides, dilations, automatic padding."""
    height, across = g.space[x]
    kind = g.pick(("same", "stride", "dilation", "auto", "valid"))
    width = g.pick((4, 6, 8))
    if kind == "stride":
        return g.conv_of(x, width, kernel=3, strides=[2, 2], space=((height + 1) // 2, (across + 1) // 2))
    if kind == "dilation":
        return g.conv_of(x, width, kernel=3, dilations=[2, 2], pads=[2] * 4)
    if kind == "auto":
        return g.conv_of(x, width, kernel=3, auto_pad="SAME_UPPER", pads=None)
    if kind == "valid" and min(height, across) > 3:
        return g.conv_of(x, width, kernel=3, pads=[0] * 4, space=(height - 2, across - 2))
    return g.conv_of(x, width, kernel=g.pick((1, 3)))


def _conv_depthwise(g: RandomGraph, x: str) -> str:
    width = g.width[x]
    return g.conv_of(x, width * (2 if width <= 4 and g.chance(4) else 1), kernel=3, group=width)


def _conv_grouped(g: RandomGraph, x: str) -> str:
    group = 2 if g.width[x] % 2 == 0 else 1
    return g.conv_of(x, g.pick((4, 8)), kernel=g.pick((1, 3)), group=group)


def _conv_1d(g: RandomGraph, x: str) -> str:
    inputs, (height, across) = g.width[x], g.space[x]
    width = g.pick((inputs, 4, 6))
    row = g.op("Reshape", x, np.array([0, inputs, height * across]))
    group = inputs if width == inputs and g.chance(4) else 1
    weight = g.normal(width, inputs // group, 3) / np.sqrt(inputs * 3, dtype=np.float32)
    row = g.op("Conv", row, weight, g.normal(width), pads=[1, 1], group=group)
    return g.op("Reshape", g.act(row), np.array([0, width, height, across]), width=width, space=(height, across))


def _conv_transpose(g: RandomGraph, x: str) -> str:
    """Strided or not, grouped or not."""
    inputs, (height, across) = g.width[x], g.space[x]
    group = g.pick((1, 2)) if inputs % 2 == 0 else 1
    width = g.pick((4, 6))
    weight = g.normal(inputs, width // group, 2, 2) / np.sqrt(2 * inputs / group, dtype=np.float32)
    bias = [] if g.chance(3) else [g.normal(width)]
    stride = 2 if height <= 4 else 1
    space = (height * 2, across * 2) if stride == 2 else (height + 1, across + 1)
    return g.op("ConvTranspose", x, weight, *bias, strides=[stride] * 2, group=group, width=width, space=space)


def _gemm(g: RandomGraph, x: str) -> str:
    """Squeeze and excite by way of vectors: two Gemms, hidden units closed."""
    width = g.width[x]
    hidden = g.act(g.gemm_of(g.vector(x), width, 6))
    hidden = g.op("Mul", hidden, (g.random.random(6) < 0.6).astype(np.float32))
    return g.merge(x, g.as_image(g.gemm_of(hidden, 6, width), width))


def _matmul(g: RandomGraph, x: str) -> str:
    """The two layers of a transformer on tokens, hidden units closed."""
    width, space = g.width[x], g.space[x]
    tokens = g.tokens(x)
    hidden = g.op("Add", g.op("MatMul", tokens, g.matrix(width, 6)), g.normal(6))
    hidden = g.op("Mul", g.act(hidden), (g.random.random(6) < 0.6).astype(np.float32))
    out = g.op("MatMul", hidden, g.matrix(6, width))
    out = g.op("Add", out, g.normal(width)) if g.chance(6) else out
    return g.untokens(g.op("Add", tokens, out) if g.chance(5) else out, width, space)


def _matmul_left(g: RandomGraph, x: str) -> str:
    """A constant matrix on the left, on channels in front of positions."""
    width, (height, across) = g.width[x], g.space[x]
    flat = g.op("Reshape", x, np.array([0, width, height * across]))
    y = g.op("MatMul", g.matrix(6, width), flat)
    return g.op("Reshape", y, np.array([0, 6, height, across]), width=6, space=(height, across))


def _attention(g: RandomGraph, x: str) -> str:
    """One head: two computed factors, twice."""
    width, space = g.width[x], g.space[x]
    tokens = g.tokens(x)
    query, key, value = (g.op("MatMul", tokens, g.matrix(width, n)) for n in (4, 4, width))
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 2, 1]))
    out = g.op("MatMul", g.op("Softmax", scores, axis=2), value)
    return g.untokens(out, width, space)


def pool(operator: str) -> Add:
    """With and without padding and strides."""

    def add(g: RandomGraph, x: str) -> str:
        height, across = g.space[x]
        extra: dict[str, Any] = {}
        if operator == "AveragePool" and g.chance(5):
            extra = {"count_include_pad": 1}
        if g.chance(3) and min(height, across) > 1:
            return g.op(operator, x, kernel_shape=[2, 2], strides=[2, 2], space=(height // 2, across // 2))
        return g.op(operator, x, kernel_shape=[3, 3], pads=[1] * 4, **extra)

    return add


def global_pool(operator: str) -> Add:
    return lambda g, x: g.merge(x, g.op(operator, x, space=(1, 1)))


def _deform_conv(g: RandomGraph, x: str) -> str:
    """Its offsets are computed from the image too."""
    inputs = g.width[x]
    offsets = g.op("Tanh", g.conv_of(x, 2))
    weight = g.normal(4, inputs, 1, 1) / np.sqrt(inputs, dtype=np.float32)
    return g.op("DeformConv", x, weight, offsets, g.normal(4), width=4)


def _unpool(g: RandomGraph, x: str) -> str:
    """Every value back to where it came from."""
    height, across = g.space[x]
    if height % 2 or across % 2:
        return x
    pooled, places = g.ops(
        "MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], widths=[None, None], space=(height // 2, across // 2)
    )
    return g.op("MaxUnpool", pooled, places, kernel_shape=[2, 2], strides=[2, 2], space=(height, across))


def region(operator: str) -> Add:
    """The largest of one corner of the first sample, added to all."""

    def add(g: RandomGraph, x: str) -> str:
        if operator == "MaxRoiPool":
            corner = g.op(operator, x, np.array([[0, 0, 0, 1, 1]], np.float32), pooled_shape=[1, 1])
        else:
            box = np.array([[0, 0, 2, 2]], np.float32)
            corner = g.op(operator, x, box, np.zeros(1, np.int64), output_height=1, output_width=1)
        return g.op("Add", x, corner)

    return add


def _grid_sample(g: RandomGraph, x: str) -> str:
    """The image, a little turned."""
    batch = g.op("Gather", g.op("Shape", x), np.array([0]), axis=0)
    shape = g.op("Concat", batch, np.array([*g.space[x], 2]), axis=0)
    grid = g.op("Expand", g.random.uniform(-1, 1, (1, *g.space[x], 2)).astype(np.float32), shape)
    return g.op("GridSample", x, grid)


ENTRIES: dict[str, Entry] = {
    "Conv": Entry(_conv, fixed=True),
    "Conv depthwise": Entry(_conv_depthwise),
    "Conv grouped": Entry(_conv_grouped),
    "Conv 1d": Entry(_conv_1d, fixed=True),
    "ConvTranspose": Entry(_conv_transpose, fixed=True),
    "DeformConv": Entry(_deform_conv, 19),
    "Gemm": Entry(_gemm),
    "MatMul": Entry(_matmul, fixed=True),
    "MatMul left": Entry(_matmul_left, fixed=True),
    "MatMul attention": Entry(_attention, fixed=True),
    "MaxPool": Entry(pool("MaxPool"), fixed=True),
    "AveragePool": Entry(pool("AveragePool"), fixed=True),
    "LpPool": Entry(pool("LpPool"), fixed=True),
    **{name: Entry(global_pool(name)) for name in ("GlobalAveragePool", "GlobalMaxPool")},
    "GlobalLpPool": Entry(global_pool("GlobalLpPool"), 9, 21),  # ONNX Runtime has no later one
    "MaxUnpool": Entry(_unpool, fixed=True),
    "MaxRoiPool": Entry(region("MaxRoiPool"), 9, 21, fixed=True),
    "RoiAlign": Entry(region("RoiAlign"), 10, 21, fixed=True),
    "GridSample": Entry(_grid_sample, 16, fixed=True),
}
