"""Activations: a function of one tensor, element by element."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from polar_deploy.surgery.arrays import all_of, any_of, no, yes
from polar_deploy.surgery.dtype_limits import holding, is_steady, is_whole
from polar_deploy.surgery.operator import Operator, PlanT

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.facts import Floats, Step

Attributes = dict[str, Any]

# Functions that jump: how far the result may go from itself where the input goes to a number nearby.
JUMPS, ROUNDS = 0.05, 0.0


class Unary(Operator[PlanT]):
    """Handler of a function that is applied to each element.

    Args:
        function: from the values and the node's attributes.
        nonnegative: whether no result is below zero; None: where the input is not.
        can_be_nonfinite: see `Operator`.
        steady: for a function that jumps, the relative change that is none; None: it does not jump.
    """

    def __init__(
        self,
        function: Callable[[Floats, Attributes], Floats],
        nonnegative: bool | None = False,
        *,
        can_be_nonfinite: bool = False,
        steady: float | None = None,
    ) -> None:
        self.function = function
        self.nonnegative = nonnegative
        self.can_be_nonfinite = can_be_nonfinite
        self.steady = steady

    def couple(self, step: Step[PlanT]) -> None:
        step.carry()

    def constants(self, step: Step[PlanT]) -> None:
        source, target = step.require(), step.output
        known = source.nonnegative if self.nonnegative is None else (yes if self.nonnegative else no)(len(target))
        if not any_of(source.constant):
            target.constant, target.value = np.zeros(len(target), bool), np.zeros(len(target))
            target.nonnegative = known.copy()
            return
        value = np.asarray(self.apply(step, source.value), np.float64)
        target.constant, target.value = holding(source.constant, value, step.graph.dtype(step.made[0]))
        change = self.change(step)
        if change is not None and not is_whole(step.graph.dtype(step.original[0])):
            target.constant &= is_steady(lambda x: self.apply(step, x), [source.value], change)
            target.value[~target.constant] = 0.0
        target.nonnegative = np.where(target.constant, target.value >= 0, known)

    def apply(self, step: Step[PlanT], values: Floats) -> Floats:
        """The function on values of the input."""
        return self.function(values, step.node.attrs)

    def change(self, step: Step[PlanT]) -> float | None:
        """The relative change that is no jump; None where the function has no jumps."""
        return self.steady


class Relu(Unary):
    """Relu goes where nothing below zero comes in, as behind a residual block that went."""

    def slice(self, step: Step) -> None:
        source = step.require()
        if all_of(source.nonnegative[source.kept]):
            step.graph.bypass(step.node)


Bounds: TypeAlias = "tuple[float, float] | None"


class Clip(Unary[Bounds]):
    """Clip: bounds are attributes before opset 11, inputs since. With bounds that are computed nothing is constant."""

    def couple(self, step: Step[Bounds]) -> None:
        found = [
            step.constant(index) if step.has(index) else np.array(step.node.attrs.get(name, default), np.float64)
            for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf))
        ]
        bounds = [float(bound.reshape(())) for bound in found if bound is not None]
        step.plan = (bounds[0], bounds[1]) if len(bounds) == 2 else None
        step.carry()

    def constants(self, step: Step[Bounds]) -> None:
        super().constants(step)
        source, target = step.require(), step.output
        if step.plan is None:
            target.constant[:] = target.nonnegative[:] = False
            return
        low, high = step.plan
        target.nonnegative |= (source.nonnegative | (low >= 0)) & (high >= 0)

    def apply(self, step: Step[Bounds], values: Floats) -> Floats:
        if step.plan is None:
            return values
        low, high = step.plan
        clipped: Floats = np.minimum(np.maximum(values, low), high)
        return clipped


def sigmoid(x: Floats) -> Floats:
    """Of any shape."""
    return 1 / (1 + np.exp(-x))


def _softplus(x: Floats, _: Attributes) -> Floats:
    return np.logaddexp(0.0, x)


def erf(x: Floats) -> Floats:
    """The error function, on a vector."""
    return np.array([math.erf(value) for value in x.tolist()])


def gelu(x: Floats, attrs: Attributes) -> Floats:
    """On a vector; `approximate` may be "tanh"."""
    if attrs.get("approximate", "none") == "tanh":
        inner: Floats = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        inner = erf(x / math.sqrt(2))
    return 0.5 * x * (1 + inner)


def _elu(x: Floats, attrs: Attributes) -> Floats:
    slope: float = attrs.get("alpha", 1.0)
    return np.where(x < 0, slope * np.expm1(np.minimum(x, 0)), x)


def _selu(x: Floats, attrs: Attributes) -> Floats:
    scale: float = attrs.get("gamma", 1.0507010221481323)
    slope: float = attrs.get("alpha", 1.6732631921768188)
    return scale * np.where(x <= 0, slope * np.expm1(np.minimum(x, 0)), x)


def _celu(x: Floats, attrs: Attributes) -> Floats:
    slope: float = attrs.get("alpha", 1.0)
    return np.maximum(x, 0) + np.minimum(slope * np.expm1(x / slope), 0)


def _hard_sigmoid(x: Floats, attrs: Attributes) -> Floats:
    slope, offset = float(attrs.get("alpha", 0.2)), float(attrs.get("beta", 0.5))
    clipped: Floats = np.clip(slope * x + offset, 0, 1)
    return clipped


def _leaky(x: Floats, attrs: Attributes) -> Floats:
    slope: float = attrs.get("alpha", 0.01)
    return np.where(x < 0, slope * x, x)


def _thresholded(x: Floats, attrs: Attributes) -> Floats:
    return np.where(x > attrs.get("alpha", 1.0), x, 0.0)


def _shrink(x: Floats, attrs: Attributes) -> Floats:
    width, bias = attrs.get("lambd", 0.5), attrs.get("bias", 0.0)
    return np.where(x < -width, x + bias, np.where(x > width, x - bias, 0.0))


def swish(x: Floats, attrs: Attributes) -> Floats:
    """Of any shape; `alpha` is the slope inside the sigmoid."""
    slope: float = attrs.get("alpha", 1.0)
    return x * sigmoid(slope * x)


HANDLERS: dict[str, Operator] = {
    "Relu": Relu(lambda x, _: np.maximum(x, 0), True),
    "Clip": Clip(lambda x, _: x),
    "LeakyRelu": Unary(_leaky, None),
    "ThresholdedRelu": Unary(_thresholded, None, steady=JUMPS),
    "Elu": Unary(_elu, None),
    "Selu": Unary(_selu),
    "Celu": Unary(_celu, None),
    "Gelu": Unary(gelu, None),
    "Sigmoid": Unary(lambda x, _: sigmoid(x), True),
    "HardSigmoid": Unary(_hard_sigmoid, True),
    "HardSwish": Unary(lambda x, _: x * np.clip(x / 6 + 0.5, 0, 1), None),
    "Swish": Unary(swish, None),
    "Mish": Unary(lambda x, _: x * np.tanh(_softplus(x, _)), None),
    "Tanh": Unary(lambda x, _: np.tanh(x), None),
    "Softplus": Unary(_softplus, True),
    "Softsign": Unary(lambda x, _: x / (1 + np.abs(x)), None),
    "Shrink": Unary(_shrink, steady=JUMPS),
}
