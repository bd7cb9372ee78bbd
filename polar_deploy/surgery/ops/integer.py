"""Layers that compute with integers: QLinearConv, QLinearMatMul, ConvInteger, MatMulInteger.

What counts in their sums is how far an integer is from its zero point: a channel that holds it adds nothing, and
padding is such. Sums are in units of the input's scale times the weight's, and so are biases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.ops.conv import Conv
from polar_deploy.surgery.ops.linear import RIGHT, MatMul
from polar_deploy.surgery.quantization import Scheme, Weight, doubt, quantize, scheme

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Floats, Step
    from polar_deploy.surgery.ir import Node
    from polar_deploy.surgery.operator import Operator


class QLinearConv(Conv):
    """Conv of integers, rounded to integers again. Inputs: x, its scale and zero point, the weight's, the result's."""

    bias_input = 8

    def kernels(self, step: Step) -> Weight:
        return stored_weight(step, 3, scale=4, zero=5, axis=0)

    def bias_type(self, step: Step) -> np.dtype[Any]:
        return np.dtype(np.int32)

    def contribution(self, step: Step, value: Floats) -> Floats:
        return value - _of_input(step, 1, 2).offset

    def result(self, step: Step, sums: Floats) -> tuple[Floats, Bools]:
        return rounded(step, sums)


class ConvInteger(Conv):
    """Conv of integers without a bias; the sums come out. Inputs: x, the weight, the zero points of both."""

    bias_input = None

    def kernels(self, step: Step) -> Weight:
        return stored_weight(step, 1, scale=None, zero=3, axis=0)

    def contribution(self, step: Step, value: Floats) -> Floats:
        return value - _offset(step)


class MatMulInteger(MatMul):
    """MatMul of integers by a constant matrix on the right; the sums come out. Inputs as ConvInteger's."""

    sides = (RIGHT,)
    pairs = across = False

    def matrix(self, step: Step) -> Weight:
        return stored_weight(step, 1, scale=None, zero=3, axis=-1)

    def contribution(self, step: Step, value: Floats) -> Floats:
        return value - _offset(step)


class QLinearMatMul(MatMulInteger):
    """MatMul of integers, rounded to integers again. Inputs as QLinearConv's, without a bias."""

    factors = (0, 3)

    def matrix(self, step: Step) -> Weight:
        return stored_weight(step, 3, scale=4, zero=5, axis=-1)

    def adder(self, step: Step) -> tuple[Node, int, Array] | None:
        return None

    def contribution(self, step: Step, value: Floats) -> Floats:
        return value - _of_input(step, 1, 2).offset

    def result(self, step: Step, sums: Floats) -> tuple[Floats, Bools]:
        return rounded(step, sums)


def stored_weight(step: Step, index: int, scale: int | None, zero: int, axis: int) -> Weight:
    """A weight whose scale and zero point are inputs of the layer itself; sums are in units of the scale."""
    values = step.parameter(index, "weight")
    found = scheme(step.graph, step.node, scale, zero, axis, values.dtype)
    vectors = tuple((step.node, vector) for vector in found.vectors)
    return Weight(step.node, index, values, np.ones(1), found.zero, vectors, plain=False)


def _of_input(step: Step, scale: int | None, zero: int) -> Scheme:
    """The one scale and zero point of the input, or of the result."""
    found = scheme(step.graph, step.node, scale, zero, 0, np.dtype(np.uint8))
    if found.vectors:
        raise Unsupported("it is quantised row by row")
    return found


def _offset(step: Step) -> Floats:
    """The zero point of the input; 0 where DynamicQuantizeLinear makes both, see there."""
    data, zero = step.node.inputs[0], step.node.inputs[2] if step.has(2) else None
    if zero is not None and zero.inputs and data.inputs and zero.inputs[0] is data.inputs[0]:
        return np.zeros(1)
    return _of_input(step, None, 2).offset


def rounded(step: Step, sums: Floats, *, factors: tuple[int, int] = (1, 4), result: int = 6) -> tuple[Floats, Bools]:
    """Sums, in units of the scales at the inputs `factors`, as integers with the scale at `result`."""
    after = _of_input(step, result, result + 1)
    units = [step.parameter(index, "scale").astype(np.float64).ravel() for index in factors]
    return quantize(sums * units[0] * units[1], after.scale, after.zero, doubt(np.dtype(np.float32)))


HANDLERS: dict[str, Operator] = {
    "QLinearConv": QLinearConv(),
    "QLinearMatMul": QLinearMatMul(),
    "ConvInteger": ConvInteger(),
    "MatMulInteger": MatMulInteger(),
}
