"""Gather, GatherElements, GatherND, ReverseSequence: channels are picked by constant indices, or pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.facts import Ints, Unsupported
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.ops.slicing import along, by_channel, only_axis, renumbered

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Step


class Gather(Operator[Ints | None]):
    """Gather: output channel i is input channel indices[i]. Of a constant table, the columns are the channels.

    The plan is the indices as numbers of input channels; None where they pick something else.
    """

    def couple(self, step: Step[Ints | None]) -> None:
        rank, added = step.rank(), step.rank(1) - 1
        axis = step.node.attrs.get("axis", 0) % rank
        if step.constant(0) is not None:
            if rank != 2 or axis:
                raise Unsupported("what it picks from is no table")
            step.create((added + 1,))
        elif axis in step.require().axes:
            indices = step.parameter(1, "list of indices")
            if len(step.require().axes) > 1:
                step.handler = ALONG_ONE
                step.handler.couple(step)
            else:
                self.pick(step, axis, indices)
        else:
            step.carry(tuple(at + added if at > axis else at for at in step.require().axes))

    def pick(self, step: Step[Ints | None], axis: int, indices: Ints) -> None:
        """Couples where the indices pick channels; several axes of indices are several axes of channels."""
        source = step.require()
        only_axis(source)
        step.plan = picked = indices % len(source)
        if not indices.ndim:
            self._leave(step)
            return
        target = step.create(tuple(range(axis, axis + indices.ndim)))
        step.link(source, target, picked.ravel(), np.arange(len(target)), coupled=False)
        rows = np.arange(len(target)).reshape(-1, target.dims[-1])
        for row in rows[1:]:
            step.tie(target, rows[0], row)

    def _leave(self, step: Step) -> None:
        """One channel without an axis of its own: another axis counts as the channels', and all of that stays."""
        shape = step.graph.shape(step.made[0]) or ()
        if len(shape) > 1 and isinstance(shape[1], int):
            step.create((1,)).pin(step.note("it picks one channel"))

    def constants(self, step: Step[Ints | None]) -> None:
        table, target = step.constant(0), next(iter(step.outputs), None)
        if table is not None and target is not None:
            target.constant[:], target.value[:], target.nonnegative[:] = by_channel(table, (1,))
            return
        super().constants(step)
        for link in step.links if step.plan is not None and step.facts.after_cut else ():
            there = link.source.needed[link.out_of]  # what is not may go, and another channel stands in for it
            link.target.constant &= there
            link.target.nonnegative &= there

    def need(self, step: Step[Ints | None]) -> None:
        super().need(step)
        if step.plan is not None and not step.links:
            step.require().needed[step.plan] = True
        if step.inputs[1] is not None:
            step.inputs[1].pin(step.note("it picks by what they hold"))

    def slice(self, step: Step[Ints | None]) -> None:
        table = step.constant(0)
        if table is not None:
            if not step.output.kept.all():
                step.graph.set_constant(step.node, 0, table[:, step.output.kept])
        elif step.plan is not None:
            self._renumber(step, step.plan, step.parameter(1, "list of indices"))

    def _renumber(self, step: Step, picked: Ints, indices: Ints) -> None:
        """Rewrites the indices. One that nobody needs may have lost its channel: the first one stands in for it."""
        source = step.require()
        left = np.where(source.kept[picked], (np.cumsum(source.kept) - 1)[picked], 0)
        if step.links:
            left = left[np.ix_(*(step.output.keep(axis) for axis in step.output.axes))]
            if np.array_equal(left, np.arange(source.kept.sum())) and step.graph.bypass(step.node):
                return
        if not (source.kept.all() and left.size == picked.size):
            left = left.reshape((*left.shape, *indices.shape[picked.ndim :]))
            step.graph.set_constant(step.node, 1, left.astype(indices.dtype))


