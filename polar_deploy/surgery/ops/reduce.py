"""Reductions: over space each channel is by itself; over the channels, those that make no difference may go.

Zero adds nothing to a sum, and a channel that is known to be below another one is not the maximum. A mean counts its
channels, so all of them stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.dtype_limits import fits, is_half
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator, Retained
from polar_deploy.surgery.ops.across import Span

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step

    Compute = Callable[[Floats, int], Floats]  # [channels, cells] numbers, how often each one occurs -> [cells]


class Reduce(Operator[Span]):
    """Handler of a reduction.

    Args:
        compute: the reduction on numbers.
        reason: why channels stay that it reduces over.
        neutral: the number that makes no difference; None: there is none.
        nonnegative: whether no result is below zero; None: where the input is not.
        can_be_nonfinite: see `Operator`.
        squares: whether it computes squares, which overflow in half precision.
    """

    def __init__(
        self,
        compute: Compute,
        reason: str,
        *,
        neutral: float | None = None,
        nonnegative: bool | None = None,
        can_be_nonfinite: bool = False,
        squares: bool = False,
    ) -> None:
        self.compute = compute
        self.reason = reason
        self.neutral = neutral
        self.nonnegative = nonnegative
        self.can_be_nonfinite = can_be_nonfinite or squares
        self.squares = squares

    def axes(self, step: Step, rank: int) -> set[int]:
        """The axes that go: an attribute, since opset 13 or 18 an input; all of them where none are named."""
        given = step.parameter(1, "list of axes").ravel().tolist() if step.has(1) else step.node.attrs.get("axes", [])
        if given:
            return {axis % rank for axis in given}
        if not step.node.attrs.get("noop_with_empty_axes", 0):
            return set(range(rank))
        if self.compute(np.array([[-2.0]]), 1) != -2:
            raise Unsupported("it reduces over no axis")  # runtimes differ on whether it then squares, or does nothing
        return set()

    def couple(self, step: Step[Span]) -> None:
        source = step.require()
        axes = self.axes(step, step.rank())
        step.plan = Span.along(step, axes)
        rest = [axis for axis in source.axes if axis not in axes]
        if step.node.attrs.get("keepdims", 1):
            out = rest or [source.axes[0]]  # one channel where all were joined
        else:
            out = [axis - sum(removed < axis for removed in axes) for axis in rest]  # none where all were joined
        if out:
            target = step.create(tuple(out))
            step.link(source, target, np.arange(len(source)), step.plan.cell, coupled=bool(rest))

    def constants(self, step: Step[Span]) -> None:
        target, source, found = step.facts.of(step.made[0]), step.require(), self._span(step)
        if target is None:
            return
        if found.crosses and step.facts.after_cut:  # what the cut leaves of a cell is not known yet
            value, nonnegative = np.full(len(target), np.nan), np.zeros(len(target), bool)
        else:
            value = self.result(step, found, source)
            nonnegative = self.is_nonnegative(source.nonnegative[found.members])
        target.constant = fits(value, step.graph.dtype(step.made[0]))
        target.value = np.where(target.constant, value, 0.0)
        target.nonnegative = np.where(target.constant, target.value >= 0, nonnegative)

    def result(self, step: Step, found: Span, source: Channels) -> Floats:
        """[cells] what comes out, NaN where that is not known."""
        value = found.evaluate(lambda repeats: self.apply(step, source.value[found.members], repeats))
        return np.where(source.constant[found.members].all(axis=0), value, np.nan)

    def apply(self, step: Step, values: Floats, repeats: int) -> Floats:
        """The reduction on numbers."""
        return self.compute(values, repeats)

    def is_nonnegative(self, members: Bools) -> Bools:
        """[cells] where no result is below zero, from where the channels [channels, cells] are not."""
        every = np.asarray(members.all(axis=0))
        return every if self.nonnegative is None else np.full_like(every, self.nonnegative)

    def spare(self, step: Step, found: Span, source: Channels) -> Bools:
        """[channels] that make no difference to the result."""
        return source.constant & np.equal(source.value, np.nan if self.neutral is None else self.neutral)

    def need(self, step: Step[Span]) -> None:
        target, source, found = step.facts.of(step.made[0]), step.require(), self._span(step)
        wanted = np.ones(found.members.shape[1], bool) if target is None else target.needed
        read = wanted[found.cell]
        if found.crosses:
            found.release(source, read & self.spare(step, found, source))
            source.notes.append(step.note(self.reason, read & ~found.spare))
        elif target is not None and (lost := target.needed & source.constant & ~target.constant).any():
            where = "a number of positions that is not fixed"
            source.notes.append(step.note(f"the constant {source.value[lost][0]:.6g} meets {where}", lost))
        source.needed |= read & ~found.spare

    def retain(self, step: Step[Span]) -> list[Retained]:
        source = step.require()
        if step.facts.of(step.made[0]) is not None or not source.is_removed:
            return super().retain(step)
        return [Retained(source, np.zeros(1, np.int64), "an operator must keep one input channel")]

    def nonfinite_risk(self, step: Step) -> Bools:
        risk = is_half(step.graph.dtype(step.made[0])) if self.squares else self.can_be_nonfinite
        return np.full(len(step.output), risk)

    def must_keep_values(self, step: Step[Span]) -> list[tuple[Channels, Bools]]:
        return [*super().must_keep_values(step), *self._span(step).disturbed(step.require())]

    def _span(self, step: Step[Span]) -> Span:
        found: Span = step.plan
        return found


class Product(Reduce):
    """ReduceProd: one factor of zero is enough."""

    def result(self, step: Step, found: Span, source: Channels) -> Floats:
        zero = (source.constant & (source.value == 0))[found.members].any(axis=0)
        return np.where(zero, 0.0, super().result(step, found, source))


class Extremum(Reduce):
    """ReduceMax and ReduceMin: of the channels that are constant, those that another one is beyond may go.

    Args:
        sign: 1 for the maximum, -1 for the minimum.
    """

    def __init__(self, compute: Compute, sign: int) -> None:
        super().__init__(compute, "any of its channels may be the one")
        self.sign = sign

    def result(self, step: Step, found: Span, source: Channels) -> Floats:
        value = super().result(step, found, source)
        if self.sign > 0:
            return value
        zero = (source.constant & (source.value == 0))[found.members].any(axis=0)
        return np.where(zero & source.nonnegative[found.members].all(axis=0), 0.0, value)

    def is_nonnegative(self, members: Bools) -> Bools:
        return np.asarray(members.any(axis=0) if self.sign > 0 else members.all(axis=0))

    def spare(self, step: Step, found: Span, source: Channels) -> Bools:
        constant = source.constant[found.members]
        known = self.sign * source.value[found.members]
        floor = np.where(source.nonnegative[found.members] & (self.sign > 0), 0.0, -np.inf)
        bound = np.where(constant, known, floor)  # what each channel is beyond, at any rate
        leader = np.lexsort((~constant, bound), axis=0)[-1:]
        below = constant & (known <= np.take_along_axis(bound, leader, axis=0))
        np.put_along_axis(below, leader, False, axis=0)
        spare = np.zeros(len(source), bool)
        spare[found.members] = below
        return spare


class ArgExtremum(Reduce):
    """ArgMax and ArgMin along one axis: where it is zero all over, the first or the last index."""

    def axes(self, step: Step, rank: int) -> set[int]:
        return {step.node.attrs.get("axis", 0) % rank}

    def apply(self, step: Step, values: Floats, repeats: int) -> Floats:
        index = repeats - 1 if step.node.attrs.get("select_last_index", 0) else 0
        one = np.where(values == 0, float(index), np.nan)[0]  # other numbers may differ in their last digit
        return one if len(values) == 1 else np.full_like(one, np.nan)


ADDS = "it adds up all channels"
HANDLERS: dict[str, Operator] = {
    "ReduceSum": Reduce(lambda x, n: n * x.sum(axis=0), ADDS, neutral=0.0),
    "ReduceL1": Reduce(lambda x, n: n * np.abs(x).sum(axis=0), ADDS, neutral=0.0, nonnegative=True),
    "ReduceSumSquare": Reduce(
        lambda x, n: n * np.square(x).sum(axis=0), ADDS, neutral=0.0, nonnegative=True, squares=True
    ),
    "ReduceL2": Reduce(
        lambda x, n: np.sqrt(n * np.square(x).sum(axis=0)), ADDS, neutral=0.0, nonnegative=True, squares=True
    ),
    "ReduceLogSum": Reduce(
        lambda x, n: np.log(n * x.sum(axis=0)), ADDS, neutral=0.0, nonnegative=False, can_be_nonfinite=True
    ),
    "ReduceLogSumExp": Reduce(
        lambda x, n: np.log(n) + np.logaddexp.reduce(x, axis=0),
        "it adds up the exponentials of all channels, and that of zero is one",
        nonnegative=False,
    ),
    "ReduceProd": Product(
        lambda x, n: np.prod(x, axis=0) ** n, "it multiplies all channels", neutral=1.0, can_be_nonfinite=True
    ),
    "ReduceMean": Reduce(lambda x, n: x.mean(axis=0), "it divides by the number of channels"),
    "ReduceMax": Extremum(lambda x, n: x.max(axis=0), 1),
    "ReduceMin": Extremum(lambda x, n: x.min(axis=0), -1),
    **dict.fromkeys(("ArgMax", "ArgMin"), ArgExtremum(lambda x, n: x[0], "it numbers the channels", nonnegative=True)),
}
