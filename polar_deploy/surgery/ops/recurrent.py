"""LSTM, GRU and RNN: closed channels of the input take their columns of W along; hidden units stay.

What an input channel that is constant adds to the gates goes into the first half of the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.dtype_limits import fits
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator, Retained
from polar_deploy.surgery.ops.slicing import rank_of

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Floats, Step

INPUT, WEIGHT, BIAS = 0, 1, 3  # W: [directions, gates * hidden, inputs]; B: [directions, 2 * gates * hidden]
MIXED = "its gates mix all channels at every step"


@dataclass(frozen=True)
class Absorbed:
    """Input channels that are constant, and that the bias takes up.

    channels: [input channels]; moved: [directions, gates * hidden] what they add.
    """

    channels: Bools
    moved: Floats


class Recurrent(Operator):
    """Handler of a recurrent layer. Its memo is what it absorbs; all channels of its results are in use."""

    def couple(self, step: Step) -> None:
        source, axis = step.require(INPUT), rank_of(step) - 1
        if source.axes != (axis,):
            raise Unsupported("it mixes another axis than that of the channels")
        if step.parameter(WEIGHT, "weight").shape[-1] != len(source):
            raise ValueError(f"it reads {len(source)} channels with {step.parameter(WEIGHT, 'weight').shape}")
        if step.has(BIAS):
            step.parameter(BIAS, "bias")
        for tensor in step.made:  # all of them are in use
            shape = step.graph.shape(tensor) if tensor.name else None
            if shape is not None and isinstance(shape[-1], int) and shape[-1] > 0:
                step.facts.create(step, tensor, (len(shape) - 1,)).pin(step.note(MIXED))

    def constants(self, step: Step) -> None:
        """Nothing is known of what comes out. Asked first, it finds what the bias can take up."""
        if step.facts.after_cut:
            return
        source, weight = step.require(INPUT), step.parameter(WEIGHT, "weight")
        channels = source.constant.copy()
        moved = weight[..., channels].astype(np.float64) @ source.value[channels]
        if not fits(moved, weight.dtype).all():
            channels &= source.value == 0
            moved = np.zeros_like(moved)
        step.memo = Absorbed(channels, moved)

    def need(self, step: Step) -> None:
        source = step.require(INPUT)
        read = step.parameter(WEIGHT, "weight").any(axis=(0, 1))
        source.needed |= read & ~step.memo.channels
        for channels in step.inputs[1:]:
            if channels is not None:
                channels.pin(step.note("it is read as a whole"))

    def retain(self, step: Step) -> list[Retained]:
        source = step.require(INPUT)
        return (
            [Retained(source, np.zeros(1, np.int64), "an operator must keep one input channel")]
            if source.is_removed
            else []
        )

    def slice(self, step: Step) -> None:
        source, weight = step.require(INPUT), step.parameter(WEIGHT, "weight")
        absorbed: Absorbed = step.memo
        if absorbed.moved.any():
            old = step.constant(BIAS) if step.has(BIAS) else None
            bias = np.zeros((weight.shape[0], 2 * weight.shape[1])) if old is None else old.astype(np.float64)
            bias[:, : weight.shape[1]] += absorbed.moved
            step.graph.set_constant(step.node, BIAS, bias.astype(weight.dtype))
        if not source.kept.all() or weight[..., absorbed.channels].any():
            values = np.where(absorbed.channels, np.zeros((), weight.dtype), weight)
            step.graph.set_constant(step.node, WEIGHT, values[..., source.kept])


HANDLERS: dict[str, Operator] = {name: Recurrent() for name in ("LSTM", "GRU", "RNN")}
