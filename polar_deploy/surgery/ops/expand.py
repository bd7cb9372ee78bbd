"""Expand, ConstantOfShape and Tile: what is there is repeated, along other axes or from one channel to many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.ops.extent import ShapeDriven, ShapeInput
from polar_deploy.surgery.ops.slicing import by_channel, only_axis
from polar_deploy.surgery.shape_origin import Size, is_fixed, trace, whole_numbers, write_numbers

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Channels, Step
    from polar_deploy.surgery.sizes import Shape


class Expand(ShapeDriven[ShapeInput]):
    """Expand of a tensor with channels, or of a constant: a token, or a map, for every image of a batch."""

    def held(self, step: Step) -> Array | None:
        """The constant that is repeated; None where a tensor is."""
        return step.constant(0)

    def couple(self, step: Step[ShapeInput]) -> None:
        after, held = step.result_shape(), self.held(step)
        given = held.shape if held is not None else step.graph.shape(step.original[0]) or ()
        before = (*(1,) * (len(after) - len(given)), *given)
        if held is not None:
            target = step.create(_wide(held, before, after))
        else:
            target = self._join(step, step.require(), len(after) - len(given))
        step.plan = ShapeInput()
        if step.constant(self.shape_input_index(step)) is None:
            self._go_along(step, target, before, after)

    def _join(self, step: Step, source: Channels, offset: int) -> Channels:
        target = step.create(tuple(axis + offset for axis in source.axes))
        numbers = every(len(target))
        if source.dims == target.dims:
            step.link(source, target, numbers, numbers)
        elif len(source) == 1:
            step.link(source, target, np.zeros_like(numbers), numbers, coupled=False)
        else:
            raise Unsupported("it repeats the channels")
        return target

    def _go_along(self, step: Step[ShapeInput], target: Channels, before: Shape, after: Shape) -> None:
        """A computed shape: a constant in its place, if it does not depend on the input; else the channels follow."""
        sizes = trace(step.facts, step.original[self.shape_input_index(step)])
        sizes = [Size()] * len(after) if sizes is None or len(sizes) > len(after) else sizes
        offset = len(after) - len(sizes)
        sizes = [Size(1)] * offset + sizes
        fixed = (*range(len(after)),) if is_fixed(step.graph) else target.axes
        new = [
            1
            if dim is not None and dim == before[axis]
            else dim
            if isinstance(dim, int) and (axis in fixed or sizes[axis].value == dim)
            else 0
            for axis, dim in enumerate(after)
        ]
        if 0 not in new:
            step.plan.written = np.array(new, np.int64)
            return
        try:
            for axis in target.axes:
                if new[axis] != 1 or sizes[axis].value != 1:
                    self.follow(step, target, axis, sizes[axis])
            step.plan.followed = frozenset(axis - offset for axis in target.axes)
        except Unsupported as reason:
            if self.held(step) is None:
                raise
            target.pin(step.note(str(reason)))

    def constants(self, step: Step[ShapeInput]) -> None:
        held, target = self.held(step), step.output
        if held is None:
            super().constants(step)
            return
        rank = len(step.graph.shape(step.made[0]) or ())
        full = held.reshape((1,) * (rank - held.ndim) + held.shape)
        target.constant[:], target.value[:], target.nonnegative[:] = by_channel(full, target.axes)

    def slice(self, step: Step[ShapeInput]) -> None:
        target, index, written = step.output, self.shape_input_index(step), step.plan.written
        asked = step.constant(index) if written is None else written
        if asked is not None and (written is not None or not target.kept.all()):
            step.graph.set_constant(step.node, index, _cut_shape(asked, step, target))
        if not target.kept.all():
            self._cut(step, target)

    def _cut(self, step: Step, target: Channels) -> None:
        """Cuts the constant that is repeated."""
        held = step.constant(0)
        if held is not None:
            rank = len(step.graph.shape(step.made[0]) or ())
            for axis in target.axes:
                own = axis - rank + held.ndim
                if own >= 0 and held.shape[own] > 1:
                    step.graph.set_constant(step.node, 0, held.take(target.keep(axis), axis=own))


def _wide(held: Array, shape: Shape, after: Shape) -> tuple[int, ...]:
    """Where the channels of a constant lie that is repeated to the shape `after`: where it has an extent.

    If it has none, or several and one number everywhere: on axis 1, or the last one where the size of that is not
    fixed. Raises Unsupported.
    """
    wide = tuple(axis for axis, dim in enumerate(shape) if dim != 1)
    if len(shape) < 2 or (len(wide) > 1 and not (held == held.ravel()[:1]).all()):
        raise Unsupported("the channels of its input are not known")
    return wide if len(wide) == 1 else ((1,) if isinstance(after[1], int) else (len(after) - 1,))


def _cut_shape(asked: Array, step: Step, target: Channels) -> Array:
    """The shape after the cut; where it says 1, it leaves the size to the input."""
    rank = len(step.graph.shape(step.made[0]) or ())
    new: Array = asked.copy()
    for axis in target.axes:
        at = axis - rank + len(new)
        if at >= 0 and new[at] != 1:
            new[at] = len(target.keep(axis))
    return new


class ConstantOfShape(Expand):
    """ConstantOfShape: the same number everywhere."""

    def shape_input_index(self, step: Step) -> int:
        return 0

    def held(self, step: Step) -> Array | None:
        value = step.node.attrs.get("value")
        return np.zeros((), np.float32) if value is None else np.asarray(value).reshape(())

    def _cut(self, step: Step, target: Channels) -> None:
        """Its one number stays."""


class Tile(Operator[int | None]):
    """Tile: along the channels, copy after copy of all of them."""

    def couple(self, step: Step[int | None]) -> None:
        source, rank = step.require(), step.rank()
        sizes = trace(step.facts, step.original[1])
        if sizes is None or len(sizes) != rank:
            raise Unsupported("how often it repeats is computed")
        times = [sizes[axis].value for axis in source.axes]
        if all(time == 1 for time in times):
            step.carry()
            return
        axis, time = only_axis(source), times[0]
        if not isinstance(time, int) or (len(source) == 1 and whole_numbers(step, 1) is None):
            raise Unsupported("how often it repeats is computed")
        target = step.create(source.axes)
        numbers = every(len(target))
        step.link(source, target, numbers % len(source), numbers, coupled=len(source) > 1)
        step.plan = axis if len(source) == 1 else None

    def need(self, step: Step[int | None]) -> None:
        super().need(step)
        if step.plan is not None and step.constant(1) is None:
            step.replaced[1] = np.array(whole_numbers(step, 1), np.float64)

    def slice(self, step: Step[int | None]) -> None:
        """One channel that becomes many is repeated as often as channels are kept."""
        axis = step.plan
        repeats = whole_numbers(step, 1) if axis is not None else None
        if axis is not None and repeats is not None and (step.replaced or not step.output.kept.all()):
            repeats[axis] = int(step.output.kept.sum())
            write_numbers(step, 1, repeats)


HANDLERS: dict[str, Operator] = {"Expand": Expand(), "ConstantOfShape": ConstantOfShape(), "Tile": Tile()}
