"""Pooling, and what else looks at images channel by channel: regions of interest, sampling at given places."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.dtype_limits import fits
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.shape_origin import is_fixed

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Floats, Step

INDICES = 1  # output of MaxPool, input of MaxUnpool


class Pool(Operator):
    """Handler of an operator on the channels of its first input; from other inputs it reads places.

    Args:
        nonnegative: whether no result is below zero; None: where the input is not.
    """

    meets = "zeros outside the image"  # what a constant that is not zero gets mixed up with

    def __init__(self, nonnegative: bool | None = None) -> None:
        self.nonnegative = nonnegative

    def couple(self, step: Step) -> None:
        if step.require().axes != (1,):
            raise Unsupported("the channels of its input are not on axis 1")
        step.carry()

    def uniform(self, step: Step, values: Floats) -> Floats:
        """What comes out where one number comes in all over, NaN where that is not one number."""
        return values

    def constants(self, step: Step) -> None:
        source, target = step.require(), step.output
        value = np.where(source.value == 0, 0.0, self.uniform(step, source.value))
        target.constant = source.constant & fits(value, step.graph.dtype(step.made[0]))
        target.value = np.where(target.constant, value, 0.0)
        known = source.nonnegative if self.nonnegative is None else self.nonnegative
        target.nonnegative = np.where(target.constant, target.value >= 0, known)

    def need(self, step: Step) -> None:
        source, target = step.require(), step.output
        source.needed |= self.reads(step)
        lost = target.needed & source.constant & ~target.constant
        if lost.any():
            value = source.value[lost][0]
            source.notes.append(step.note(f"the constant {value:.6g} meets {self.meets}", lost))
        for places in step.inputs[1:]:
            if places is not None:
                places.pin(step.note("it reads places there"))

    def reads(self, step: Step) -> Bools:
        """[channels] of the first input that are needed."""
        return step.output.needed


class MaxPool(Pool):
    """MaxPool, which pads with nothing that could be the maximum. Its indices count through all channels."""

    def couple(self, step: Step) -> None:
        super().couple(step)
        if len(step.made) <= INDICES or not step.made[INDICES].name:
            return
        indices = step.made[INDICES]
        unpools = all(reader.op == "MaxUnpool" and reader.inputs[INDICES] is indices for reader in indices.outputs)
        if not unpools or not step.graph.is_private(indices.name):
            raise Unsupported("its indices are used")
        numbers = every(len(step.output))
        step.link(step.require(), step.create((1,), output=INDICES), numbers, numbers)

    def constants(self, step: Step) -> None:
        super().constants(step)
        for indices in step.outputs[1:]:
            indices.nonnegative[:] = True

    def reads(self, step: Step) -> Bools:
        return np.asarray(np.any([channels.needed for channels in step.outputs], axis=0))


class MaxUnpool(Pool):
    """MaxUnpool behind a MaxPool that loses the same channels: zeros, but where the indices say."""

    def couple(self, step: Step) -> None:
        if step.has(2):
            raise Unsupported("its output shape is an input")
        super().couple(step)
        indices, target = step.inputs[INDICES], step.output
        if indices is None or indices.axes != (1,) or len(indices) != len(target):
            raise Unsupported("the channels of its indices are not known")
        pools = step.original[INDICES].inputs  # none where the indices are an input of the graph
        before = step.graph.shape(pools[0].inputs[0]) if pools else None
        after = step.graph.shape(step.made[0])
        if before is None or after is None or None in after or before[2:] != after[2:]:
            raise Unsupported("its indices were not made for images of the size that it makes")
        numbers = every(len(target))
        step.link(indices, target, numbers, numbers)

    def uniform(self, step: Step, values: Floats) -> Floats:
        return np.full_like(values, np.nan)

    def need(self, step: Step) -> None:
        source, indices = step.require(), step.require(INDICES)
        needed = step.output.needed
        source.needed |= needed
        indices.needed |= needed & ~(source.constant & (source.value == 0))


class Window(Pool):
    """Pooling that zeros around the image may come into."""

    def sees_zeros(self, step: Step) -> bool:
        """Whether windows may reach beyond the image."""
        attrs = step.node.attrs
        padded = any(attrs.get("pads", ())) or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        return padded or bool(attrs.get("ceil_mode", 0))


class AveragePool(Window):
    """AveragePool. Of windows that ceil_mode cuts off, opsets and runtimes count different parts."""

    def uniform(self, step: Step, values: Floats) -> Floats:
        attrs = step.node.attrs
        counted = attrs.get("count_include_pad", 0) or attrs.get("ceil_mode", 0)
        return np.full_like(values, np.nan) if counted and self.sees_zeros(step) else values


class LpPool(Window):
    """LpPool: the p-norm over a window."""

    def uniform(self, step: Step, values: Floats) -> Floats:
        window = math.prod(step.node.attrs["kernel_shape"])
        return np.full_like(values, np.nan) if self.sees_zeros(step) else _norm(step, values, window)


class GlobalLpPool(Pool):
    """GlobalLpPool: the p-norm over all positions."""

    meets = "a number of positions that is not fixed"

    def uniform(self, step: Step, values: Floats) -> Floats:
        dims = (step.graph.shape(step.original[0]) or ())[2:]
        sizes = [size for size in dims if isinstance(size, int)]
        if len(sizes) < len(dims) or not is_fixed(step.graph):
            return np.full_like(values, np.nan)
        return _norm(step, values, math.prod(sizes))


class Sample(Pool):
    """MaxRoiPool, RoiAlign and GridSample: only zero is sure to stay what it is, where zeros are outside the image."""

    def uniform(self, step: Step, values: Floats) -> Floats:
        extends = step.node.op == "GridSample" and step.node.attrs.get("padding_mode", "zeros") != "zeros"
        return values if extends else np.full_like(values, np.nan)


def _norm(step: Step, values: Floats, count: int) -> Floats:
    """The p-norm of `count` equal numbers."""
    norm: Floats = np.abs(values) * count ** (1 / step.node.attrs.get("p", 2))
    return norm


HANDLERS: dict[str, Operator] = {
    "MaxPool": MaxPool(),
    "MaxUnpool": MaxUnpool(),
    "AveragePool": AveragePool(),
    "LpPool": LpPool(nonnegative=True),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), Pool()),
    "GlobalLpPool": GlobalLpPool(nonnegative=True),
    **dict.fromkeys(("MaxRoiPool", "RoiAlign"), Sample()),
    "GridSample": Sample(nonnegative=False),  # cubic interpolation goes beyond what it lies between
}
