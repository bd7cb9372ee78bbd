"""Operators on several tensors, element by element, with broadcasting: what their handlers share.

A branch that is constant throughout is replaced by that constant: in a residual block the Add becomes an identity and
goes with the branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from polar_deploy.surgery.arrays import all_of, any_of, every, no, yes
from polar_deploy.surgery.dtype_limits import holding, is_steady, is_whole
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step


@dataclass(eq=False, slots=True)
class Operand:
    """One input as the output sees it. Arrays, which nobody writes to: [output channels].

    finite: False where the model itself holds something infinite, or no number, in a constant; None: nowhere.
    """

    constant: Bools
    value: Floats
    nonnegative: Bools
    finite: Bools | None = None

    @property
    def zero(self) -> Bools:
        """Where it is known to be zero throughout."""
        zero: Bools = self.constant & (self.value == 0)
        return zero


Operands: TypeAlias = "dict[int, Operand]"  # constant ones, spread once


class Elementwise(Operator[Operands]):
    """Handler of an operator that computes each output element from one element of every input.

    Args:
        compute: the operator on two arrays; more are folded from the left.
        neutral: the constant that leaves the other operand as it is; None: there is none.
        commutes: whether `neutral` works on the left as well.
        nonnegative: whether operands >= 0 give a result >= 0.
        steady: for an operator that jumps, the relative change that is none; None: it does not jump.
    """

    absorbing_value = 0.0  # what comes out where one operand decides, see `absorbed`
    whole: int | None = None  # the input that has to have the shape of the output

    def __init__(
        self,
        compute: Callable[..., Array],
        neutral: float | None = None,
        *,
        commutes: bool = True,
        nonnegative: bool = False,
        steady: float | None = None,
    ) -> None:
        self.compute = compute
        self.neutral = neutral
        self.commutes = commutes
        self.nonnegative = nonnegative
        self.steady = steady

    def couple(self, step: Step[Operands]) -> None:
        step.plan = {}
        target = step.create(self._axes(step))
        for index, source in enumerate(step.inputs):
            if source is not None:
                self._join(step, index, source, target)
            elif (values := step.constant(index)) is not None:
                _check(values)
            elif not _is_broadcast(step, index, target.axes):
                self._go_whole(step, index, target, f"the channels of {step.original[index].name} are not known")

    def _axes(self, step: Step) -> tuple[int, ...]:
        """Where the output's channels lie: where those of an input do, of the first one that the others go along with.

        A mask has its channels along the tokens, the scores that it is for along the heads.
        """
        found, rank = {i: x for i, x in enumerate(step.inputs) if x is not None}, len(step.result_shape())
        if len(found) == 1:  # as at every gate
            ((index, x),) = found.items()
            offset = rank - len(step.graph.shape(step.original[index]) or ())
            return tuple([axis + offset for axis in x.axes]) if offset else x.axes
        axes = {
            i: tuple(axis + rank - len(step.graph.shape(step.original[i]) or ()) for axis in x.axes)
            for i, x in found.items()
        }
        wide = [i for i, x in found.items() if len(x) > 1] or list(found)
        if not wide:
            raise Unsupported("the channels of its inputs are not known")
        return next(
            (axes[i] for i in wide if all(_goes_along(step, j, axes[j], axes[i]) for j in found)),
            axes[wide[0]],
        )

    def _go_whole(self, step: Step, index: int, target: Channels, reason: str) -> None:
        """What differs along some of several axes of channels, and stays as it is: along those, all go or none.

        So heads go by which positions turn the dimensions. Raises Unsupported where it differs along all axes.
        """
        shape = step.graph.shape(step.original[index])
        offset = len(step.result_shape()) - len(shape or ())
        alike = [] if shape is None else [axis < offset or shape[axis - offset] == 1 for axis in target.axes]
        if not any(alike):
            raise Unsupported(reason)
        numbers = np.arange(len(target)).reshape(target.dims)
        first = numbers[tuple(slice(None) if same else slice(1) for same in alike)]
        step.tie(target, np.broadcast_to(first, numbers.shape).ravel(), numbers.ravel())

    def _join(self, step: Step, index: int, source: Channels, target: Channels) -> None:
        numbers = every(len(target))
        offset = len(step.result_shape()) - len(step.graph.shape(step.original[index]) or ())
        own = tuple(axis + offset for axis in source.axes)
        if own != target.axes:
            if _is_broadcast(step, index, target.axes):
                return
            if not _is_spread(step, index, own, target.axes):
                self._go_whole(step, index, target, "its inputs have their channels on different axes")
                return
            dims = [size if axis in own else 1 for axis, size in zip(target.axes, target.dims, strict=True)]
            if math.prod(dims) != len(source):
                raise Unsupported("its inputs have different numbers of channels")
            spread = np.broadcast_to(np.arange(len(source)).reshape(dims), target.dims).ravel()
            step.link(source, target, spread, numbers)  # a number for all dimensions of a head
        elif source.dims == target.dims:
            step.link(source, target, numbers, numbers)
        elif len(source) == 1:
            step.link(source, target, np.zeros_like(numbers), numbers, coupled=False)
        else:
            raise Unsupported("its inputs have different numbers of channels")

    def operands(self, step: Step[Operands]) -> list[Operand]:
        """The inputs' facts, spread over the output's channels."""
        return [self._operand(step, index) for index in range(len(step.original))]

    def _operand(self, step: Step[Operands], index: int) -> Operand:
        source, width = step.inputs[index], len(step.output)
        if index in step.replaced:
            value = step.replaced[index]
            return Operand(yes(width), value, value >= 0)
        for link in step.links if source is not None else ():
            if link.source is source:
                x, out_of = link.source, link.out_of
                if link.is_whole:
                    return Operand(x.constant, x.value, x.nonnegative)
                return Operand(x.constant[out_of], x.value[out_of], x.nonnegative[out_of])
        values = step.constant(index)
        if values is None:
            return Operand(no(width), np.zeros(width), no(width))
        if index not in step.plan:
            step.plan[index] = _spread(values, len(step.result_shape()), step.output)
        spread: Operand = step.plan[index]
        return spread

    def constants(self, step: Step[Operands]) -> None:
        target, result = step.output, self.conclude(step, self.operands(step))
        if any_of(result.value != 0):
            target.constant, target.value = holding(result.constant, result.value, step.graph.dtype(step.made[0]))
            target.nonnegative = np.where(target.constant, target.value >= 0, result.nonnegative)
        else:  # every type holds zero
            target.constant, target.value = result.constant.copy(), np.zeros(target.size)
            target.nonnegative = result.constant | result.nonnegative

    def conclude(self, step: Step, operands: list[Operand]) -> Operand:
        """The result's facts, from those of the operands."""
        values = [operand.value for operand in operands]
        constant = reduce(np.logical_and, [operand.constant for operand in operands])
        with np.errstate(all="ignore"):
            value = np.asarray(self.combine(step, values), np.float64)
            whole = is_whole(step.graph.dtype(step.original[0]))
            if self.steady is not None and not whole:
                constant &= is_steady(lambda *near: self.combine(step, list(near)), values, self.steady)
        absorbed = self.absorbed(step, operands)
        if absorbed is not None:
            for operand in operands:
                absorbed = absorbed if operand.finite is None else absorbed & operand.finite
            constant, value = constant | absorbed, np.where(absorbed, self.absorbing_value, value)
        return Operand(constant, value, self.is_nonnegative(step, operands))

    def combine(self, step: Step, values: list[Floats]) -> Floats:
        """The operator on numbers."""
        return reduce(self.compute, values)

    def absorbed(self, step: Step, operands: list[Operand]) -> Bools | None:
        """[output channels] where one operand alone makes the result `absorbing_value`, whatever finite numbers the
        others hold; None: nowhere."""
        return None

    def is_nonnegative(self, step: Step, operands: list[Operand]) -> Bools:
        """[output channels] where no result is below zero."""
        if not self.nonnegative:
            return no(len(step.output))
        return reduce(np.logical_and, [operand.nonnegative for operand in operands])

    def need(self, step: Step[Operands]) -> None:
        self._replace(step)
        replaced = [step.inputs[index] for index in step.replaced]
        step.links = [link for link in step.links if link.source not in replaced]
        for source in step.inputs:
            if source is not None and source not in [*replaced, *(link.source for link in step.links)]:
                source.pin(step.note("it joins tensors with channels on different axes"))
        for link in step.links:
            read = self.reads(step, link.source)
            wanted = link.target.needed if read is None else link.target.needed & read
            if link.is_whole:
                link.source.needed |= wanted
            else:
                link.source.needed[link.out_of[wanted[link.into]]] = True

    def reads(self, step: Step[Operands], source: Channels) -> Bools | None:
        """[output channels] where the result depends on what `source` holds; None: everywhere."""
        return None

    def _replace(self, step: Step[Operands]) -> None:
        """Finds the inputs that are constant wherever they are read, and whose shape the output does not depend on."""
        target, shape = step.output, step.result_shape()
        if None in shape:
            return
        for source in self._neutral_first(step):
            mine = [index for index, x in enumerate(step.inputs) if x is source]  # all of them or none
            others = [
                step.graph.shape(tensor)
                for index, tensor in enumerate(step.original)
                if step.inputs[index] is not None and index not in (*mine, *step.replaced)
            ]
            if self.whole in mine or shape not in others:
                continue
            operand, dependent = self._operand(step, mine[0]), self.reads(step, source)
            read = target.needed if dependent is None else target.needed & dependent
            if not all_of(operand.constant | ~read):
                continue
            # Our constant may differ from the runtime's by rounding, which matters where the operator jumps.
            exact = self.steady is None or bool(np.all(operand.value[read] == 0))
            if exact:
                step.replaced.update(dict.fromkeys(mine, np.where(read, operand.value, self.neutral or 0.0)))

    def _neutral_first(self, step: Step) -> list[Channels]:
        """The inputs that are linked; without a neutral one the operator can go, and one input has to be left."""
        sources = list({id(link.source): link.source for link in step.links}.values())
        if len(sources) < 2:
            return sources
        return sorted(sources, key=lambda x: not (x.constant & (x.value == self.neutral)).all())

    def slice(self, step: Step[Operands]) -> None:
        for index in range(len(step.node.inputs)):
            if (values := self._constant_operand(step, index)) is not None:
                step.graph.set_constant(step.node, index, values)
        self.simplify(step)

    def _constant_operand(self, step: Step, index: int) -> Array | None:
        """The operand cut to what is kept; None where it stays as it is."""
        target, rank = step.output, len(step.result_shape())
        if index in step.replaced:
            shape = [1] * (rank - min(target.axes))
            for axis, size in zip(target.axes, target.dims, strict=True):
                shape[axis - rank] = size
            dtype = step.graph.dtype(step.original[index])
            return _cut(step.replaced[index].reshape(shape).astype(dtype), rank, target)
        values = step.constant(index)
        if values is None or all_of(target.kept):
            return None
        return _cut(values, rank, target)

    def simplify(self, step: Step) -> None:
        """Drops the operator where all but one of its operands are neutral."""
        rest = [index for index in range(len(step.node.inputs)) if not self._is_neutral(step, index)]
        if len(rest) == 1 and (self.commutes or rest == [0]) and keeps_shape(step, rest[0]):
            step.graph.bypass(step.node, rest[0])

    def _is_neutral(self, step: Step, index: int) -> bool:
        values = step.constant(index)
        return values is not None and self.neutral is not None and all_of(np.equal(values, self.neutral))


