"""Operators of com.microsoft that ONNX Runtime's optimisers make of standard ones: each is known by its kin."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.dtype_limits import fits
from polar_deploy.surgery.elementwise import Elementwise
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.mixing import Mixing, MixingWeights, Plan
from polar_deploy.surgery.ops.activation import HANDLERS as ACTIVATIONS
from polar_deploy.surgery.ops.activation import Unary, gelu, swish
from polar_deploy.surgery.ops.conv import Conv
from polar_deploy.surgery.ops.linear import Gemm, MatMul

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.facts import Floats, Step
    from polar_deploy.surgery.operator import Operator

# Names of the numbers in `activation_params` of FusedConv, and of FusedGemm's attributes.
PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Clip": ("low", "high")}
HOMOGENEOUS = ("", "Relu", "LeakyRelu")  # factors above zero can move through them
ADDEND = 3  # input of FusedConv that is added before the activation


class Activated(Mixing):
    """A layer whose activation is part of it; FusedConv may add a tensor in between."""

    def couple(self, step: Step[Plan]) -> None:
        super().couple(step)
        if not step.has(ADDEND) or not isinstance(self, Conv):
            return
        target, added = step.output, step.inputs[ADDEND]
        if added is None or (added.axes, added.dims) != (target.axes, target.dims):
            raise Unsupported("the channels of what it adds are not known")
        if step.node.attrs.get("group", 1) > 1:
            raise Unsupported("it adds a tensor to what its groups make")
        numbers = every(len(target))
        step.link(added, target, numbers, numbers)
        step.plan.addend = step.links[-1]

    def constants(self, step: Step[Plan]) -> None:
        super().constants(step)
        target, addend = step.output, step.plan.addend
        if addend is not None:
            target.constant &= addend.source.constant
            target.value = target.value + addend.source.value
        name, attrs = self.activation(step)
        if name:
            function = ACTIVATIONS[name]
            assert isinstance(function, Unary)
            with np.errstate(all="ignore"):
                target.value = np.asarray(
                    _clip(target.value, attrs) if name == "Clip" else function.function(target.value, attrs)
                )
        target.constant &= fits(target.value, step.graph.dtype(step.made[0]))
        target.value = np.where(target.constant, target.value, 0.0)
        target.nonnegative = np.where(target.constant, target.value >= 0, name in ("Relu", "Sigmoid", "HardSigmoid"))

    def activation(self, step: Step) -> tuple[str, dict[str, Any]]:
        """The activation's ONNX name ("": none), and its attributes. Raises Unsupported."""
        name, attrs = step.node.attrs.get("activation", ""), step.node.attrs
        if name and (name not in ACTIVATIONS or (name == "Clip" and len(attrs.get("activation_params", ())) != 2)):
            raise Unsupported(f"its activation {name} is not known to surgery")
        names = PARAMETERS.get(name, ())
        numbers = attrs.get("activation_params") or [
            attrs[f"activation_{n}"] for n in names if f"activation_{n}" in attrs
        ]
        return name, dict(zip(names, numbers, strict=False))

    def read(self, step: Step) -> MixingWeights:
        self.activation(step)
        return super().read(step)

    def scale_output(self, step: Step[Plan], factors: Floats) -> bool:
        free = self.activation(step)[0] in HOMOGENEOUS and step.plan.addend is None and bool((factors >= 0).all())
        return free and super().scale_output(step, factors)


class FusedConv(Activated, Conv):
    """Conv, a sum, an activation. Inputs: as Conv's, and what is added."""


class FusedGemm(Activated, Gemm):
    """Gemm and an activation."""


class FusedMatMul(MatMul):
    """`alpha * x @ weight`; the weight may be stored transposed."""

    sides = (1,)
    across = False

    def is_transposed(self, step: Step) -> bool:
        return bool(step.node.attrs.get("transB", 0))

    def is_turned(self, step: Step) -> tuple[bool, bool]:
        attrs = step.node.attrs
        if attrs.get("transBatchA", 0) or attrs.get("transBatchB", 0):
            raise Unsupported("its batch is transposed")
        return bool(attrs.get("transA", 0)), bool(attrs.get("transB", 0))

    def alpha(self, step: Step) -> float:
        return float(step.node.attrs.get("alpha", 1.0))

    def read(self, step: Step) -> MixingWeights:
        if any(step.node.attrs.get(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
            raise Unsupported("its input is transposed")
        return super().read(step)


class Biased(Elementwise):
    """A function of `x + bias`, or of x alone where there is no bias, element by element."""

    def __init__(self, function: Callable[[Floats, dict[str, Any]], Floats]) -> None:
        super().__init__(np.add)
        self.function = function

    def combine(self, step: Step, values: list[Floats]) -> Floats:
        return self.function(reduce(np.add, values), step.node.attrs)

    def simplify(self, step: Step) -> None:
        """It stays."""


def _clip(values: Floats, attrs: dict[str, Any]) -> Floats:
    return np.clip(values, attrs["low"], attrs["high"])


def _fast_gelu(x: Floats, _: dict[str, Any]) -> Floats:
    return gelu(x, {"approximate": "tanh"})


def _quick_gelu(x: Floats, attrs: dict[str, Any]) -> Floats:
    return swish(x, {"alpha": attrs.get("alpha", 1.702)})


MICROSOFT: dict[str, Operator] = {
    "FusedConv": FusedConv(),
    "FusedGemm": FusedGemm(),
    "FusedMatMul": FusedMatMul(),
    "Gelu": Biased(lambda x, _: gelu(x, {})),
    "BiasGelu": Biased(lambda x, _: gelu(x, {})),
    "FastGelu": Biased(_fast_gelu),
    "QuickGelu": Biased(_quick_gelu),
}
