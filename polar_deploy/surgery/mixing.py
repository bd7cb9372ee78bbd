"""Operators that mix channels with constant weights: convolutions and matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.operator import Operator, Retained

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Ints, Step
    from polar_deploy.surgery.graph import Array


@dataclass(frozen=True)
class Mix:
    """A mixing operator in one form for all: `groups` blocks of filters over taps (kernel positions).

    weight: [groups, filters a group, inputs a group, taps]
    bias: [groups, filters a group], None where there is none
    padded: a constant that is not zero does not come out constant, because zeros are padded in between
    takes_bias: a bias can be written
    """

    weight: Array
    bias: Floats | None
    padded: bool
    takes_bias: bool = True

    @property
    def depthwise(self) -> bool:
        """Whether each output channel sees one input channel only, so that they go together."""
        return len(self.weight) > 1 and self.weight.shape[2:3] == (1,)

    @property
    def offset(self) -> Floats:
        """The bias, zeros where there is none."""
        return np.zeros(self.weight.shape[:2]) if self.bias is None else self.bias


@dataclass
class Plan:
    """What a handler remembers of a node: see `Mixing.constants`."""

    mix: Mix
    present: Bools  # [groups, filters, inputs] where a weight is not zero
    absorbed: Bools  # [groups, inputs] constant inputs that the bias takes up, so that nobody needs them
    value: Floats  # [groups, inputs]


class Mixing(Operator):
    """Handler of operators that mix. A family says how its weights are read and written."""

    def read(self, step: Step) -> Mix:
        """The operator's constants in the common form. Raises Wall."""
        raise NotImplementedError

    def write(self, step: Step, weight: Array | None, bias: Floats | None, groups: int) -> None:
        """Writes constants back; None: unchanged. weight: as in `Mix`; bias: [output channels]."""
        raise NotImplementedError

    def input_axis(self, step: Step) -> int:
        """The axis of the input that is mixed."""
        return 1

    def output_axis(self, step: Step) -> int:
        """The axis of the output that the filters make."""
        return 1

    def couple(self, step: Step) -> None:
        mix = self.read(step)
        source = self._source(step)
        target = step.create((self.output_axis(step),))
        groups, filters, inputs, _ = mix.weight.shape
        step.memo = Plan(mix, _present(mix.weight), np.zeros((groups, inputs), bool), np.zeros((groups, inputs)))
        if mix.depthwise and source is not None:
            into = np.arange(groups * filters)
            step.link(source, target, into // filters, into)

    def _source(self, step: Step) -> Channels | None:
        """The channels that are mixed; None where nothing is known about them."""
        source = step.inputs[0]
        return source if source is not None and source.axes == (self.input_axis(step),) else None

    def constants(self, step: Step) -> None:
        plan, target, mix = step.memo, step.output, step.memo.mix
        if step.facts.settled:  # the cut makes filters that nobody needs zero
            target.constant, target.value, target.nonnegative = ~target.needed, np.zeros(len(target)), ~target.needed
            return
        source = self._source(step)
        constant = np.zeros_like(plan.absorbed)
        if source is not None:
            plan.value = source.value.reshape(plan.absorbed.shape).copy()
            constant = source.constant.reshape(plan.absorbed.shape) & ((plan.value == 0) | (not mix.padded))
            plan.absorbed = constant & ((plan.value == 0) | mix.takes_bias)
        target.constant = ~(plan.present & ~constant[:, None, :]).any(axis=2).ravel()
        target.value = np.where(target.constant, (mix.offset + _moved(mix, constant, plan.value)).ravel(), 0.0)
        target.nonnegative = target.constant & (target.value >= 0)

    def need(self, step: Step) -> None:
        plan, source = step.memo, self._source(step)
        if source is None:
            if step.inputs[0] is not None:
                step.inputs[0].pin(step.note("it mixes another axis than that of the channels"))
            return
        wanted = step.output.needed.reshape(plan.mix.weight.shape[:2])
        read = (plan.present & wanted[:, :, None]).any(axis=1)
        needed = (read & ~plan.absorbed).ravel()
        source.needed |= needed
        if (constant := needed & source.constant).any():
            value = source.value[constant][0]
            why = "the zero padding" if plan.mix.padded else "an operator without a bias"
            source.notes.append(step.note(f"the constant {value:.6g} meets {why}", constant))

    def retain(self, step: Step) -> list[Retained]:
        mix, source, target = step.memo.mix, self._source(step), step.output
        groups = len(mix.weight)
        if groups == 1 or mix.depthwise or target.gone:
            return super().retain(step)
        sides = [channels for channels in (source, target) if channels is not None]
        alive = np.any([channels.kept.reshape(groups, -1).any(axis=1) for channels in sides], axis=0)
        missing = [(channels, _unbalanced(channels.kept.reshape(groups, -1), alive)) for channels in sides]
        reason = "every group keeps as many channels as the fullest one"
        return [Retained(channels, indices, reason) for channels, indices in missing if len(indices)]

    def slice(self, step: Step) -> None:
        plan, source, target = step.memo, self._source(step), step.output
        mix = plan.mix
        groups, filters, inputs, _ = mix.weight.shape
        kept_in = np.ones((groups, inputs), bool) if source is None else source.kept.reshape(groups, inputs)
        kept_out = target.kept.reshape(groups, filters)
        unneeded = ~target.needed.reshape(groups, filters)
        moved = plan.absorbed & (plan.value != 0)
        void = plan.present & (plan.absorbed[:, None, :] | unneeded[:, :, None])
        void &= kept_in[:, None, :] & kept_out[:, :, None]
        cut = not (kept_in.all() and kept_out.all())
        bias = mix.offset + _moved(mix, moved, plan.value)
        bias[unneeded] = 0
        weight = None
        if cut or void.any():
            weight = _select(mix.weight, kept_in, kept_out)
            if void.any():
                weight = np.where(_select(void[..., None], kept_in, kept_out), weight.dtype.type(0), weight)
        changed = not np.array_equal(bias, mix.offset) or (cut and mix.bias is not None)
        alive = int((kept_in.any(axis=1) & kept_out.any(axis=1)).sum())
        self.write(step, weight, bias[kept_out] if changed else None, alive)

    def scale_output(self, step: Step, factors: Floats) -> bool:
        mix = self.read(step)
        scale = factors.reshape(mix.weight.shape[:2])
        weight = mix.weight * scale[:, :, None, None].astype(mix.weight.dtype)
        bias = None if mix.bias is None else (mix.bias * scale).ravel()
        self.write(step, weight, bias, mix.weight.shape[0])
        return True

    def scales_input(self, step: Step) -> bool:
        return self._source(step) is not None

    def scale_input(self, step: Step, factors: Floats) -> None:
        mix = self.read(step)
        scale = factors.reshape(len(mix.weight), 1, -1, 1)
        self.write(step, mix.weight * scale.astype(mix.weight.dtype), None, len(mix.weight))


def _present(weight: Array) -> Bools:
    """[groups, filters, inputs] whether any tap is not zero. Mostly the first one tells."""
    present: Bools = weight[..., 0] != 0
    for tap in range(1, weight.shape[3]):
        if present.all():
            break
        present |= weight[..., tap] != 0
    return present


def _moved(mix: Mix, constant: Bools, value: Floats) -> Floats:
    """[groups, filters] what constant inputs ([groups, inputs], with their value) add to each filter's output."""
    used = constant & (value != 0)
    moved = np.zeros(mix.weight.shape[:2])
    for group in np.flatnonzero(used.any(axis=1)):
        columns = used[group]
        moved[group] = mix.weight[group][:, columns].sum(axis=2, dtype=np.float64) @ value[group, columns]
    return moved


def _select(weight: Array, kept_in: Bools, kept_out: Bools) -> Array:
    """[groups, filters, inputs, taps] cut to what is kept: as many filters and inputs in every group that lives."""
    alive = np.flatnonzero(kept_in.any(axis=1) & kept_out.any(axis=1))
    if len(weight) == 1:
        rows = weight if kept_out.all() else weight[:, kept_out[0]]
        return rows if kept_in.all() else rows[:, :, kept_in[0]]
    filters = np.nonzero(kept_out[alive])[1].reshape(len(alive), -1)
    inputs = np.nonzero(kept_in[alive])[1].reshape(len(alive), -1)
    selected: Array = weight[alive[:, None, None], filters[:, :, None], inputs[:, None, :]]
    return selected


def _unbalanced(kept: Bools, alive: Bools) -> Ints:
    """Channels to take back so that every living group keeps as many as the fullest one, and at least one."""
    size = kept.shape[1]
    counts = kept.sum(axis=1)
    wanted = max(1, int(np.max(counts)))
    back = [
        group * size + np.flatnonzero(~kept[group])[: wanted - counts[group]]
        for group in np.flatnonzero(alive & (counts < wanted))
    ]
    return np.concatenate(back) if back else np.empty(0, np.int64)
