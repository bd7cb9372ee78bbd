"""Quantized tensors. All scales are powers of two, so that most sums are exact and rounding seldom flips a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.surgery.entries.entry import Entry
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


LAST = 27  # opset: ONNX Runtime has no QuantizeLinear and DequantizeLinear of 28 yet
ENTRIES: dict[str, Entry] = {
    "QuantizeLinear": Entry(_quantize, 10, LAST),
    "DequantizeLinear": Entry(_quantized_conv, 10, LAST),
    "QLinearConv": Entry(_qlinear_conv, 10, LAST),
    "QLinearMatMul": Entry(_qlinear_matmul, 10, LAST, fixed=True),
    "ConvInteger": Entry(_conv_integer, 10, LAST),
    "MatMulInteger": Entry(_matmul_integer, 10, LAST, fixed=True),
    "DynamicQuantizeLinear": Entry(_dynamic, 11, LAST),
}
