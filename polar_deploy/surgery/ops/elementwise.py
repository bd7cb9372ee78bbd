"""Arithmetic on several tensors: sums, differences, quotients, powers, Max and Min, PRelu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.dtype_limits import is_half, is_whole
from polar_deploy.surgery.elementwise import Elementwise, Operand, Operands, keeps_shape

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Floats, Step
    from polar_deploy.surgery.operator import Operator


class Sum(Elementwise):
    """Add and Sum. Of a Sum, terms that are zero go."""

    def simplify(self, step: Step) -> None:
        super().simplify(step)
        node = step.node
        zeros = [index for index in range(len(node.inputs)) if self._is_neutral(step, index)]
        rest = [index for index in range(len(node.inputs)) if index not in zeros]
        if node.op == "Sum" and zeros and any(keeps_shape(step, index) for index in rest):
            for index in reversed(zeros):
                step.graph.drop_input(node, index)

    def through(self, step: Step) -> int | None:
        """The one term that is computed; a layer's bias is the other."""
        computed = [index for index in range(len(step.node.inputs)) if step.constant(index) is None]
        fits = len(computed) == 1 and len(step.node.inputs) == len(step.original) and len(step.output.axes) == 1
        return computed[0] if fits and keeps_shape(step, computed[0]) else None

    def scale_addend(self, step: Step, factors: Floats) -> None:
        """Terms that are constant get the channels' extent with their own factor each."""
        behind = len(step.graph.shape(step.made[0]) or ()) - 1 - step.output.axes[0]
        for index in range(len(step.node.inputs)):
            values = step.constant(index)
            if values is not None:
                scaled = values * factors.astype(values.dtype).reshape(-1, *[1] * behind)
                step.graph.set_constant(step.node, index, scaled)


class Mean(Elementwise):
    """The mean of the operands: one that is zero still counts."""

    def combine(self, step: Step, values: list[Floats]) -> Floats:
        total: Floats = np.sum(values, axis=0)
        return total / len(values)


class Max(Elementwise):
    """Max: one operand >= 0 is enough."""

    def is_nonnegative(self, step: Step, operands: list[Operand]) -> Bools:
        return np.asarray(np.any([operand.nonnegative for operand in operands], axis=0))


class Min(Elementwise):
    """Min: zero, where one operand is and the others are not below."""

    def absorbed(self, step: Step, operands: list[Operand]) -> Bools:
        zero = np.any([operand.zero for operand in operands], axis=0)
        return np.asarray(zero & self.is_nonnegative(step, operands))


class PRelu(Elementwise):
    """PRelu: zero stays zero, and what is not below zero stays as it is, whatever the slope."""

    whole = 0

    def absorbed(self, step: Step, operands: list[Operand]) -> Bools:
        return operands[0].zero

    def is_nonnegative(self, step: Step, operands: list[Operand]) -> Bools:
        return operands[0].nonnegative


class Quotient(Elementwise):
    """Div and Mod. Zero divided by anything is zero where the graph is finite; it must be what it was, though."""

    can_be_nonfinite = True

    def combine(self, step: Step, values: list[Floats]) -> Floats:
        if step.node.op == "Mod":
            return np.fmod(*values) if step.node.attrs.get("fmod", 0) else np.mod(*values)
        quotient = np.divide(*values)
        return np.trunc(quotient) if is_whole(step.graph.dtype(step.made[0])) else quotient

    def absorbed(self, step: Step, operands: list[Operand]) -> Bools:
        divisor = operands[1]
        certain = ~divisor.zero
        if step.facts.after_cut:  # a divisor that nobody needs holds something else now
            link = next((link for link in step.links if link.source is step.inputs[1]), None)
            certain &= divisor.constant | (True if link is None else link.source.needed[link.out_of])
        return np.asarray(operands[0].zero & certain)

    def is_nonnegative(self, step: Step, operands: list[Operand]) -> Bools:
        if step.node.op == "Mod":  # fmod has the sign of what is divided, else it is the divisor's
            return operands[0 if step.node.attrs.get("fmod", 0) else 1].nonnegative
        return super().is_nonnegative(step, operands)

    def nonfinite_risk(self, step: Step[Operands]) -> Bools:
        divisor, values = self.operands(step)[1], step.constant(1)
        if values is not None and np.all(values):
            return np.zeros(len(step.output), bool)
        return np.asarray(~(divisor.constant & (divisor.value != 0)))


class Power(Elementwise):
    """Pow. Even powers are never below zero; small ones do not overflow."""

    can_be_nonfinite = True

    def is_nonnegative(self, step: Step, operands: list[Operand]) -> Bools:
        base, exponent = operands
        return np.asarray(base.nonnegative | (exponent.constant & (exponent.value % 2 == 0)))

    def nonfinite_risk(self, step: Step[Operands]) -> Bools:
        exponent = self.operands(step)[1]
        small = exponent.constant & np.isin(exponent.value, (0, 1, 2, 3, 4))
        return ~small | is_half(step.graph.dtype(step.made[0]))


HANDLERS: dict[str, Operator] = {
    **dict.fromkeys(("Add", "Sum"), Sum(np.add, 0.0, nonnegative=True)),
    "Sub": Elementwise(np.subtract, 0.0, commutes=False),
    "Mean": Mean(np.add, nonnegative=True),
    "Div": Quotient(np.divide, 1.0, commutes=False, nonnegative=True),
    "Mod": Quotient(np.mod, steady=0.05),
    "Pow": Power(np.power, 1.0, commutes=False),
    "Max": Max(np.maximum),
    "Min": Min(np.minimum, nonnegative=True),
    "PRelu": PRelu(lambda x, slope: np.where(x < 0, x * slope, x)),
}
