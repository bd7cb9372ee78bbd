"""Quantized tensors. All scales are powers of two, so that most sums are exact and rounding seldom flips a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from polar_deploy.surgery.standins import MICROSOFT
from tests.surgery.entries.entry import Add, Entry
from tests.surgery.graphs import Array
from tests.surgery.random_graphs import RandomGraph


def _quantized(g: RandomGraph, x: str, axis: int | None = None, *, signed: bool = True) -> str:
    """The integers of an image. Scales are powers of two."""
    count = () if axis is None else (g.width[x],)
    scale = np.exp2(-g.random.integers(3, 6, count)).astype(np.float32)
    zero = np.zeros(count, np.int8) if signed else np.full(count, 128, np.uint8)
    parameters = [scale, zero]
    along: dict[str, Any] = {} if axis is None else {"axis": axis}
    y = g.op("QuantizeLinear", x, *parameters, **along)
    g.scales[y] = parameters
    return y


def _quantize(g: RandomGraph, x: str) -> str:
    """The pair Q, DQ: a tensor or a channel at a time."""
    axis = 1 if g.opset >= 13 and g.chance(4) else None
    y = _quantized(g, x, axis, signed=g.chance(5))
    along: dict[str, Any] = {} if axis is None else {"axis": axis}
    return g.op("DequantizeLinear", y, *g.scales[y], **along)


def _quantized_conv(g: RandomGraph, x: str) -> str:
    """As quantizers write it: Q and DQ on the activation, DQ on the weight, a channel at a time."""
    width, inputs = g.pick((4, 6)), g.width[x]
    y = _quantize(g, x)
    numbers = g.random.integers(-127, 128, (width, inputs, 1, 1)).astype(np.int8)
    each = g.opset >= 13 and g.chance(6)
    scale = np.exp2(-g.random.integers(7, 9, (width,) if each else ())).astype(np.float32)
    zero = np.zeros(scale.shape, np.int8)
    along: dict[str, Any] = {"axis": 0} if each else {}
    weight = g.op("DequantizeLinear", numbers, scale, zero, **along)
    return g.op("Conv", y, weight, g.normal(width), width=width)


def _qlinear_conv(g: RandomGraph, x: str) -> str:
    width, inputs = g.pick((4, 6)), g.width[x]
    y = _quantized(g, x, signed=False)
    numbers = g.random.integers(-127, 128, (width, inputs, 1, 1)).astype(np.int8)
    out = [np.float32(0.0625), np.uint8(128)]
    bias = g.random.integers(-500, 500, width).astype(np.int32)
    z = g.op("QLinearConv", y, *g.scales[y], numbers, np.float32(1 / 64), np.int8(0), *out, bias, width=width)
    return g.op("DequantizeLinear", z, *out)


def _conv_integer(g: RandomGraph, x: str) -> str:
    width, inputs = g.pick((4, 6)), g.width[x]
    y = _quantized(g, x, signed=False)
    numbers = g.random.integers(0, 255, (width, inputs, 1, 1)).astype(np.uint8)
    z = g.op("ConvInteger", y, numbers, np.uint8(128), np.uint8(127), width=width)
    return g.op("Mul", g.op("Cast", z, to=onnx.TensorProto.FLOAT), np.float32(2**-10))


def _matmul_integer(g: RandomGraph, x: str) -> str:
    width, space = g.width[x], g.space[x]
    y = g.tokens(_quantized(g, x, signed=False))
    numbers = g.random.integers(0, 255, (width, 4)).astype(np.uint8)
    z = g.op("Cast", g.op("MatMulInteger", y, numbers, np.uint8(128), np.uint8(127)), to=onnx.TensorProto.FLOAT)
    return g.untokens(g.op("Mul", z, np.float32(2**-10)), 4, space)


def _qlinear_matmul(g: RandomGraph, x: str) -> str:
    width, space = g.width[x], g.space[x]
    y = _quantized(g, x, signed=False)
    numbers = g.random.integers(-127, 128, (width, 4)).astype(np.int8)
    out = [np.float32(0.0625), np.uint8(128)]
    z = g.op("QLinearMatMul", g.tokens(y), *g.scales[y], numbers, np.float32(1 / 64), np.int8(0), *out)
    return g.untokens(g.op("DequantizeLinear", z, *out), 4, space)


def _dynamic(g: RandomGraph, x: str) -> str:
    """A scale that is computed from the tensor itself."""
    return g.op("DequantizeLinear", *g.ops("DynamicQuantizeLinear", x, widths=[None] * 3))


def _arithmetic(operator: str) -> Add:
    """Of an image and another one, or of a mask that was quantised."""

    def add(g: RandomGraph, x: str) -> str:
        if g.chance(5):
            mask = np.full((1, g.width[x], 1, 1), 130, np.uint8)
            mask[:, g.closed(g.width[x])] = 128
            other: list[str | Array] = [mask, np.float32(0.5), np.uint8(128)]
        else:
            other = [y := _quantized(g, g.partner(x), signed=False), *g.scales[y]]
        x = _quantized(g, x, signed=False)
        out = [np.float32(0.0625), np.uint8(128)]
        return g.op("DequantizeLinear", g.op(operator, x, *g.scales[x], *other, *out, domain=MICROSOFT), *out)

    return add


def _pointwise(operator: str, **attributes: Any) -> Add:
    def add(g: RandomGraph, x: str) -> str:
        x = _quantized(g, x, signed=False)
        out = [np.float32(0.03125), np.uint8(128)]
        return g.op("DequantizeLinear", g.op(operator, x, *g.scales[x], *out, domain=MICROSOFT, **attributes), *out)

    return add


def _qlinear_concat(g: RandomGraph, x: str) -> str:
    out = [np.float32(0.0625), np.uint8(128)]
    parts = [_quantized(g, part, signed=False) for part in (x, g.partner(x))]
    given = [tensor for part in parts for tensor in (part, *g.scales[part])]
    width = sum(g.width[part] for part in parts)
    return g.op("DequantizeLinear", g.op("QLinearConcat", *out, *given, axis=1, width=width, domain=MICROSOFT), *out)


def _qgemm(g: RandomGraph, x: str) -> str:
    """Of the means of an image, which are added to it again."""
    width, out = g.width[x], [np.float32(0.0625), np.uint8(128)]
    means = g.op("Flatten", g.op("GlobalAveragePool", x))
    y = _quantized(g, means, signed=False)
    numbers = g.random.integers(-127, 128, (width, width)).astype(np.int8)
    bias = g.random.integers(-500, 500, width).astype(np.int32)
    weight = [numbers, np.float32(1 / 64), np.int8(0), bias]
    z = g.op("QGemm", y, *g.scales[y], *weight, *out, transB=1, domain=MICROSOFT)
    return g.op("Add", x, g.as_image(g.op("DequantizeLinear", z, *out), width))


LAST = 27  # opset: ONNX Runtime has no QuantizeLinear and DequantizeLinear of 28 yet
ENTRIES: dict[str, Entry] = {
    "QuantizeLinear": Entry(_quantize, 10, LAST),
    "DequantizeLinear": Entry(_quantized_conv, 10, LAST),
    "QLinearConv": Entry(_qlinear_conv, 10, LAST),
    "QLinearMatMul": Entry(_qlinear_matmul, 10, LAST, fixed=True),
    "ConvInteger": Entry(_conv_integer, 10, LAST),
    "MatMulInteger": Entry(_matmul_integer, 10, LAST, fixed=True),
    "DynamicQuantizeLinear": Entry(_dynamic, 11, LAST),
    "QLinearAdd": Entry(_arithmetic("QLinearAdd"), 10, LAST, fixed=True),
    "QLinearMul": Entry(_arithmetic("QLinearMul"), 10, LAST, fixed=True),
    "QLinearConcat": Entry(_qlinear_concat, 10, LAST, fixed=True),
    "QLinearSigmoid": Entry(_pointwise("QLinearSigmoid"), 10, LAST, fixed=True),
    "QLinearLeakyRelu": Entry(_pointwise("QLinearLeakyRelu", alpha=0.25), 10, LAST, fixed=True),
    "QLinearAveragePool": Entry(
        _pointwise("QLinearAveragePool", kernel_shape=[3, 3], pads=[1] * 4), 10, LAST, fixed=True
    ),
    "QGemm": Entry(_qgemm, 10, LAST, fixed=True),
}
