"""Normalisation: each channel by itself, in groups, or all together; then a scale and an offset for each channel.

What is constant where its statistics are taken comes out as the offset. A channel that stays gets a scale of zero where
nobody needs it, or where the offset says all: then nobody needs what comes in either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.ops.across import AlongAxes, Span, Spanning, nothing, only_zero

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step
    from polar_deploy.surgery.operator import Operator

SHARED = "its statistics run over all channels"
SCALE, OFFSET, MEAN, VARIANCE = 1, 2, 3, 4
NAMES = {SCALE: "scale", OFFSET: "offset", MEAN: "mean", VARIANCE: "variance"}


@dataclass(frozen=True)
class Affine:
    """What a node does: it normalises, and then `normalised * scale + offset`.

    scale, offset: [channels], NaN where they are not one number all over a channel.
    own: whether each channel has entries of its own in them.
    """

    span: Span
    scale: Floats
    offset: Floats
    own: bool


class Normalisation(AlongAxes[Affine]):
    """Handler of a normalisation with a scale and, maybe, an offset.

    Parameters are looked at *aligned*: as arrays with as many axes as the input.

    Args:
        reason: why channels stay that are normalised together.
        zero_stays: whether zero is normalised to zero, whatever the others are.
    """

    parameters: tuple[int, ...] = (SCALE, OFFSET)

    def __init__(self, reason: str, *, zero_stays: bool = False) -> None:
        super().__init__(reason, lambda x, _: np.zeros_like(x), zero_stays=zero_stays)

    def couple(self, step: Step[Affine]) -> None:
        self.check(step)
        target = step.carry()
        span = self.cells(step)
        arrays = [self.aligned(step, index) for index in self.parameters if step.has(index)]
        own = all(
            array.shape[axis] == size for array in arrays for axis, size in zip(target.axes, target.dims, strict=True)
        )
        scale, offset = self.affine(step, [array.astype(np.float64) for array in arrays])
        step.plan = Affine(span, _per_channel(scale, target), _per_channel(offset, target), own)

    def check(self, step: Step) -> None:
        """Raises Unsupported where the statistics are of use to others, or may divide zero by zero."""
        if any(tensor.outputs or not step.graph.is_private(tensor.name) for tensor in step.made[1:] if tensor.name):
            raise Unsupported("its statistics are used")
        if step.node.attrs.get("epsilon", 1e-5) <= 0:
            raise Unsupported("its epsilon is zero")

    def cells(self, step: Step) -> Span:
        """Which channels are normalised together."""
        return Span.along(step, self.axes(step, step.rank()))

    def span(self, step: Step[Affine]) -> Span:
        return step.plan.span

    def aligned(self, step: Step, index: int) -> Array:
        """A parameter as it stands: a vector along axis 1."""
        return step.parameter(index, NAMES[index]).reshape(1, -1, *(1,) * (step.rank() - 2))

    def write(self, step: Step, index: int, values: Array) -> None:
        """Stores an aligned parameter."""
        step.graph.set_constant(step.node, index, values.ravel())

    def affine(self, step: Step, arrays: list[Floats]) -> tuple[Floats, Floats]:
        """Scale and offset, from the aligned parameters."""
        return arrays[0], arrays[1] if len(arrays) > 1 else np.zeros_like(arrays[0])

    def known(self, step: Step[Affine]) -> Floats:
        affine = step.plan
        normalised = super().known(step)
        with np.errstate(all="ignore"):
            value = normalised * affine.scale + affine.offset
        value = np.where((normalised == 0) | (affine.scale == 0), affine.offset, value)
        return np.where(~step.output.needed & affine.own, 0.0, value) if step.facts.after_cut else value

    def quiet(self, step: Step[Affine]) -> Bools:
        """[channels] whose scale becomes zero."""
        target = step.output
        told = target.constant & (step.has(OFFSET) | (target.value == 0))
        return np.asarray((~target.needed | told) & step.plan.own)

    def depends(self, step: Step[Affine]) -> Bools:
        affine = step.plan
        return np.asarray(step.output.needed & (affine.scale != 0) & ~self.quiet(step))

    def slice(self, step: Step[Affine]) -> None:
        target, quiet = step.output, self.quiet(step)
        scale, offset = np.full((2, len(target)), np.nan)  # NaN: as before
        scale[quiet] = 0.0
        offset[quiet] = target.value[quiet]
        for index in self.parameters:
            if step.has(index):
                old = self.aligned(step, index)
                values = _put(old, {SCALE: scale, OFFSET: offset}.get(index), target)
                for axis in target.axes:
                    values = values.take(target.keep(axis), axis=axis) if values.shape[axis] > 1 else values
                if not np.array_equal(values, old):
                    self.write(step, index, values)

    def scale_output(self, step: Step[Affine], factors: Floats) -> bool:
        target = step.output
        if not step.plan.own or len(target.axes) > 1:
            return False
        for index in (SCALE, OFFSET):
            if step.has(index):
                old = self.aligned(step, index)
                shape = [-1 if axis in target.axes else 1 for axis in range(old.ndim)]
                self.write(step, index, old * factors.astype(old.dtype).reshape(shape))
        return True


class BatchNormalization(Normalisation):
    """Statistics are stored: an affine function of the input."""

    parameters = (SCALE, OFFSET, MEAN, VARIANCE)

    def __init__(self) -> None:
        super().__init__("")
        self.uniform = lambda x, _: x

    def check(self, step: Step) -> None:
        if step.node.attrs.get("training_mode", 0) or len(step.made) > 1:
            raise Unsupported("it is in training mode")
        if not step.node.attrs.get("spatial", 1):
            raise Unsupported("it has a parameter for every position")

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        return ()

    def affine(self, step: Step, arrays: list[Floats]) -> tuple[Floats, Floats]:
        scale, offset, mean, variance = arrays
        with np.errstate(all="ignore"):
            factor = scale / np.sqrt(variance + step.node.attrs.get("epsilon", 1e-5))
            return factor, offset - mean * factor


class InstanceNormalization(Normalisation):
    """Statistics over space. Where channels lie in space (a group norm that an exporter wrote so) they are shared."""

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        return range(2, rank)


class GroupNormalization(Normalisation):
    """Statistics over the channels of a group, which can only go together."""

    def cells(self, step: Step) -> Span:
        source, groups = step.require(), step.node.attrs["num_groups"]
        if source.axes != (1,):
            raise Unsupported("the channels of its input are not on axis 1")
        if groups < 1:  # older ONNX Runtimes divide by it, and end the process
            raise ValueError(f"{groups} groups")
        if len(source) % groups:
            raise Unsupported(f"{len(source)} channels do not divide into {groups} groups")
        members = np.arange(len(source)).reshape(groups, -1).T
        step.tie(step.output, np.broadcast_to(members[0], members[1:].shape).ravel(), members[1:].ravel())
        return Span(np.arange(groups).repeat(len(members)), members, None)

    def slice(self, step: Step[Affine]) -> None:
        super().slice(step)
        groups = int(step.output.kept.sum()) // len(step.plan.span.members)
        if groups != step.node.attrs["num_groups"]:
            step.graph.set_attribute(step.node, "num_groups", groups)


class LayerNormalization(Normalisation):
    """Statistics, and parameters, over the last axes."""

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        return range(step.node.attrs.get("axis", -1) % rank, rank)

    def aligned(self, step: Step, index: int) -> Array:
        values = step.parameter(index, NAMES[index])
        return values.reshape((1,) * (step.rank() - values.ndim) + values.shape)

    def write(self, step: Step, index: int, values: Array) -> None:
        rank = step.parameter(index, NAMES[index]).ndim
        step.graph.set_constant(step.node, index, values.reshape(values.shape[values.ndim - rank :]))


class RMSNormalization(LayerNormalization):
    """No mean is taken off: of what is the same everywhere only zero is known to come out as zero."""

    def __init__(self) -> None:
        super().__init__(SHARED, zero_stays=True)
        self.uniform = only_zero


class MeanVarianceNormalization(Spanning):
    """Statistics along any axes. What is the same everywhere is divided by zero in some runtimes, or next to it."""

    can_be_nonfinite = True

    def axes(self, step: Step, rank: int) -> Iterable[int]:
        return {axis % rank for axis in step.node.attrs.get("axes", [0, 2, 3])}


def _per_channel(values: Floats, target: Channels) -> Floats:
    """[channels] what an aligned array holds for each of them, NaN where that is not one number."""
    moved = np.moveaxis(values, target.axes, range(len(target.axes)))
    flat = moved.reshape(*moved.shape[: len(target.axes)], -1)
    low, high = flat.min(axis=-1), flat.max(axis=-1)
    return np.broadcast_to(np.where(low == high, low, np.nan), target.dims).ravel()


def _put(old: Array, new: Floats | None, target: Channels) -> Array:
    """An aligned array with the numbers of `new` [channels] in it; NaN, or no `new` at all: as before."""
    if new is None or np.isnan(new).all():
        return old
    shape = [1] * old.ndim
    for axis, size in zip(target.axes, target.dims, strict=True):
        shape[axis] = size
    put = new.reshape(shape)
    return np.where(np.isnan(put), old, put.astype(old.dtype))


HANDLERS: dict[str, Operator] = {
    "BatchNormalization": BatchNormalization(),
    "InstanceNormalization": InstanceNormalization("its statistics run over several channels"),
    "GroupNormalization": GroupNormalization("the statistics of its group run over it"),
    "LayerNormalization": LayerNormalization(SHARED),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), RMSNormalization()),
    "MeanVarianceNormalization": MeanVarianceNormalization(SHARED, nothing),
}