class Absorbing(Elementwise):
    """An operator whose result is `absorbing_value` wherever one operand is: a factor of zero."""

    def absorbed(self, step: Step, operands: list[Operand]) -> Bools:
        return reduce(
            np.logical_or, [operand.constant & (operand.value == self.absorbing_value) for operand in operands]
        )

    def reads(self, step: Step[Operands], source: Channels) -> Bools | None:
        """A channel that another operand decides is not read; where several do, the first one counts."""
        read = np.ones(len(step.output), bool)
        gates_first = sorted(range(len(step.original)), key=lambda index: step.inputs[index] is not None)
        for index in gates_first:
            if step.inputs[index] is source:
                break
            operand = self._operand(step, index)
            read &= ~(operand.constant & (operand.value == self.absorbing_value))
        return read


def _axis_of(shape: tuple[int, ...]) -> int | None:
    """The one axis that has an extent, counted from the end; None where several have one, or none has."""
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    return wide[0] - len(shape) if len(wide) == 1 else None


def keeps_shape(step: Step, index: int) -> bool:
    """Whether the output has the shape of input `index`, so that the operator may go."""
    shape = step.result_shape()
    return None not in shape and step.graph.shape(step.original[index]) == shape


def _cut(values: Array, rank: int, target: Channels) -> Array:
    for axis in target.axes:
        own = axis - rank + values.ndim
        if own >= 0 and values.shape[own] > 1:
            values = values.take(target.keep(axis), axis=own)
    return values


