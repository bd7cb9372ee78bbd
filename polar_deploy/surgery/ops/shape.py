"""Reshape, Flatten, Squeeze, Unsqueeze and Transpose: channels are followed to where they lie afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Channels, Ints, Step
    from polar_deploy.surgery.model import Shape


class Regroup(Operator):
    """Any operator that keeps the order of the elements. Flatten before a Gemm gives each channel several columns."""

    def couple(self, step: Step) -> None:
        before, after = step.graph.shape(step.original[0]), step.graph.shape(step.made[0])
        if before is None or after is None:
            raise Wall("its shape is not known")
        source = step.require()
        axes, out_of = _follow(before, after, source)
        target = step.create(axes)
        step.link(source, target, out_of, np.arange(len(target)))
        if len(axes) > 1:
            _tie_rows(step, target)


class Reshape(Regroup):
    """Reshape to a constant shape, or to one that is known but for one dimension."""

    def couple(self, step: Step) -> None:
        shape = step.graph.shape(step.made[0]) or ()
        if step.constant(1) is None and sum(not isinstance(dim, int) for dim in shape) > 1:
            raise Wall("its shape is computed")
        super().couple(step)

    def slice(self, step: Step) -> None:
        target = step.output
        if target.kept.all():
            return
        asked = step.constant(1)
        if asked is None:
            shape = step.graph.shape(step.made[0]) or ()
            asked = np.array([dim if isinstance(dim, int) else -1 for dim in shape], np.int64)
        new = asked.copy()
        for axis in target.axes:
            if new[axis] > 0:
                new[axis] = len(target.keep(axis))
        step.graph.set_constant(step.node, 1, new)


class Squeeze(Regroup):
    """Squeeze of named axes."""

    def couple(self, step: Step) -> None:
        if not step.has(1) and "axes" not in step.node.attrs:
            raise Wall("it squeezes whatever has size 1")
        super().couple(step)


class Transpose(Operator):
    """Transpose: the channels' axes move."""

    def couple(self, step: Step) -> None:
        source = step.require()
        rank = len(step.graph.shape(step.original[0]) or ())
        order = step.node.attrs.get("perm") or list(range(rank))[::-1]
        moved = [order.index(axis) for axis in source.axes]
        target = step.create(tuple(sorted(moved)))
        numbers = np.arange(len(source)).reshape(source.dims).transpose(np.argsort(moved)).ravel()
        step.link(source, target, numbers, np.arange(len(target)))


def _follow(before: Shape, after: Shape, source: Channels) -> tuple[tuple[int, ...], Ints]:
    """Where channels lie after a reshape: their axes, and the source channel of every channel there."""
    first, last = min(source.axes), max(source.axes)
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head] is not None and head != first:
        head += 1
    tail = 0
    while (
        tail < min(len(before), len(after)) - head
        and before[-1 - tail] == after[-1 - tail] not in (None, 1)
        and len(before) - 1 - tail != last
    ):
        tail += 1
    inner, outer = before[head : len(before) - tail], after[head : len(after) - tail]
    if inner[: len(source.axes)] == outer[: len(source.axes)] == source.dims and source.axes[0] == head:
        return source.axes, np.arange(len(source))  # the axes themselves stay; whatever is behind them is regrouped
    count = len(source.axes)
    if inner[-count:] == outer[-count:] == source.dims and source.axes[0] == head + len(inner) - count:
        return tuple(range(head + len(outer) - count, head + len(outer))), np.arange(len(source))
    sizes = [dim for dim in (*inner, *outer) if isinstance(dim, int)]
    if len(sizes) != len(inner) + len(outer):
        raise Wall("it joins or splits the channels with a dimension that is not fixed")
    shape = [size if head + i in source.axes else 1 for i, size in enumerate(sizes[: len(inner)])]
    numbers = np.arange(len(source)).reshape(shape)
    spread = np.broadcast_to(numbers, sizes[: len(inner)]).reshape(sizes[len(inner) :])
    axes = [axis for axis in range(spread.ndim) if (spread != spread.take([0], axis=axis)).any()]
    axes = axes or [0]  # one channel: all that it becomes goes with it
    corner = tuple(slice(None) if axis in axes else 0 for axis in range(spread.ndim))
    return tuple(head + axis for axis in axes), spread[corner].ravel()


def _tie_rows(step: Step, target: Channels) -> None:
    """Channels on several axes go position by position along the last one, so that what is left is a block."""
    numbers = np.arange(len(target)).reshape(-1, target.dims[-1])
    for row in numbers[1:]:
        step.tie(target, numbers[0], row)


HANDLERS: dict[str, Operator] = {
    "Reshape": Reshape(),
    "Transpose": Transpose(),
    "Squeeze": Squeeze(),
    **dict.fromkeys(("Flatten", "Unsqueeze"), Regroup()),
}
