"""Mul and Where: with a constant factor, or a constant mask, a channel, they are gates.

A gate that closes channels which are kept, and that nobody needs or that are zero anyhow, opens there: when all of it
is open, it goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import all_of, any_of
from polar_deploy.surgery.dtype_limits import is_half
from polar_deploy.surgery.elementwise import Absorbing, Elementwise, Operand, Operands, keeps_shape
from polar_deploy.surgery.ops.activation import swish

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step
    from polar_deploy.surgery.operator import Operator


class Multiply(Absorbing):
    """Mul: zero wins over whatever the other side holds."""

    can_be_nonfinite = True

    def operands(self, step: Step[Operands]) -> list[Operand]:
        operands = super().operands(step)
        found = self._factor(step) if step.facts.after_cut else None
        if found is not None:
            index, factor = found
            value = self._opened(step, index, factor)
            operands[index] = Operand(factor.constant, value, value >= 0, factor.finite)
        return operands

    def _opened(self, step: Step[Operands], index: int, factor: Operand) -> Floats:
        """[output channels] the factor `index`, one where that makes no difference."""
        free = ~step.output.needed | self._operand(step, 1 - index).zero
        if step.parameter(index, "factor").size == 1 and not all_of(free):  # one for all
            return factor.value
        opened: Floats = np.where(free, 1.0, factor.value)
        return opened

    def conclude(self, step: Step, operands: list[Operand]) -> Operand:
        if len(operands) != 2 or any(operand.finite is not None for operand in operands):
            return super().conclude(step, operands)
        one, other = operands  # the same as above, in fewer steps: there are many gates
        zero = one.zero | other.zero
        value = one.value * other.value
        value[zero] = 0.0
        return Operand((one.constant & other.constant) | zero, value, one.nonnegative & other.nonnegative)

    def gate(self, step: Step[Operands]) -> Floats | None:
        found = self._factor(step)
        return None if found is None else found[1].value

    def _factor(self, step: Step[Operands]) -> tuple[int, Operand] | None:
        """The input that is a constant factor a channel, or zero or one for all; None where this Mul is no gate."""
        left, right = step.constant(0), step.constant(1)
        index, values = (0, left) if right is None else (1, right)
        one_only, width = (left is None) is not (right is None), step.output.size
        if values is None or not one_only or step.inputs[1 - index] is None or values.size not in (1, width):
            return None
        factor = self._operand(step, index)
        switch = values.size == 1 and factor.value[0] in (0, 1)
        return (index, factor) if all_of(factor.constant) and (values.size == width or switch) else None

    def nonfinite_risk(self, step: Step[Operands]) -> Bools:
        """Two tensors in half precision overflow; a factor that is constant does not, unless it is infinite itself."""
        operands = super().operands(step)
        known = np.any([operand.constant for operand in operands], axis=0)
        if any(step.constant(index) is not None for index in (0, 1)):
            known[:] = True
        half = is_half(step.graph.dtype(step.made[0]))
        risk = np.asarray(~known & half)
        for operand in operands:
            risk = risk if operand.finite is None else risk | ~operand.finite
        return risk

    def slice(self, step: Step[Operands]) -> None:
        if (found := self._factor(step)) is not None:
            index, factor = found
            values = step.parameter(index, "factor")
            opened = self._opened(step, index, factor)[: values.size]
            if all_of(opened == 1) and keeps_shape(step, 1 - index) and step.graph.bypass(step.node, 1 - index):
                return
            if any_of(opened != values.ravel()):
                step.graph.set_constant(step.node, index, opened.reshape(values.shape).astype(values.dtype))
        super().slice(step)


class SwiGLU(Absorbing):
    """`swish(a) * b`: zero where one of them is."""

    def combine(self, step: Step, values: list[Floats]) -> Floats:
        gate, linear = values
        return swish(gate, step.node.attrs) * linear


class Where(Elementwise):
    """Where: each channel comes from one side where the condition is known, from either where it is not."""

    def __init__(self) -> None:
        super().__init__(np.where)

    def operands(self, step: Step[Operands]) -> list[Operand]:
        operands = super().operands(step)
        if step.facts.after_cut and self._has_mask(step, operands):
            mask = self._opened(step, operands).astype(np.float64)
            operands[0] = Operand(operands[0].constant, mask, mask >= 0, operands[0].finite)
        return operands

    def conclude(self, step: Step, operands: list[Operand]) -> Operand:
        condition, yes, no = operands
        known, chosen = condition.constant, condition.value != 0

        def choose(one: Bools, other: Bools) -> Bools:
            return np.where(known, np.where(chosen, one, other), one & other)

        same = known | (yes.value == no.value)
        value = np.where(known & ~chosen, no.value, yes.value)
        nonnegative = choose(yes.nonnegative, no.nonnegative)
        return Operand(choose(yes.constant, no.constant) & same, value, nonnegative)

    def reads(self, step: Step[Operands], source: Channels) -> Bools:
        condition = super().operands(step)[0]
        chosen = condition.value != 0
        sides = (np.ones(len(chosen), bool), ~condition.constant | chosen, ~condition.constant | ~chosen)
        return np.asarray(np.any([side for x, side in zip(step.inputs, sides, strict=True) if x is source], axis=0))

    def gate(self, step: Step[Operands]) -> Floats | None:
        """A mask that lets one tensor through, or zero."""
        operands = super().operands(step)
        data = [index for index in (1, 2) if step.inputs[index] is not None]
        if not self._has_mask(step, operands) or len(data) != 1 or not operands[3 - data[0]].zero.all():
            return None
        mask = operands[0].value
        return mask if data == [1] else 1 - mask

    def _has_mask(self, step: Step, operands: list[Operand]) -> bool:
        """Whether the condition is one constant a channel."""
        values = step.constant(0)
        return values is not None and values.size == len(step.output) and bool(operands[0].constant.all())

    def _opened(self, step: Step, operands: list[Operand]) -> Bools:
        """[output channels] the mask, turned to the side that makes it uniform wherever that does not matter."""
        mask, yes, no = np.asarray(operands[0].value != 0), operands[1], operands[2]
        free = ~step.output.needed | (yes.constant & no.constant & (yes.value == no.value))
        data = [index for index in (1, 2) if step.inputs[index] is not None and index not in step.replaced]
        wanted = np.unique(mask[~free]) if len(data) == 2 else np.array([data == [1]])
        if len(wanted) == 1 and data:
            mask = np.where(free, wanted[0], mask)
        return mask

    def slice(self, step: Step[Operands]) -> None:
        if self._has_mask(step, super().operands(step)):
            values, opened = step.parameter(0, "condition"), self.operands(step)[0].value != 0
            if not np.array_equal(opened, values.ravel()):
                step.graph.set_constant(step.node, 0, opened.reshape(values.shape))
        super().slice(step)

    def simplify(self, step: Step) -> None:
        condition = step.constant(0)
        if condition is None:
            return
        for index, whole in ((1, condition.all()), (2, not condition.any())):
            if whole and index not in step.replaced and keeps_shape(step, index):
                step.graph.bypass(step.node, index)
                return


HANDLERS: dict[str, Operator] = {
    "Mul": Multiply(np.multiply, 1.0, nonnegative=True),
    "SwiGLU": SwiGLU(np.multiply),
    "Where": Where(),
}
