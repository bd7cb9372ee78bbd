"""Operators that compute each result from all elements along some axes: softmax, cumulative sums, sorting, LRN.

Where channels lie on one of these axes, a result depends on several channels: all of them stay, except where a channel
that is known to be zero makes no difference. Where they do not, each channel is by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.dtype_limits import fits
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator, PlanT
from polar_deploy.surgery.shape_origin import is_fixed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from polar_deploy.surgery.facts import Bools, Channels, Floats, Ints, Step

SINGLE_AXIS_SOFTMAX = 13  # opset; before, Softmax went over all axes from `axis` on


@dataclass(eq=False)
class Span:
    """Which elements an operator computes a result from. A *cell* is a set of channels that it computes with together.

    cell: [channels] the cell of each channel.
    members: [channels a cell, cells] the channels of each cell.
    repeats: how many elements each of these channels brings in; None: that depends on the input.
    spare: [channels] known to be `held`, which makes no difference to the others' results, so that they may go; where
        they stay they must hold that number.
    """

    cell: Ints
    members: Ints
    repeats: int | None
    spare: Bools = field(init=False)
    held: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.spare, self.held = np.zeros(len(self.cell), bool), np.zeros(len(self.cell))

    @classmethod
    def along(cls, step: Step, axes: Iterable[int]) -> Span:
        """What an operator works on that computes along `axes` (none of them negative) of its first input."""
        source, shape, axes = step.require(), step.graph.shape(step.original[0]) or (), set(axes)
        joined = [position for position, axis in enumerate(source.axes) if axis in axes]
        cells = [1 if position in joined else size for position, size in enumerate(source.dims)]
        cell = np.broadcast_to(np.arange(math.prod(cells)).reshape(cells), source.dims).ravel()
        channels = np.arange(len(source)).reshape(source.dims)
        members = np.moveaxis(channels, joined, range(len(joined))).reshape(-1, math.prod(cells))
        others = [shape[axis] for axis in axes.difference(source.axes)]
        sizes = [size for size in others if isinstance(size, int)]
        known = len(sizes) == len(others) and (not others or is_fixed(step.graph))
        return cls(cell, members, math.prod(sizes) if known else None)

    @property
    def crosses(self) -> bool:
        """Whether a result depends on several channels."""
        return len(self.members) > 1

    def evaluate(self, compute: Callable[[int], Floats]) -> Floats:
        """`compute`, a function of `repeats`; NaN where that is not known and makes a difference."""
        with np.errstate(all="ignore"):
            one, other = (np.asarray(compute(n), np.float64) for n in (self.repeats or 1, self.repeats or 2))
        return np.where(one == other, one, np.nan)

    def release(self, source: Channels, spare: Bools) -> None:
        """Says which channels are spare, with what they hold."""
        self.spare, self.held = spare & self.crosses, source.value.copy()

    def disturbed(self, source: Channels) -> list[tuple[Channels, Bools]]:
        """Spare channels that stay and would hold something else after the cut: see `Operator.must_keep_values`."""
        same = source.constant & (source.value == self.held)
        which = self.spare & source.kept & ~source.needed & ~same
        return [(source, which)] if which.any() else []


class AlongAxes(Operator[PlanT]):
    """Handler of an operator whose output has the shape of its input.

    Args:
        reason: why channels stay that it works across.
        uniform: what comes out where one number comes in all over: from the numbers and how many there are. Not for
            functions that small differences decide about: runtimes round the same number differently.
        zero_stays: whether zero comes out as zero, whatever the others are.
        ignores_zero: whether a channel that is zero makes no difference to others.
        nonnegative: whether no result is below zero.
    """

    def __init__(
        self,
        reason: str,
        uniform: Callable[[Floats, int], Floats],
        *,
        zero_stays: bool = False,
        ignores_zero: bool = False,
        nonnegative: bool = False,
    ) -> None:
        self.reason = reason
        self.uniform = uniform
        self.zero_stays = zero_stays
        self.ignores_zero = ignores_zero
        self.nonnegative = nonnegative

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        """The axes that it computes along."""
        return [step.node.attrs.get("axis", -1) % rank]

    def span(self, step: Step[PlanT]) -> Span:
        """What `couple` found out."""
        raise NotImplementedError

    def known(self, step: Step[PlanT]) -> Floats:
        """[channels] what comes out, NaN where that is not known."""
        source, span = step.require(), self.span(step)
        values, constant = source.value[span.members], source.constant[span.members]
        same = constant.all(axis=0) & (values == values[0]).all(axis=0)
        if step.facts.after_cut and span.crosses:  # what the cut leaves of a cell is not known yet
            same[:] = False
        found = span.evaluate(lambda repeats: self.uniform(values[0], repeats * len(span.members)))
        result: Floats = np.where(same, found, np.nan)[span.cell]
        if self.zero_stays:
            result[source.constant & (source.value == 0)] = 0.0
        return result

    def constants(self, step: Step[PlanT]) -> None:
        target, value = step.output, self.known(step)
        target.constant = fits(value, step.graph.dtype(step.made[0]))
        target.value = np.where(target.constant, value, 0.0)
        target.nonnegative = np.where(target.constant, target.value >= 0, self.nonnegative)

    def depends(self, step: Step[PlanT]) -> Bools:
        """[channels] results that are needed and depend on the input."""
        return step.output.needed

    def need(self, step: Step[PlanT]) -> None:
        source, span, own = step.require(), self.span(step), self.depends(step)
        span.release(source, source.constant & (source.value == 0) & self.ignores_zero & ~own)
        wanted = np.zeros(span.members.shape[1], bool)
        wanted[span.cell[own]] = True
        needed = wanted[span.cell] & ~span.spare
        source.needed |= needed
        if span.crosses:
            source.notes.append(step.note(self.reason, needed))

    def must_keep_values(self, step: Step[PlanT]) -> list[tuple[Channels, Bools]]:
        return [*super().must_keep_values(step), *self.span(step).disturbed(step.require())]


class Spanning(AlongAxes[Span]):
    """Handler of such an operator without parameters."""

    def couple(self, step: Step[Span]) -> None:
        step.require()
        step.plan = Span.along(step, self.axes(step, step.rank()))
        step.carry()

    def span(self, step: Step[Span]) -> Span:
        return step.plan


class Softmax(Spanning):
    """Softmax, LogSoftmax and Hardmax."""

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        if step.graph.opset < SINGLE_AXIS_SOFTMAX:
            return range(step.node.attrs.get("axis", 1) % rank, rank)
        return super().axes(step, rank)


class CumSum(Spanning):
    """Cumulative sums along one axis."""

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        return [int(step.parameter(1, "axis").reshape(())) % rank]


class LRN(Spanning):
    """`x / (bias + sum of squares over neighbouring channels)`: a channel that goes would move the others."""

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        if step.node.attrs.get("bias", 1.0) <= 0:
            raise Unsupported("it divides by what may be zero")
        return [1]


class TopK(Operator):
    """TopK along another axis than the channels'. Outputs: values, and where they were."""

    def couple(self, step: Step) -> None:
        source = step.require()
        if step.node.attrs.get("axis", -1) % step.rank() in source.axes:
            raise Unsupported("it sorts the channels")
        step.carry()
        if len(step.made) > 1 and step.made[1].name:
            numbers = every(len(source))
            step.link(source, step.create(source.axes, output=1), numbers, numbers)

    def constants(self, step: Step) -> None:
        super().constants(step)
        for channels in step.outputs[1:]:
            channels.constant[:], channels.value[:], channels.nonnegative[:] = False, 0.0, True


def only_zero(values: Floats, _: int) -> Floats:
    """Zero comes out as zero; of anything else nothing is known."""
    return np.where(values == 0, 0.0, np.nan)


def nothing(values: Floats, _: int) -> Floats:
    """Nothing is known of what comes out."""
    return np.full_like(values, np.nan)


HANDLERS: dict[str, Operator] = {
    "Softmax": Softmax("its sum runs over all channels", lambda x, n: np.full_like(x, 1 / n), nonnegative=True),
    "LogSoftmax": Softmax("its sum runs over all channels", lambda x, n: np.full_like(x, -math.log(n))),
    "Hardmax": Softmax("it compares all channels", nothing, nonnegative=True),
    "CumSum": CumSum("its sums run over the channels", only_zero, ignores_zero=True),
    "LpNormalization": Spanning("its norm runs over all channels", only_zero, zero_stays=True, ignores_zero=True),
    "LRN": LRN("its window runs over neighbouring channels", only_zero, zero_stays=True),
    "TopK": TopK(),
}
