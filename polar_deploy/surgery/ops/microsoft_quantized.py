"""What ONNX Runtime's quantiser writes of com.microsoft: operators that take integers and make integers.

Each reads a scale and a zero point for every tensor, also for its result: it computes with the numbers that are meant
and rounds what comes out. Facts are about the integers, so a closed channel holds the zero point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.dtype_limits import holding, only
from polar_deploy.surgery.elementwise import Elementwise, Operand, Operands
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.ops.activation import HANDLERS as ACTIVATIONS
from polar_deploy.surgery.ops.activation import Unary
from polar_deploy.surgery.ops.integer import QLinearConv, rounded, stored_weight
from polar_deploy.surgery.ops.linear import Gemm
from polar_deploy.surgery.ops.slicing import Concat
from polar_deploy.surgery.quantization import Scheme, Weight, doubt, quantize, scheme

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Floats, Ints, Step
    from polar_deploy.surgery.mixing import MixingWeights

DOUBT = doubt(np.dtype(np.float32))


def _scheme(step: Step, scale: int) -> Scheme:
    """The one scale of a tensor, at that input, and the zero point behind it. Raises Unsupported."""
    found = scheme(step.graph, step.node, scale, scale + 1, 0, step.graph.dtype(step.made[0]))
    if found.vectors:
        raise Unsupported("it is quantised row by row")
    return found


def _numbers(values: Floats, found: Scheme) -> Floats:
    """What integers stand for."""
    return np.asarray((values - found.offset) * found.scale)


def _stored(step: Step, numbers: Floats, scale: int) -> Floats:
    """Numbers as integers of the result, NaN where runtimes may differ."""
    found = _scheme(step, scale)
    values, certain = quantize(numbers, found.scale, found.zero, DOUBT)
    return np.where(certain, values, np.nan)


class Arithmetic(Elementwise):
    """QLinearAdd and QLinearMul. Inputs: A, its scale and zero point; the same of B; those of the result."""

    factors = (0, 3)

    def couple(self, step: Step[Operands]) -> None:
        for at in (1, 4, 6):
            _scheme(step, at)
        if any(not step.has(at) for at in (2, 5, 7)):
            raise Unsupported("it has no zero points")
        super().couple(step)

    def combine(self, step: Step, values: list[Floats]) -> Floats:
        both = [_numbers(values[at], _scheme(step, at + 1)) for at in self.factors]
        return _stored(step, np.asarray(self.compute(*both)), 6)

    def simplify(self, step: Step) -> None:
        """It stays: it rounds."""


class Product(Arithmetic):
    """QLinearMul: zero wins over whatever the other side holds."""

    def zeros(self, step: Step, operand: Operand, at: int) -> Bools:
        """[output channels] where an operand is zero."""
        return np.asarray(operand.constant & (operand.value == _scheme(step, at + 1).offset))

    def conclude(self, step: Step, operands: list[Operand]) -> Operand:
        found = super().conclude(step, operands)
        zero = np.any([self.zeros(step, operands[at], at) for at in self.factors], axis=0)
        value = np.where(zero, _scheme(step, 6).offset, found.value)
        return Operand(found.constant | zero, value, found.nonnegative)

    def reads(self, step: Step[Operands], source: object) -> Bools | None:
        """A channel that the other operand makes zero is not read; where both do, the first one counts."""
        right = step.inputs[self.factors[1]]
        if source is right:
            return ~self.zeros(step, self._operand(step, 0), 0)
        if right is None:  # a constant comes first
            return ~self.zeros(step, self._operand(step, 3), 3)
        return None


class Pointwise(Operator):
    """A function of one tensor, or pooling that leaves what is the same everywhere as it is.

    Inputs: x, its scale and zero point, those of the result.
    """

    def __init__(self, name: str | None, *, padded: bool = False) -> None:
        """name: the standard operator; padded: whether zeros around the image count."""
        self.name = name
        self.padded = padded

    def couple(self, step: Step) -> None:
        if step.node.attrs.get("channels_last", 0):
            raise Unsupported("its channels come last")
        for at in (1, 3):
            _scheme(step, at)
        if self.name is None and step.require().axes != (1,):
            raise Unsupported("the channels of its input are not on axis 1")
        step.carry()

    def constants(self, step: Step) -> None:
        source, target = step.require(), step.output
        numbers = _numbers(source.value, _scheme(step, 1))
        constant = source.constant & ((numbers == 0) | (not self.padded))
        if self.name is not None:
            function = ACTIVATIONS[self.name]
            assert isinstance(function, Unary)
            numbers = np.asarray(function.function(numbers, step.node.attrs))
        value = _stored(step, numbers, 3)
        target.constant, target.value = holding(constant, value, step.graph.dtype(step.made[0]))
        target.nonnegative = target.constant & (target.value >= 0)


class QGemm(Gemm):
    """Gemm of integers. Inputs: A, its scale and zero point, B's, the bias, scale and zero point of the result."""

    bias_at = 6

    def read(self, step: Step) -> MixingWeights:
        if step.node.attrs.get("alpha", 1.0) != 1:
            raise Unsupported("its sums have a factor")
        return super().read(step)

    def matrix(self, step: Step) -> Weight:
        return stored_weight(step, 3, scale=4, zero=5, axis=0 if step.node.attrs.get("transB", 0) else -1)

    def bias_type(self, step: Step) -> np.dtype[Any]:
        return np.dtype(np.int32)

    def contribution(self, step: Step, value: Floats) -> Floats:
        return value - _scheme(step, 1).offset

    def result(self, step: Step, sums: Floats) -> tuple[Floats, Bools]:
        if step.has(8):
            return rounded(step, sums, factors=(1, 4), result=7)
        units = [step.parameter(index, "scale").astype(np.float64).ravel() for index in (1, 4)]
        return sums * units[0] * units[1], np.ones(len(sums), bool)


class Joined(Concat):
    """QLinearConcat. Inputs: scale and zero point of the result, then each part with its own."""

    stride, first = 3, 2

    def convert(self, step: Step, index: int, values: Array) -> Array:
        return _stored(step, _numbers(values, _scheme(step, index + 1)), 0)

    def couple(self, step: Step[list[Ints | None]]) -> None:
        for at in (0, *range(3, len(step.node.inputs), 3)):
            _scheme(step, at)
        super().couple(step)

    def constants(self, step: Step[list[Ints | None]]) -> None:
        super().constants(step)
        target = step.output
        target.constant = target.constant & ~np.isnan(target.value)
        target.value = only(target.value, target.constant)
        target.nonnegative = target.constant & (target.value >= 0)


class Convolution(QLinearConv):
    """QLinearConv of com.microsoft, whose channels may come last."""

    def read(self, step: Step) -> MixingWeights:
        if step.node.attrs.get("channels_last", 0):
            raise Unsupported("its channels come last")
        return super().read(step)


MICROSOFT: dict[str, Operator] = {
    "QLinearAdd": Arithmetic(np.add),
    "QLinearMul": Product(np.multiply),
    "QLinearConcat": Joined(),
    "QLinearConv": Convolution(),
    "QLinearSigmoid": Pointwise("Sigmoid"),
    "QLinearLeakyRelu": Pointwise("LeakyRelu"),
    "QLinearGlobalAveragePool": Pointwise(None),
    "QLinearAveragePool": Pointwise(None, padded=True),
    "QGemm": QGemm(),
}
