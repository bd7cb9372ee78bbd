"""Conv, ConvTranspose and DeformConv."""

from __future__ import annotations

from functools import lru_cache, reduce
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import frozen
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.mixing import Mixing, MixingWeights, Trim, per_filter, write_bias
from polar_deploy.surgery.quantization import Weight, weight

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Step
    from polar_deploy.surgery.sizes import Dim


LIKE = 1 << 10  # kinds of convolutions that are kept in mind


class Conv(Mixing):
    """Convolution of any rank, plain, grouped or depthwise. weight: [filters, inputs a group, *kernel]."""

    uneven = "the zero padding"  # why a constant that is not zero may not come out constant

    def kernels(self, step: Step) -> Weight:
        """The weight as stored."""
        return weight(step, 1, "weight")

    def bias(self, step: Step) -> Weight | None:
        """The bias as stored."""
        return weight(step, self.bias_input, "bias") if self.bias_input and step.has(self.bias_input) else None

    def to_blocks(self, values: Array, groups: int) -> Array:
        """The weight as `MixingWeights` takes it."""
        blocks: Array = values.reshape(groups, -1, values.shape[1], prod(values.shape[2:]))
        return blocks

    def from_blocks(self, blocks: Array, kernel: tuple[int, ...]) -> Array:
        """The weight as the operator takes it."""
        values: Array = blocks.reshape(-1, blocks.shape[2], *kernel)
        return values

    def sight(self, step: Step, kernel: tuple[int, ...]) -> tuple[Bools, Bools]:
        """[taps] `always_inside` and `sometimes_padded` of `MixingWeights`."""
        shape, attrs, rank = step.graph.shape(step.original[0]), step.node.attrs, len(kernel)
        return _sight(
            kernel,
            (None,) * rank if shape is None else shape[2:],
            tuple(attrs.get("pads", ())) or (0,) * 2 * rank,
            tuple(attrs.get("strides", ())) or (1,) * rank,
            tuple(attrs.get("dilations", ())) or (1,) * rank,
            attrs.get("auto_pad", "NOTSET"),
        )

    def read(self, step: Step) -> MixingWeights:
        kernels, bias, groups = self.kernels(step), self.bias(step), step.node.attrs.get("group", 1)
        if groups < 1 or kernels.values.shape[0] % groups:
            raise Unsupported(f"{kernels.values.shape[0]} channels do not divide into {groups} groups")
        zero, scale = per_filter(kernels, groups)
        inside, padded = self.sight(step, kernels.values.shape[2:])
        fixed = "an operator without a bias" if self.bias_input is None else "a quantised bias"
        plain = bias is None or bias.plain
        return MixingWeights(
            weight=self.to_blocks(kernels.values, groups),
            bias=None if bias is None else bias.numbers.reshape(groups, -1),
            zero=zero,
            scale=scale,
            always_inside=inside,
            sometimes_padded=padded if kernels.unsure is None else frozen(np.ones_like(padded)),
            padded_by=kernels.unsure or self.uneven,
            bias_locked_because=None if plain and self.bias_input else fixed,
            plain=plain and kernels.plain,
        )

    def write(self, step: Step, trim: Trim) -> None:
        kernels, bias = self.kernels(step), self.bias(step)
        values = None if trim.weight is None else self.from_blocks(trim.weight, kernels.values.shape[2:])
        kernels.write(step.graph, values, trim.kept)
        if self.bias_input:
            write_bias(step, self.bias_input, bias, trim, self.bias_type(step))
        if trim.groups != step.node.attrs.get("group", 1):
            step.graph.set_attribute(step.node, "group", trim.groups)


class ConvTranspose(Conv):
    """Transposed convolution. weight: [inputs, filters a group, *kernel]."""

    uneven = "the gaps of a transposed convolution"

    def kernels(self, step: Step) -> Weight:
        kernels = weight(step, 1, "weight", axis=1)
        if kernels.vectors and step.node.attrs.get("group", 1) > 1:
            raise Unsupported("its groups share the scales of the weight")
        return kernels

    def to_blocks(self, values: Array, groups: int) -> Array:
        blocks: Array = super().to_blocks(values, groups).swapaxes(1, 2)
        return blocks

    def from_blocks(self, blocks: Array, kernel: tuple[int, ...]) -> Array:
        values: Array = super().from_blocks(blocks.swapaxes(1, 2), kernel)
        return values

    def sight(self, step: Step, kernel: tuple[int, ...]) -> tuple[Bools, Bools]:
        attrs = step.node.attrs
        pointwise = {*kernel, *attrs.get("strides", ())} <= {1} and not any(attrs.get("pads", ()))
        inside = np.full(prod(kernel), pointwise and "output_shape" not in attrs)
        return inside, ~inside


class DeformConv(Conv):
    """Convolution at computed sampling points, each of which sees all channels."""

    bias_input = 3
    uneven = "sampling points outside of the input"

    def read(self, step: Step) -> MixingWeights:
        if step.node.attrs.get("offset_group", 1) != 1:
            raise Unsupported("its sampling points differ between channels")
        return super().read(step)

    def sight(self, step: Step, kernel: tuple[int, ...]) -> tuple[Bools, Bools]:
        padded = np.ones(prod(kernel), bool)
        return ~padded, padded


@lru_cache(LIKE)
def _sight(
    kernel: tuple[int, ...],
    sizes: tuple[Dim, ...],
    pads: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    mode: str,
) -> tuple[Bools, Bools]:
    """[taps] which always see data, and which see padding at some positions of the output."""
    rank = len(kernel)
    inside, blind = [], []
    for axis, (taps, size) in enumerate(zip(kernel, sizes, strict=True)):
        span = (taps - 1) * dilations[axis] + 1
        padding = (pads[axis], pads[axis + rank]) if mode == "NOTSET" else _automatic(mode, size, span, strides[axis])
        always, never = _sight_along(np.arange(taps) * dilations[axis], strides[axis], padding, size)
        inside.append(always)
        blind.append(never)
    always, never = reduce(np.logical_and.outer, inside).ravel(), reduce(np.logical_or.outer, blind).ravel()
    return frozen(always), frozen(~always & ~never)


def _automatic(mode: str, size: Dim, span: int, stride: int) -> tuple[int, int]:
    """What auto_pad adds before and after; where the size is not known: something."""
    if mode == "VALID" or span == 1:
        return 0, 0
    if not isinstance(size, int):
        return 1, 1
    total = max((-(-size // stride) - 1) * stride + span - size, 0)
    return (total // 2, total - total // 2) if mode == "SAME_UPPER" else (total - total // 2, total // 2)


def _sight_along(taps: Array, stride: int, padding: tuple[int, int], size: Dim) -> tuple[Bools, Bools]:
    """[taps] along one axis (given by their distance from the first) which always see data, and which never do."""
    if not any(padding):
        return np.ones(len(taps), bool), np.zeros(len(taps), bool)
    if not isinstance(size, int):
        return np.zeros(len(taps), bool), np.zeros(len(taps), bool)
    last = (
        (size + sum(padding) - taps[-1] - 1) // stride * stride
    )  # where the window stands at the end, padding counted
    start = taps - padding[0]
    first_inside = start + np.maximum(-(start // stride), 0) * stride
    always = (start >= 0) & (start + last < size)
    return always, ~((first_inside < size) & (first_inside <= start + last))


HANDLERS: dict[str, Mixing] = {"Conv": Conv(), "ConvTranspose": ConvTranspose(), "DeformConv": DeformConv()}
