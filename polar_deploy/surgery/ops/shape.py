"""Reshape, Flatten, Squeeze, Unsqueeze and Transpose: channels are followed to where they lie afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from polar_deploy.surgery import reshape_channels
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator, PlanT, Retained
from polar_deploy.surgery.ops.extent import ShapeDriven, ShapeInput
from polar_deploy.surgery.quantization import is_stored
from polar_deploy.surgery.shape_origin import Size, is_fixed, trace

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Channels, Facts, Ints, Step
    from polar_deploy.surgery.ir import Node


class Moving(Operator[PlanT]):
    """Any operator that only moves elements; one channel of the output may hold elements of several of the input."""

    def constants(self, step: Step[PlanT]) -> None:
        for link in step.links:
            source, target = link.source, link.target
            target.value[link.into] = source.value[link.out_of]
            target.constant[:] = target.nonnegative[:] = True
            same = source.constant[link.out_of] & (source.value[link.out_of] == target.value[link.into])
            np.logical_and.at(target.constant, link.into, same)
            np.logical_and.at(target.nonnegative, link.into, source.nonnegative[link.out_of])


class Regroup(Moving[PlanT]):
    """Any operator that keeps the order of the elements. Flatten before a Gemm gives each channel several columns."""

    def couple(self, step: Step[PlanT]) -> None:
        before, after = step.graph.shape(step.original[0]), step.graph.shape(step.made[0])
        if before is None or after is None:
            raise Unsupported("its shape is not known")
        source, result = step.require(), step.node.outputs[0]
        if len(source.axes) > 1 and (axes := _ones_moved(step, source)) is not None:
            step.carry(axes)
            return
        heads = reshape_channels.feeds_heads(step.graph, result)

        def choose(spread: Array, among: range) -> int | None:
            return reshape_channels.cut_axis(step.graph, result, _origins(step.facts, source)[spread], among)

        places = reshape_channels.apart(before, after, source.axes) if heads else None
        if places is None and len(source.axes) > 1:
            places = reshape_channels.each(before, after, source.axes, apart=heads)
        if places is None:
            places, heads = reshape_channels.follow(before, after, source.axes, choose), False
        target = step.create(places.axes)
        step.link(source, target, places.out_of, places.into)
        if places.split and not heads:  # position by position along the last axis, so that what is left is a block
            rows = np.arange(len(target)).reshape(-1, target.dims[-1])
            for row in rows[1:]:
                step.tie(target, rows[0], row)


def _ones_moved(step: Step, source: Channels) -> tuple[int, ...] | None:
    """Where several axes of channels lie once axes of size 1 have come or gone; None where it does something else."""
    if step.node.op not in ("Squeeze", "Unsqueeze"):
        return None
    told = step.constant(1) if step.has(1) else step.node.attrs.get("axes")
    if told is None:
        return None
    rank = len(step.graph.shape(step.original[0] if step.node.op == "Squeeze" else step.made[0]) or ())
    ones = {int(axis) % rank for axis in np.ravel(told)}
    others = [axis for axis in range(rank) if axis not in ones]
    if step.node.op == "Unsqueeze":
        return tuple(others[axis] for axis in source.axes)
    return tuple(others.index(axis) for axis in source.axes if axis in others) or None


def _origins(facts: Facts, channels: Channels) -> Ints:
    """Which channels go together because they were one before, as behind a Flatten: numbers, the same for those."""
    numbers = np.arange(len(channels))
    for step in reversed(facts.steps):
        if not any(tensor.name == channels.tensor for tensor in step.made):
            continue
        links = [link for link in step.links if link.target is channels and link.coupled]
        if len(links) != 1 or len(links[0].into) != len(channels):
            break
        source_of = np.empty(len(channels), np.int64)
        source_of[links[0].into] = links[0].out_of
        numbers, channels = source_of[numbers], links[0].source
        if len(np.unique(numbers)) < len(numbers):
            break
    return numbers


@dataclass
class ReshapeInput(ShapeInput):
    """Of a Reshape. edit: the number (input, position) of the Concat that makes the shape which is to become -1."""

    edit: tuple[int, int] | None = None


class Reshape(ShapeDriven[ReshapeInput], Regroup[ReshapeInput]):
    """Reshape to a constant shape, or to a computed one that a constant can stand for or that goes with the cut."""

    def couple(self, step: Step[ReshapeInput]) -> None:
        super().couple(step)
        step.plan = ReshapeInput()
        if step.constant(1) is not None:
            return
        rank = len(step.graph.shape(step.made[0]) or ())
        sizes = trace(step.facts, step.original[1])
        if sizes is None or len(sizes) != rank:
            sizes = [Size()] * rank
        step.plan.written = self._written(step, sizes)
        if step.plan.written is None:
            self._go_along(step, sizes)

    def _written(self, step: Step, sizes: list[Size]) -> Ints | None:
        """The shape as a constant with at most one -1, and 0 for leading dimensions that stay; None: there is none."""
        before, after = step.graph.shape(step.original[0]) or (), step.graph.shape(step.made[0]) or ()
        fixed = (*range(len(after)),) if is_fixed(step.graph) else step.output.axes
        head = reshape_channels.same_head(before, after)
        new = [
            dim if isinstance(dim, int) and (axis in fixed or size.value == dim) else 0 if axis < head else -1
            for axis, (dim, size) in enumerate(zip(after, sizes, strict=True))
        ]
        return np.array(new, np.int64) if new.count(-1) < 2 else None

    def _go_along(self, step: Step[ReshapeInput], sizes: list[Size]) -> None:
        """A shape that stays computed: the axis that the cut goes along has to get its size from somewhere."""
        (*others, axis), size = step.output.axes, sizes[step.output.axes[-1]]
        if others and not step.ties:
            raise Unsupported("its shape is computed, and its channels lie on several axes")
        if size.value == -1 or (size.value == 0 and step.output.axes == step.require().axes and not _zeros(step)):
            return
        step.plan.edit = _place(step, axis)
        if step.plan.edit is None:
            self.follow(step, step.output, axis, size)
            step.plan.followed = frozenset((axis,))

    def need(self, step: Step[ReshapeInput]) -> None:
        super().need(step)
        if step.plan.edit is not None:
            concat, (index, _) = step.node.inputs[1].inputs[0], step.plan.edit
            if not step.graph.is_constant(concat.inputs[index]):
                maker = next(maker for maker in step.facts.steps if maker.node is concat)
                maker.replaced[index] = np.array([-1.0])

    def slice(self, step: Step[ReshapeInput]) -> None:
        target, plan, asked = step.output, step.plan, step.constant(1)
        if plan.written is not None:
            self._write(step, plan.written, literal=False)
            if (plan.written == 0).any() and _zeros(step):
                step.graph.set_attribute(step.node, "allowzero", 0)
        elif asked is not None and not target.kept.all():
            self._write(step, asked, literal=_zeros(step))
        elif plan.edit is not None:
            concat, (index, position) = step.node.inputs[1].inputs[0], plan.edit
            held = step.graph.constant(concat, index)
            if held is None or not target.kept.all():
                values = np.zeros(1, np.int64) if held is None else held.copy()
                values[position] = -1
                step.graph.set_constant(concat, index, values)

    def _write(self, step: Step, asked: Ints, *, literal: bool) -> None:
        """Writes the shape after the cut; 0 copies the input's size unless it is meant literally."""
        given, wanted = (
            [len(x.keep(axis)) if axis in x.axes else dim for axis, dim in enumerate(step.graph.shape(tensor) or ())]
            for x, tensor in ((step.require(), step.original[0]), (step.output, step.made[0]))
        )
        new = asked.copy()
        for axis in range(len(new)):
            copied = new[axis] == 0 and not literal
            if (new[axis] > 0 and axis in step.output.axes) or (copied and given[axis] != wanted[axis]):
                new[axis] = cast("int", wanted[axis])  # what is cut, or stands for it, is a number
        step.graph.set_constant(step.node, 1, new)


