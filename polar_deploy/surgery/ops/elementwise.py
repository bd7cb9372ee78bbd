"""Add, Sub, Mul, Div, Sum, Max, Min and PRelu: several tensors, channel by channel, with broadcasting.

A gate is a Mul with a constant. A branch that is constant throughout is replaced by that constant: in a residual block
the Add becomes an identity and goes with the branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step
    from polar_deploy.surgery.graph import Array
    from polar_deploy.surgery.model import Shape


@dataclass(frozen=True)
class Operand:
    """One input as the output sees it. Arrays: [output channels]."""

    constant: Bools
    value: Floats
    nonnegative: Bools


class Elementwise(Operator):
    """Handler of an operator that computes each output element from one element of every input.

    Args:
        compute: the operator on two arrays; more are folded from the left.
        neutral: the constant that leaves the other operand as it is; None: there is none.
        commutes: whether `neutral` works on the left as well.
        nonnegative: whether operands >= 0 give a result >= 0.
    """

    def __init__(
        self,
        compute: Callable[[Array, Array], Array],
        neutral: float | None = None,
        *,
        commutes: bool = True,
        nonnegative: bool = False,
    ) -> None:
        self.compute = compute
        self.neutral = neutral
        self.commutes = commutes
        self.nonnegative = nonnegative

    def couple(self, step: Step) -> None:
        lead = next((i for i, x in enumerate(step.inputs) if x is not None and len(x) > 1), None)
        if lead is None:
            lead = next((i for i, x in enumerate(step.inputs) if x is not None), None)
        if lead is None:
            raise Wall("the channels of its inputs are not known")
        leader = step.require(lead)
        offset = len(_shape(step)) - len(step.graph.shape(step.original[lead]) or ())
        target = step.create(tuple(axis + offset for axis in leader.axes))
        for index, source in enumerate(step.inputs):
            if source is not None:
                self._join(step, index, source, target)
            elif step.constant(index) is None and not _is_broadcast(step, index, target):
                raise Wall(f"the channels of {step.original[index].name} are not known")

    def _join(self, step: Step, index: int, source: Channels, target: Channels) -> None:
        every = np.arange(len(target))
        offset = len(_shape(step)) - len(step.graph.shape(step.original[index]) or ())
        if tuple(axis + offset for axis in source.axes) != target.axes:
            if not _is_broadcast(step, index, target):
                raise Wall("its inputs have their channels on different axes")
        elif source.dims == target.dims:
            step.link(source, target, every, every)
        elif len(source) == 1:
            step.link(source, target, np.zeros_like(every), every, coupled=False)
        else:
            raise Wall("its inputs have different numbers of channels")

    def operands(self, step: Step) -> list[Operand]:
        """The inputs' facts, spread over the output's channels."""
        return [self._operand(step, index) for index in range(len(step.original))]

    def _operand(self, step: Step, index: int) -> Operand:
        target, source = step.output, step.inputs[index]
        if index in step.replaced:
            value = step.replaced[index]
            return Operand(np.ones(len(target), bool), value, value >= 0)
        link = next((link for link in step.links if link.source is source), None)
        if link is not None:
            x, out_of = link.source, link.out_of
            return Operand(x.constant[out_of], x.value[out_of], x.nonnegative[out_of])
        values = step.constant(index)
        if values is None:
            return Operand(np.zeros(len(target), bool), np.zeros(len(target)), np.zeros(len(target), bool))
        return _spread(values, len(_shape(step)), target)

    def constants(self, step: Step) -> None:
        self._conclude(step, self.operands(step))

    def _conclude(self, step: Step, operands: list[Operand]) -> None:
        target = step.output
        target.constant = np.all([operand.constant for operand in operands], axis=0)
        with np.errstate(all="ignore"):
            value = reduce(self.compute, [operand.value for operand in operands])
        target.constant &= np.isfinite(value)
        target.value = np.where(target.constant, value, 0.0)
        positive = np.all([operand.nonnegative for operand in operands], axis=0)
        target.nonnegative = np.where(target.constant, target.value >= 0, positive & self.nonnegative)

    def need(self, step: Step) -> None:
        self._replace(step)
        replaced = [step.inputs[index] for index in step.replaced]
        step.links = [link for link in step.links if link.source not in replaced]
        for source in step.inputs:
            if source is not None and source not in [*replaced, *(link.source for link in step.links)]:
                source.pin(step.note("it joins tensors with channels on different axes"))
        for link in step.links:
            wanted = link.target.needed[link.into] & self.reads(step, link.source)
            link.source.needed[link.out_of[wanted]] = True

    def reads(self, step: Step, source: Channels) -> Bools:
        """[output channels] where the result depends on what `source` holds."""
        return np.ones(len(step.output), bool)

    def _replace(self, step: Step) -> None:
        """Finds the inputs that are constant wherever they are read, and whose shape the output does not depend on."""
        target, shape = step.output, _shape(step)
        linked = [link.source for link in step.links]
        for index, source in enumerate(step.inputs):
            if source is None or source not in linked:
                continue
            operand, read = self._operand(step, index), target.needed & self.reads(step, source)
            others = [
                step.graph.shape(tensor)
                for other, tensor in enumerate(step.original)
                if step.inputs[other] not in (None, source) and other not in step.replaced
            ]
            if (operand.constant | ~read).all() and shape in others and None not in shape:
                step.replaced[index] = np.where(read, operand.value, self.neutral or 0.0)

    def slice(self, step: Step) -> None:
        for index in range(len(step.node.inputs)):
            if (values := self._constant_operand(step, index)) is not None:
                step.graph.set_constant(step.node, index, values)
        self.simplify(step)

    def _constant_operand(self, step: Step, index: int) -> Array | None:
        """The operand cut to what is kept; None where it stays as it is."""
        target, rank = step.output, len(_shape(step))
        if index in step.replaced:
            shape = [1] * (rank - min(target.axes))
            for axis, size in zip(target.axes, target.dims, strict=True):
                shape[axis - rank] = size
            dtype = step.graph.dtype(step.original[index])
            return _cut(step.replaced[index].reshape(shape).astype(dtype), rank, target)
        values = step.constant(index)
        if values is None or target.kept.all():
            return None
        return _cut(values, rank, target)

    def simplify(self, step: Step) -> None:
        """Drops the operator where all but one of its operands are neutral."""
        node = step.node
        if self.neutral is None:
            return
        neutral = [
            (values := step.constant(index)) is not None and bool(np.all(values == self.neutral))
            for index in range(len(node.inputs))
        ]
        rest = [index for index, is_neutral in enumerate(neutral) if not is_neutral]
        if len(rest) == 1 and (self.commutes or rest == [0]) and keeps_shape(step, rest[0]):
            step.graph.bypass(node, rest[0])


class Multiply(Elementwise):
    """Mul: zero wins over whatever the other side holds. With one constant factor a channel: a gate."""

    def __init__(self) -> None:
        super().__init__(np.multiply, 1.0, nonnegative=True)

    def constants(self, step: Step) -> None:
        operands = self.operands(step)
        gate = self._factor(step)
        if step.facts.settled and gate is not None:  # it opens where nobody needs the result, see `slice`
            operand = operands[gate]
            value = np.where(step.output.needed, operand.value, 1.0)
            operands[gate] = Operand(operand.constant, value, value >= 0)
        self._conclude(step, operands)
        zero = np.any([operand.constant & (operand.value == 0) for operand in operands], axis=0)
        target = step.output
        target.constant |= zero
        target.value[zero] = 0.0
        target.nonnegative |= zero

    def reads(self, step: Step, source: Channels) -> Bools:
        """A channel that another factor makes zero is not read; of several zeros the first one counts."""
        zeros = [operand.constant & (operand.value == 0) for operand in self.operands(step)]
        read = np.ones(len(step.output), bool)
        for index in sorted(range(len(zeros)), key=lambda index: step.inputs[index] is not None):  # gates first
            if step.inputs[index] is source:
                break
            read &= ~zeros[index]
        return read

    def gate(self, step: Step) -> Floats | None:
        index = self._factor(step)
        return None if index is None else self.operands(step)[index].value

    def _factor(self, step: Step) -> int | None:
        """The input that is a constant factor a channel; None where this Mul is no gate."""
        factors = [index for index in (0, 1) if step.constant(index) is not None]
        if len(factors) != 1 or step.inputs[1 - factors[0]] is None:
            return None
        values = step.parameter(factors[0], "factor")
        if values.size != len(step.output) or not self.operands(step)[factors[0]].constant.all():
            return None
        return factors[0]

    def slice(self, step: Step) -> None:
        gate = self._factor(step)
        if gate is not None:
            operands, values = self.operands(step), step.parameter(gate, "factor")
            other = operands[1 - gate]
            free = ~step.output.needed | (other.constant & (other.value == 0))
            opened = np.where(free, 1.0, operands[gate].value)
            if not np.array_equal(opened, operands[gate].value):
                step.graph.set_constant(step.node, gate, opened.reshape(values.shape).astype(values.dtype))
        super().slice(step)


def keeps_shape(step: Step, index: int) -> bool:
    """Whether the output has the shape of input `index`, so that the operator may go."""
    shape = _shape(step)
    return None not in shape and step.graph.shape(step.original[index]) == shape


def _cut(values: Array, rank: int, target: Channels) -> Array:
    for axis in target.axes:
        own = axis - rank + values.ndim
        if own >= 0 and values.shape[own] > 1:
            values = values.take(target.keep(axis), axis=own)
    return values


def _is_broadcast(step: Step, index: int, target: Channels) -> bool:
    """Whether an input has no extent along the channels."""
    shape, rank = step.graph.shape(step.original[index]), len(_shape(step))
    if shape is None:
        return False
    return all(axis < rank - len(shape) or shape[axis - rank] == 1 for axis in target.axes)


def _shape(step: Step) -> Shape:
    shape = step.graph.shape(step.made[0])
    if shape is None:
        raise Wall("its shape is not known")
    return shape


def _spread(values: Array, rank: int, target: Channels) -> Operand:
    """A constant operand, channel by channel: constant where it holds one number."""
    full = values.reshape((1,) * (rank - values.ndim) + values.shape)
    moved = np.moveaxis(full, target.axes, range(len(target.axes)))
    flat = moved.reshape(*moved.shape[: len(target.axes)], -1).astype(np.float64)
    low = np.broadcast_to(flat.min(axis=-1), target.dims).reshape(-1)
    high = np.broadcast_to(flat.max(axis=-1), target.dims).reshape(-1)
    return Operand(low == high, low.copy(), low >= 0)


HANDLERS = {
    "Add": Elementwise(np.add, 0.0, nonnegative=True),
    "Sum": Elementwise(np.add, 0.0, nonnegative=True),
    "Sub": Elementwise(np.subtract, 0.0, commutes=False),
    "Div": Elementwise(np.divide, 1.0, commutes=False, nonnegative=True),
    "Mul": Multiply(),
    "Max": Elementwise(np.maximum, nonnegative=True),
    "Min": Elementwise(np.minimum, nonnegative=True),
    "PRelu": Elementwise(lambda x, slope: np.where(x < 0, x * slope, x)),
}