def _check(values: Array) -> None:
    if values.dtype.kind not in "biufV":
        raise Unsupported("it works on what is no number")
    if not values.size:
        raise Unsupported("one of its inputs has no elements")


def _is_broadcast(step: Step, index: int, axes: tuple[int, ...]) -> bool:
    """Whether an input has no extent along the output's `axes`."""
    shape, rank = step.graph.shape(step.original[index]), len(step.result_shape())
    if shape is None:
        return False
    return all(axis < rank - len(shape) or shape[axis - rank] == 1 for axis in axes)


def _is_spread(step: Step, index: int, own: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether an input has channels along some of the output's `axes`, its `own`, and no extent along the others."""
    rest = tuple(axis for axis in axes if axis not in own)
    return len(rest) + len(own) == len(axes) and len(rest) > 0 and _is_broadcast(step, index, rest)


def _goes_along(step: Step, index: int, own: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether the channels of an input, on `own` axes of the output, can be followed to `axes`."""
    return own == axes or _is_broadcast(step, index, axes) or _is_spread(step, index, own, axes)


def _spread(values: Array, rank: int, target: Channels) -> Operand:
    """A constant operand, channel by channel: constant where it holds one number."""
    if len(target.axes) == 1 and values.size == len(target) and _axis_of(values.shape) == target.axes[0] - rank:
        flat = values.astype(np.float64).ravel()  # one number a channel, as of gates
        finite = np.isfinite(flat)
        return Operand(flat == flat, flat, flat >= 0, None if all_of(finite) else finite)
    full = values.reshape((1,) * (rank - values.ndim) + values.shape)
    moved = np.moveaxis(full, target.axes, range(len(target.axes)))
    flat = moved.reshape(*moved.shape[: len(target.axes)], -1).astype(np.float64)
    low, high, known = flat.min(axis=-1), flat.max(axis=-1), np.isfinite(flat).all(axis=-1)
    spread = (np.broadcast_to(facts, target.dims).reshape(-1).copy() for facts in (low == high, low, low >= 0, known))
    return Operand(*spread)
