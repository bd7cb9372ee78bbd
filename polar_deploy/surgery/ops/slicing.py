"""Slice, Pad and Concat: channels are left out, added or joined (option-A shortcuts are Slice, Slice, Pad)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import all_of, every
from polar_deploy.surgery.facts import Ints, Unsupported
from polar_deploy.surgery.operator import Operator, Retained
from polar_deploy.surgery.shape_origin import Size, trace, whole_numbers, write_numbers

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Step


def only_axis(channels: Channels) -> int:
    """The one axis that the channels lie on. Raises Unsupported."""
    if len(channels.axes) > 1:
        raise Unsupported("its channels lie on several axes")
    return channels.axes[0]


def along(channels: Channels, axis: int, indices: Ints) -> Ints:
    """Numbers of the channels at some indices along one of their axes."""
    numbers = np.arange(len(channels)).reshape(channels.dims)
    return np.asarray(numbers.take(indices, axis=channels.axes.index(axis)).ravel())


def renumbered(channels: Channels, axis: int) -> Ints:
    """What each index along an axis becomes in the cut; those that go have no meaning."""
    kept = np.zeros(channels.dims[channels.axes.index(axis)], bool)
    kept[channels.keep(axis)] = True
    return np.asarray(np.cumsum(kept) - 1)


@dataclass
class Cutting:
    """What a Slice along the channels does.

    bounds: starts, ends, axes and steps as far as they are given; at: which of them are the channels'.
    computed: inputs that hold shape arithmetic and become constants.
    axis: that of the channels; taken: the indices along it that are left.
    """

    bounds: dict[str, list[int]]
    at: int
    computed: list[int]
    axis: int = 0
    taken: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def stride(self) -> int:
        return self.bounds["steps"][self.at] if "steps" in self.bounds else 1


class Slice(Operator[Cutting | None]):
    """Slice, forwards and backwards. With strides, the channels that it steps over go with the one that it takes."""

    names = ("starts", "ends", "axes", "steps")

    def couple(self, step: Step[Cutting | None]) -> None:
        source = step.require()
        axes = self._axes(step)
        if not set(axes) & set(source.axes):
            step.carry()
            return
        (axis,) = shared if len(shared := set(axes) & set(source.axes)) == 1 else (only_axis(source),)
        step.plan = plan = self._cutting(step, axes.index(axis))
        start, end = (plan.bounds[name][plan.at] for name in ("starts", "ends"))
        plan.axis, plan.taken = axis, np.arange(source.dims[source.axes.index(axis)])[slice(start, end, plan.stride)]
        target = step.create(source.axes)
        step.link(source, target, along(source, axis, plan.taken), np.arange(len(target)))
        taken = plan.taken
        if (width := abs(plan.stride)) > 1:
            between = np.arange(taken.min(), taken.max() + 1)
            taking = between - between % width + taken[0] % width
            step.tie(source, along(source, axis, between), along(source, axis, taking))

    def _axes(self, step: Step) -> list[int]:
        """The axes that are cut."""
        rank = step.rank()
        if not step.has(1):
            axes = step.node.attrs.get("axes", range(len(step.node.attrs["starts"])))
        elif step.has(3):
            axes = whole_numbers(step, 3)
        else:
            axes = range(len(trace(step.facts, step.original[1]) or range(rank)))
        if axes is None:
            raise Unsupported("its axes are computed")
        return [axis % rank for axis in axes]

    def _cutting(self, step: Step, at: int) -> Cutting:
        if not step.has(1):
            return Cutting({name: step.node.attrs[name] for name in self.names if name in step.node.attrs}, at, [])
        bounds, computed = {}, []
        for index, name in enumerate(self.names, start=1):
            if step.has(index):
                values = whole_numbers(step, index)
                if values is None:
                    raise Unsupported("its bounds are computed")
                bounds[name] = values
                computed += [index] if step.constant(index) is None else []
        return Cutting(bounds, at, computed)

    def need(self, step: Step[Cutting | None]) -> None:
        super().need(step)
        plan = step.plan
        if plan is not None:
            bounds = {index: plan.bounds[self.names[index - 1]] for index in plan.computed}
            step.replaced |= {index: np.array(values, np.float64) for index, values in bounds.items()}

    def slice(self, step: Step[Cutting | None]) -> None:
        source, target, plan = step.require(), step.output, step.plan
        if plan is None or (source.kept.all() and not plan.computed):
            return
        new = renumbered(source, plan.axis)
        left = new[plan.taken[target.keep(plan.axis)]] if plan.axis in target.axes else new[plan.taken]
        total = len(source.keep(plan.axis))
        everything = len(left) == total and (plan.stride == 1 or total == 1)
        if everything and _is_whole_elsewhere(step) and step.graph.bypass(step.node):
            return
        end = int(left[-1]) + (1 if plan.stride > 0 else -1)
        bounds = {"starts": int(left[0]), "ends": end if end >= 0 else -total - 1}
        for index, name in enumerate(self.names, start=1):
            if name in bounds or index in plan.computed:
                values = [*plan.bounds[name]]
                values[plan.at] = bounds.get(name, values[plan.at])
                self._write(step, index, values)

    def _write(self, step: Step, index: int, values: list[int]) -> None:
        if step.has(1):
            write_numbers(step, index, values)
        else:
            step.graph.set_attribute(step.node, self.names[index - 1], values)


def _is_whole_elsewhere(step: Step) -> bool:
    """Whether input and output have the same shape but for the channels."""
    before, after = (step.graph.shape(tensors[0]) or () for tensors in (step.original, step.made))
    same = [a == b is not None for a, b in zip(before, after, strict=True)]
    return all(is_same for axis, is_same in enumerate(same) if axis not in step.output.axes)


@dataclass
class Padding:
    """Widths of a Pad, an entry a dimension, negative where it crops, None where they are computed.

    taken: the input channels that are not cropped; written: the widths stand in an input that is computed.
    """

    axis: int
    before: list[int | None]
    after: list[int | None]
    taken: range
    written: bool

    @property
    def channels(self) -> tuple[int, int]:
        """Widths along the channels."""
        return self.before[self.axis] or 0, self.after[self.axis] or 0

    @property
    def inner(self) -> bool:
        """Whether anything is added along other dimensions."""
        others = [(b, a) for i, (b, a) in enumerate(zip(self.before, self.after, strict=True)) if i != self.axis]
        return any(width is None or width > 0 for pair in others for width in pair)


class Pad(Operator[Padding]):
    """Pad; along the channels with a constant, or cropping. Added channels hold the pad value."""

    def couple(self, step: Step[Padding]) -> None:
        source = step.require()
        axis = only_axis(source)
        before, after = self._widths(step)
        low, high = before[axis], after[axis]
        if low is None or high is None:
            raise Unsupported("its widths are computed")
        mode = self._mode(step)
        if (low or high) and mode != "constant":
            raise Unsupported(f"it pads the channels by {low} and {high} in mode {mode}")
        written = step.has(1) and step.constant(1) is None and bool(low or high)
        if written and any(width is None for width in (*before, *after)):
            raise Unsupported("its widths are computed")
        taken = range(len(source))[max(-low, 0) : len(source) - max(-high, 0)]
        if not taken:
            raise Unsupported("it crops all channels")
        step.plan = Padding(axis, before, after, taken, written)
        target = step.create(source.axes)
        step.link(source, target, np.array(taken), max(low, 0) + np.arange(len(taken)))

    def _mode(self, step: Step) -> str:
        mode: str = step.node.attrs.get("mode", "constant")
        return mode

    def _widths(self, step: Step) -> tuple[list[int | None], list[int | None]]:
        """Widths before and after, an entry a dimension."""
        rank = step.rank()
        axes = [axis % rank for axis in self._axes(step, rank)]
        if step.has(1):
            sizes = trace(step.facts, step.original[1]) or [Size()] * (2 * len(axes))
            pads = [size.value if isinstance(size.value, int) else None for size in sizes]
        else:
            pads = list(step.node.attrs["pads"])
        before: list[int | None] = [0] * rank
        after: list[int | None] = [0] * rank
        for position, axis in enumerate(axes):
            before[axis], after[axis] = pads[position], pads[position + len(axes)]
        return before, after

    def _axes(self, step: Step, rank: int) -> list[int]:
        if not step.has(3):
            return list(range(rank))
        axes = step.parameter(3, "list of axes")
        return [int(axis) for axis in axes.ravel()]

    def _value(self, step: Step) -> float | None:
        """What is added; None where it is computed."""
        if not step.has(2):
            return float(step.node.attrs.get("value", 0.0))
        value = step.constant(2)
        return None if value is None else float(value.reshape(()))

    def need(self, step: Step[Padding]) -> None:
        super().need(step)
        if step.plan.written:
            step.replaced[1] = np.array(self._list(step), np.float64)

    def constants(self, step: Step[Padding]) -> None:
        source, target, plan = step.require(), step.output, step.plan
        value = self._value(step)
        known = value is not None
        target.constant[:], target.value[:], target.nonnegative[:] = known, value or 0.0, known and (value or 0.0) >= 0
        super().constants(step)
        if plan.inner and self._mode(step) == "constant":
            inside, taken = step.links[0].into, step.links[0].out_of
            target.constant[inside] &= known and source.value[taken] == value
            target.nonnegative[inside] &= known and (value or 0.0) >= 0

    def retain(self, step: Step[Padding]) -> list[Retained]:
        """Of what is not cropped, one channel is left."""
        source, taken = step.require(), step.plan.taken
        if step.output.is_removed or source.kept[taken].any():
            return []
        return [Retained(source, np.array(taken[:1]), "an operator must keep one input channel")]

    def slice(self, step: Step[Padding]) -> None:
        source, kept, plan = step.require(), step.output.kept, step.plan
        low, high = plan.channels
        first, last = plan.taken[0], plan.taken[-1] + 1
        if low or high:
            plan.before[plan.axis] = int(kept[:low].sum()) if low > 0 else -int(source.kept[:first].sum())
            plan.after[plan.axis] = int(kept[-high:].sum()) if high > 0 else -int(source.kept[last:].sum())
        if (*plan.before, *plan.after) == (0,) * 2 * len(plan.before) and step.graph.bypass(step.node):
            return
        if plan.written or (low, high) != plan.channels:
            self._write(step)

    def _write(self, step: Step[Padding]) -> None:
        if step.has(1):
            step.graph.set_constant(step.node, 1, np.array(self._list(step), np.int64))
        else:
            step.graph.set_attribute(step.node, "pads", self._list(step))

    def _list(self, step: Step[Padding]) -> list[int | None]:
        """The widths as the operator takes them."""
        axes = self._axes(step, len(step.plan.before))
        return [widths[axis] for widths in (step.plan.before, step.plan.after) for axis in axes]


class Concat(Operator[list[Ints | None]]):
    """Concat along the channels (each input brings its own) or along another axis (channels must agree).

    Its plan: for each part, the numbers of the output's channels that it brings; None: all of them.
    """

    first, stride = 0, 1  # where the parts stand among the inputs

    def parts(self, step: Step) -> range:
        """The inputs that are joined."""
        return range(self.first, len(step.original), self.stride)

    def convert(self, step: Step, index: int, values: Array) -> Array:
        """What becomes of constants of part `index`."""
        return values

    def couple(self, step: Step[list[Ints | None]]) -> None:
        axis = self._axis(step)
        parts = self.parts(step)
        found = {channels.axes for index in parts if (channels := step.inputs[index]) is not None}
        if len(found) != 1:
            raise Unsupported("its inputs have their channels on different axes")
        axes = found.pop()
        target = step.create(axes)
        step.plan = self._parts(step, target, axis) if axis in axes else [None] * len(parts)
        for index, part in zip(parts, step.plan, strict=True):
            if (source := step.inputs[index]) is not None:
                numbers = every(len(target)) if part is None else part
                step.link(source, target, every(len(numbers)), numbers)
            elif step.constant(index) is None:
                raise Unsupported(f"the channels of {step.original[index].name} are not known")

    def _axis(self, step: Step) -> int:
        axis: int = step.node.attrs["axis"] % len(step.result_shape())
        return axis

    def _parts(self, step: Step, target: Channels, axis: int) -> list[Ints | None]:
        ends = np.cumsum([self._size(step, index, axis) for index in self.parts(step)])
        return [along(target, axis, part) for part in np.split(np.arange(ends[-1]), ends[:-1])]

    def _size(self, step: Step, index: int, axis: int) -> int:
        shape = step.graph.shape(step.original[index])
        size = shape[axis] if shape is not None else None
        if not isinstance(size, int):
            raise Unsupported(f"the number of channels of {step.original[index].name} is not known")
        return size

    def constants(self, step: Step[list[Ints | None]]) -> None:
        """A part that the model holds counts like one that is computed; joined otherwise, all parts have to agree."""
        target = step.output
        target.constant[:] = target.nonnegative[:] = True
        for index, numbers in zip(self.parts(step), step.plan, strict=True):
            if (source := step.inputs[index]) is not None:
                constant, value, nonnegative = source.constant, source.value, source.nonnegative
            else:
                constant, value, nonnegative = by_channel(step.parameter(index, "part"), target.axes)
            value, part = self.convert(step, index, value), slice(None) if numbers is None else numbers
            if numbers is not None or index == self.first:
                target.value[part] = value
            target.constant[part] &= constant & (target.value[part] == value)
            target.nonnegative[part] &= nonnegative

    def retain(self, step: Step) -> list[Retained]:
        """An input that has gone is left out."""
        return []

    def slice(self, step: Step[list[Ints | None]]) -> None:
        target, node, axis = step.output, step.node, self._axis(step)
        removed, first = list[int](), 0
        for index, numbers in zip(self.parts(step), step.plan, strict=True):
            if numbers is not None and not target.kept[numbers].any():
                removed.append(index)
            elif step.inputs[index] is None and not all_of(target.kept):
                values = step.parameter(index, "part")
                for each in target.axes:
                    left = target.keep(each)
                    if each == axis:
                        left = left[(left >= first) & (left < first + values.shape[axis])] - first
                    values = values.take(left, axis=each)
                step.graph.set_constant(node, index, values)
            first += 0 if numbers is None else self._size(step, index, axis)
        for index in reversed(removed):
            for each in reversed(range(index, index + self.stride)):
                step.graph.drop_input(node, each)
        if len(node.inputs) == 1:
            step.graph.bypass(node)


def by_channel(values: Array, axes: tuple[int, ...]) -> tuple[Bools, Array, Bools]:
    """Of a constant tensor, by channel: whether it is one and the same number, that number, whether nothing is < 0."""
    moved = np.moveaxis(values, axes, range(len(axes)))
    rows = moved.reshape(int(np.prod(moved.shape[: len(axes)])), -1).astype(np.float64)
    same = np.asarray((rows == rows[:, :1]).all(axis=1))
    return same, np.where(same, rows[:, 0], 0.0), np.asarray((rows >= 0).all(axis=1))


HANDLERS: dict[str, Operator] = {"Slice": Slice(), "Pad": Pad(), "Concat": Concat()}
