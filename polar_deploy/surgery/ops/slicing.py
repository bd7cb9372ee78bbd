"""Slice, Pad and Concat: channels are left out, added or joined (option-A shortcuts are Slice, Slice, Pad)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.operator import Operator, Retained

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Channels, Step


def _only_axis(channels: Channels) -> int:
    if len(channels.axes) > 1:
        raise Wall("its channels lie on several axes")
    return channels.axes[0]


class Slice(Operator):
    """Slice with constant bounds; along the channels only without strides."""

    def couple(self, step: Step) -> None:
        source = step.require()
        axis = _only_axis(source)
        rank = len(step.graph.shape(step.original[0]) or ())
        bounds = self._bounds(step)
        axes = [a % rank for a in bounds.get("axes", range(len(bounds["starts"])))]
        if axis not in axes:
            step.carry()
            return
        at = axes.index(axis)
        if bounds.get("steps", [1] * len(axes))[at] != 1:
            raise Wall("it takes every n-th channel")
        out_of = np.arange(len(source))[slice(bounds["starts"][at], bounds["ends"][at])]
        target = step.create(source.axes)
        step.memo = at
        step.link(source, target, out_of, np.arange(len(target)))

    def _bounds(self, step: Step) -> dict[str, list[int]]:
        names = ("starts", "ends", "axes", "steps")
        if not step.has(1):
            return {name: step.node.attrs[name] for name in names if name in step.node.attrs}
        return {name: step.parameter(i, name).tolist() for i, name in enumerate(names, start=1) if step.has(i)}

    def slice(self, step: Step) -> None:
        if step.memo is None or step.require().kept.all():
            return
        first = int(step.links[0].out_of[0])
        start = int(step.require().kept[:first].sum())
        for index, (name, bound) in enumerate((("starts", start), ("ends", start + int(step.output.kept.sum()))), 1):
            values = self._bounds(step)[name]
            values = [*values[: step.memo], bound, *values[step.memo + 1 :]]
            if step.has(1):
                step.graph.set_constant(step.node, index, np.array(values, step.parameter(index, name).dtype))
            else:
                step.graph.set_attribute(step.node, name, values)


class Pad(Operator):
    """Pad with constant widths; added channels hold the pad value."""

    def couple(self, step: Step) -> None:
        source = step.require()
        axis = _only_axis(source)
        rank = len(step.graph.shape(step.original[0]) or ())
        before, after = self._widths(step, rank)
        mode = step.node.attrs.get("mode", "constant")
        if min(before[axis], after[axis]) < 0 or (mode != "constant" and (before[axis] or after[axis])):
            raise Wall(f"it pads the channels by {before[axis]} and {after[axis]} in mode {mode}")
        inner = [before[i] or after[i] for i in range(rank) if i != axis]
        step.memo = (axis, rank, before[axis], mode == "constant" and any(inner))
        target = step.create(source.axes)
        step.link(source, target, np.arange(len(source)), before[axis] + np.arange(len(source)))

    def _widths(self, step: Step, rank: int) -> tuple[list[int], list[int]]:
        """Widths before and after, an entry a dimension."""
        pads = step.parameter(1, "list of widths").tolist() if step.has(1) else step.node.attrs["pads"]
        axes = [a % rank for a in step.parameter(3, "list of axes").tolist()] if step.has(3) else list(range(rank))
        before, after = [0] * rank, [0] * rank
        for position, axis in enumerate(axes):
            before[axis], after[axis] = pads[position], pads[position + len(axes)]
        return before, after

    def _value(self, step: Step) -> float:
        if step.has(2):
            return float(step.parameter(2, "value").reshape(()))
        return float(step.node.attrs.get("value", 0.0))

    def constants(self, step: Step) -> None:
        source, target, (_, _, before, inner) = step.require(), step.output, step.memo
        value = self._value(step)
        target.constant[:], target.value[:], target.nonnegative[:] = True, value, value >= 0
        super().constants(step)
        if inner:
            inside = slice(before, before + len(source))
            target.constant[inside] &= source.value == value
            target.nonnegative[inside] &= value >= 0

    def slice(self, step: Step) -> None:
        axis, rank, first, _ = step.memo
        kept = step.output.kept
        before, after = self._widths(step, rank)
        if not kept.all():
            before[axis] = int(kept[:first].sum())
            after[axis] = int(kept[first + len(step.require()) :].sum())
            self._write(step, before, after)
        if not any(before) and not any(after):
            step.graph.bypass(step.node)

    def _write(self, step: Step, before: list[int], after: list[int]) -> None:
        if not step.has(1):
            step.graph.set_attribute(step.node, "pads", [*before, *after])
            return
        axes = step.parameter(3, "axes").tolist() if step.has(3) else range(len(before))
        widths = [*(before[axis] for axis in axes), *(after[axis] for axis in axes)]
        step.graph.set_constant(step.node, 1, np.array(widths, np.int64))


class Concat(Operator):
    """Concat along the channels (each input brings its own) or along another axis (channels must agree)."""

    def couple(self, step: Step) -> None:
        shape = step.graph.shape(step.made[0])
        if shape is None:
            raise Wall("its shape is not known")
        axis = step.node.attrs["axis"] % len(shape)
        found = {channels.axes for channels in step.inputs if channels is not None}
        if len(found) != 1:
            raise Wall("its inputs have their channels on different axes")
        axes = found.pop()
        step.memo = along = axes == (axis,)
        if not along and axis in axes:
            raise Wall("its channels lie on several axes")
        target = step.create(axes)
        at = 0
        for index, source in enumerate(step.inputs):
            size = len(target) if not along else self._size(step, index, axis)
            if source is not None:
                step.link(source, target, np.arange(size), at + np.arange(size))
            elif step.constant(index) is None:
                raise Wall(f"the channels of {step.original[index].name} are not known")
            at += size if along else 0

    def _size(self, step: Step, index: int, axis: int) -> int:
        shape = step.graph.shape(step.original[index])
        size = shape[axis] if shape is not None else None
        if not isinstance(size, int):
            raise Wall(f"the number of channels of {step.original[index].name} is not known")
        return size

    def constants(self, step: Step) -> None:
        super().constants(step)
        if step.memo:
            return
        target = step.output
        values = [link.source.value for link in step.links]
        agree = np.all([link.source.constant & (link.source.value == values[0]) for link in step.links], axis=0)
        target.constant = agree & (len(step.links) == len(step.inputs))
        target.value = np.where(target.constant, values[0], 0.0)
        positive = np.all([link.source.nonnegative for link in step.links], axis=0)
        target.nonnegative = positive & (len(step.links) == len(step.inputs))

    def retain(self, step: Step) -> list[Retained]:
        """An input that has gone is left out."""
        return []

    def slice(self, step: Step) -> None:
        target, node = step.output, step.node
        axis = target.axes[0]
        at = 0
        gone: list[int] = []
        for index, source in enumerate(step.inputs):
            size = len(target) if not step.memo else self._size(step, index, axis)
            kept = target.kept[at : at + size]
            at += size if step.memo else 0
            if step.memo and not kept.any():
                gone.append(index)
            elif source is None and not kept.all():
                values = step.parameter(index, "part")
                step.graph.set_constant(node, index, values.take(np.flatnonzero(kept), axis=axis))
        for index in reversed(gone):
            del node.inputs[index]
        if len(node.inputs) == 1:
            step.graph.bypass(node)


HANDLERS: dict[str, Operator] = {"Slice": Slice(), "Pad": Pad(), "Concat": Concat()}