def _zeros(step: Step) -> bool:
    """Whether a 0 in the shape is meant literally."""
    return bool(step.node.attrs.get("allowzero", 0))


def _place(step: Step, axis: int) -> tuple[int, int] | None:
    """Where the number of channels stands in the Concat that makes a shape: input, and position in that.

    It can be left to be inferred (-1) if nobody but Reshapes with their channels on the same axis reads that shape.
    """
    tensor = step.node.inputs[1]
    concat = tensor.inputs[0] if tensor.inputs else None
    if concat is None or concat.op != "Concat" or not step.graph.is_private(tensor.name):
        return None
    if not all(_agrees(step, reader, axis) for reader in tensor.outputs):
        return None
    found, first = None, 0
    for index, part in enumerate(concat.inputs):
        sizes = trace(step.facts, part)
        if sizes is None or any(size.value == -1 or (size.value == 0 and _zeros(step)) for size in sizes):
            return None
        alone = step.graph.is_constant(part) or (len(sizes) == 1 and step.graph.dtype(part) == np.int64)
        if first <= axis < first + len(sizes) and alone:
            found = index, axis - first
        first += len(sizes)
    return found


def _agrees(step: Step, reader: Node, axis: int) -> bool:
    """Whether `reader` is a Reshape told by the same input that, as far as is known, has its channels on `axis` too."""
    known = step.facts.of(reader.outputs[0]) if reader.outputs else None
    told = reader.op == "Reshape" and reader.inputs[0] is not step.node.inputs[1]
    return told and (known is None or known.axes[-1] == axis)


class Squeeze(Regroup):
    """Squeeze; without a list of axes it takes away whatever has size 1, which the channels must not come to."""

    def couple(self, step: Step) -> None:
        if not self._is_told(step) and len(step.require().axes) > 1:
            raise Unsupported("it squeezes whatever has size 1, and its channels lie on several axes")
        super().couple(step)

    def _is_told(self, step: Step) -> bool:
        return step.has(1) or "axes" in step.node.attrs

    def retain(self, step: Step) -> list[Retained]:
        retained = super().retain(step)
        source = step.require()
        if not self._is_told(step) and not step.output.is_removed and len(source) > 1 == int(source.kept.sum()):
            retained.append(Retained(source, np.flatnonzero(~source.kept)[:1], "it squeezes whatever has size 1"))
        return retained


class Transpose(Operator):
    """Transpose: the channels' axes move. Layers cut the quantised weights that it turns themselves."""

    def couple(self, step: Step) -> None:
        if step.inputs[0] is None and is_stored(step, 0):
            step.facts.open_opaque(step, step.made[0], step.note("it turns a quantised constant"))
            return
        source = step.require()
        rank = len(step.graph.shape(step.original[0]) or ())
        order = step.node.attrs.get("perm") or list(range(rank))[::-1]
        moved = [order.index(axis) for axis in source.axes]
        target = step.create(tuple(sorted(moved)))
        numbers = np.arange(len(source)).reshape(source.dims).transpose(np.argsort(moved)).ravel()
        step.link(source, target, numbers, np.arange(len(target)))

    def through(self, step: Step) -> int | None:
        return 0 if step.outputs and len(step.output.axes) == 1 else None


HANDLERS: dict[str, Operator] = {
    "Reshape": Reshape(),
    "Transpose": Transpose(),
    "Squeeze": Squeeze(),
    **dict.fromkeys(("Flatten", "Unsqueeze"), Regroup()),
}