class GatherAlongOne(Operator[int]):
    """Gather along one of several axes of channels: queries, keys or values of a layer that makes all three of them.

    The plan is the axis.
    """

    def couple(self, step: Step[int]) -> None:
        """Couples a single index, whose axis goes, or a list of different ones."""
        source, indices = step.require(), step.parameter(1, "list of indices")
        axis = step.node.attrs.get("axis", 0) % step.rank()
        picked = indices.ravel() % source.dims[source.axes.index(axis)]
        if indices.ndim > 1 or len(np.unique(picked)) < len(picked):
            raise Unsupported("its channels lie on several axes")
        step.plan = axis
        left = [at for at in source.axes if indices.ndim or at != axis]
        target = step.create(tuple(at - (at > axis and not indices.ndim) for at in left))
        step.link(source, target, along(source, axis, picked), every(len(target)))

    def slice(self, step: Step[int]) -> None:
        source, axis, indices = step.require(), step.plan, step.parameter(1, "list of indices")
        dims = source.dims[source.axes.index(axis)]
        picked = indices % dims if not indices.ndim else (indices % dims)[step.output.keep(axis)]
        left = renumbered(source, axis)[picked]
        if not np.array_equal(left, indices):
            step.graph.set_constant(step.node, 1, left.astype(indices.dtype))


class GatherND(Gather):
    """GatherND: where its tuples are of one index along the channels it is a Gather, other tuples let channels pass."""

    def couple(self, step: Step[Ints | None]) -> None:
        source, shape, batch = step.require(), step.graph.shape(step.original[1]), step.node.attrs.get("batch_dims", 0)
        length = shape[-1] if shape else None
        if shape is None or not isinstance(length, int):
            raise Unsupported("the shape of its indices is not known")
        if source.axes == (batch,) and (batch, length) == (0, 1):
            self.pick(step, 0, step.parameter(1, "list of indices")[..., 0])
        elif min(source.axes) < batch + length:
            raise Unsupported("its indices pick channels together with positions")
        else:
            step.carry(tuple(axis - batch - length + len(shape) - 1 for axis in source.axes))


class GatherElements(Operator):
    """GatherElements along another axis than that of the channels, with an index for each of the first channels."""

    def couple(self, step: Step) -> None:
        source, picking = step.require(), step.inputs[1]
        axis = only_axis(source)
        if step.node.attrs.get("axis", 0) % step.rank() == axis:
            raise Unsupported("its indices pick a channel for each position")
        target = step.create((axis,))
        numbers = every(len(target))
        step.link(source, target, numbers, numbers)
        if step.constant(1) is None:
            if picking is None or picking.axes != target.axes or len(picking) != len(target):
                raise Unsupported("the channels of its indices are not known")
            step.link(picking, target, numbers, numbers)

    def constants(self, step: Step) -> None:
        """Whatever the indices are, a constant comes out as it goes in."""
        source, target = step.require(), step.output
        for facts, given in (
            (target.constant, source.constant),
            (target.value, source.value),
            (target.nonnegative, source.nonnegative),
        ):
            facts[:] = given[: len(target)]

    def slice(self, step: Step) -> None:
        indices, target = step.constant(1), step.output
        if indices is not None and not target.kept.all():
            step.graph.set_constant(step.node, 1, indices.take(np.flatnonzero(target.kept), axis=target.axes[0]))


class ReverseSequence(Operator):
    """ReverseSequence along other axes than the channels', for lengths that do not differ from channel to channel."""

    def couple(self, step: Step) -> None:
        axes = {step.node.attrs.get("time_axis", 0), step.node.attrs.get("batch_axis", 1)}
        if axes.intersection(step.require().axes):
            raise Unsupported("it reverses the channels, or each of them by a length of its own")
        step.carry()


ALONG_ONE: Operator = GatherAlongOne()
HANDLERS: dict[str, Operator] = {
    "Gather": Gather(),
    "GatherND": GatherND(),
    "GatherElements": GatherElements(),
    "ReverseSequence": ReverseSequence(),
}
