"""Operators on one tensor, element by element: activations, Identity, Dropout, Cast."""

from __future__ import annotations

from math import erf, pi, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.facts import Floats, Step

Attributes = dict[str, Any]


class Unary(Operator):
    """Handler of a function that is applied to each element.

    Args:
        function: from the values and the node's attributes.
        nonnegative: whether no result is below zero; None: where the input is not.
    """

    def __init__(self, function: Callable[[Floats, Attributes], Floats], nonnegative: bool | None = False) -> None:
        self.function = function
        self.nonnegative = nonnegative

    def couple(self, step: Step) -> None:
        step.carry()

    def constants(self, step: Step) -> None:
        super().constants(step)
        source, target = step.require(), step.output
        with np.errstate(all="ignore"):
            value = self.apply(step, source.value)
        target.constant = source.constant & np.isfinite(value)
        target.value = np.where(target.constant, value, 0.0)
        known = source.nonnegative if self.nonnegative is None else np.full(len(target), self.nonnegative)
        target.nonnegative = np.where(target.constant, target.value >= 0, known)

    def apply(self, step: Step, values: Floats) -> Floats:
        """The function on values of the input."""
        return self.function(values, step.node.attrs)


class Relu(Unary):
    """Relu goes where nothing below zero comes in, as behind a residual block that went."""

    def slice(self, step: Step) -> None:
        source = step.require()
        if source.nonnegative[source.kept].all():
            step.graph.bypass(step.node)


class Clip(Unary):
    """Clip with constant bounds: attributes before opset 11, inputs since."""

    def couple(self, step: Step) -> None:
        step.memo = tuple(
            float(step.parameter(index, "bound").reshape(())) if step.has(index) else step.node.attrs.get(name, default)
            for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf))
        )
        step.carry()

    def constants(self, step: Step) -> None:
        super().constants(step)
        if step.memo[0] >= 0:
            step.output.nonnegative[:] = True

    def apply(self, step: Step, values: Floats) -> Floats:
        low, high = step.memo
        clipped: Floats = np.clip(values, low, high)
        return clipped


class Identity(Unary):
    """Identity and, in inference, Dropout."""

    def couple(self, step: Step) -> None:
        if len(step.node.outputs) > 1 and step.node.outputs[1].outputs:
            raise Wall("its mask is used")
        if step.has(2) and np.any(step.parameter(2, "training mode")):
            raise Wall("it is in training mode")
        step.carry()


class Cast(Unary):
    """Cast between floating-point types."""

    def couple(self, step: Step) -> None:
        import onnx

        names = ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")
        if onnx.TensorProto.DataType.Name(step.node.attrs["to"]) not in names:
            raise Wall("it casts to another kind of number")
        step.carry()


def _sigmoid(x: Floats, _: Attributes) -> Floats:
    return 1 / (1 + np.exp(-x))


def _softplus(x: Floats, _: Attributes) -> Floats:
    return np.logaddexp(0.0, x)


def _erf(x: Floats) -> Floats:
    return np.array([erf(value) for value in x.tolist()])


def _gelu(x: Floats, attrs: Attributes) -> Floats:
    if attrs.get("approximate", "none") == "tanh":
        inner: Floats = np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))
    else:
        inner = _erf(x / sqrt(2))
    return 0.5 * x * (1 + inner)


def _elu(x: Floats, attrs: Attributes) -> Floats:
    slope: float = attrs.get("alpha", 1.0)
    return np.where(x < 0, slope * np.expm1(np.minimum(x, 0)), x)


def _hard_sigmoid(x: Floats, attrs: Attributes) -> Floats:
    slope, offset = float(attrs.get("alpha", 0.2)), float(attrs.get("beta", 0.5))
    clipped: Floats = np.clip(slope * x + offset, 0, 1)
    return clipped


def _leaky(x: Floats, attrs: Attributes) -> Floats:
    slope: float = attrs.get("alpha", 0.01)
    return np.where(x < 0, slope * x, x)


def _swish(x: Floats, attrs: Attributes) -> Floats:
    slope: float = attrs.get("alpha", 1.0)
    return x * _sigmoid(slope * x, attrs)


HANDLERS = {
    "Relu": Relu(lambda x, _: np.maximum(x, 0), True),
    "Clip": Clip(lambda x, _: x),
    "LeakyRelu": Unary(_leaky),
    "Elu": Unary(_elu),
    "Gelu": Unary(_gelu),
    "Sigmoid": Unary(_sigmoid, True),
    "HardSigmoid": Unary(_hard_sigmoid, True),
    "HardSwish": Unary(lambda x, _: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Swish": Unary(_swish),
    "Mish": Unary(lambda x, _: x * np.tanh(_softplus(x, _))),
    "Tanh": Unary(lambda x, _: np.tanh(x), None),
    "Softplus": Unary(_softplus, True),
    "Erf": Unary(lambda x, _: _erf(x), None),
    "Abs": Unary(lambda x, _: np.abs(x), True),
    "Neg": Unary(lambda x, _: -x),
    "Identity": Identity(lambda x, _: x, None),
    "Dropout": Identity(lambda x, _: x, None),
    "Cast": Cast(lambda x, _: x, None),
}
