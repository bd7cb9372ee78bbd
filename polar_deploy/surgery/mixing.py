"""Operators that mix channels with constant weights: convolutions and matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.arrays import all_of, any_of, every, no, yes
from polar_deploy.surgery.dtype_limits import fits, only
from polar_deploy.surgery.operator import Operator, Retained

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Ints, Link, Step
    from polar_deploy.surgery.quantization import Weight

OTHER_AXIS, WHOLE = "it mixes another axis than that of the channels", "it is read as a whole"


@dataclass(eq=False, slots=True)
class MixingWeights:
    """A mixing operator in one form for all: `groups` blocks of filters over taps (kernel positions).

    weight: [groups, filters a group, inputs a group, taps] as stored: (weight - zero) * scale is meant
    bias: [groups, filters a group], None where there is none
    zero, scale: [1, 1] or [groups, filters a group]
    always_inside: [taps] which see data at every position of the output: of a 3 x 3 kernel with padding 1 the middle
    sometimes_padded: [taps] which see padding at some positions: the other eight. A constant that is not zero comes out
        constant where the weights of these taps are zero
    padded_by: what `sometimes_padded` comes from, in words
    bias_locked_because: why no constant can be added to the bias, in words; None: it can
    plain: the weights are numbers as they stand, so that factors can move into them
    """

    weight: Array
    bias: Floats | None
    zero: Array
    scale: Floats
    always_inside: Bools
    sometimes_padded: Bools
    padded_by: str = "the zero padding"
    bias_locked_because: str | None = None
    plain: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, filters a group, inputs a group."""
        groups, filters, inputs, _ = self.weight.shape
        return groups, filters, inputs

    @property
    def offset(self) -> Floats:
        """The bias, zeros where there is none."""
        return np.zeros(self.shape[:2]) if self.bias is None else self.bias

    def present(self) -> Bools | None:
        """[groups, filters, inputs] whether any tap is not zero; None: everywhere. Mostly the first tap tells."""
        if self.plain and self.weight[..., 0].all():
            return None
        zero = self.zero[:, :, None]
        present: Bools = np.not_equal(self.weight[..., 0], zero)
        for tap in range(1, self.weight.shape[3]):
            if present.all():
                break
            present |= self.weight[..., tap] != zero
        return None if present.all() else present

    def stays_constant(self, inputs: Bools) -> Bools:
        """[groups, inputs] which of `inputs` come out constant where they are."""
        constant: Bools = inputs.copy()
        for group, block in self._columns(inputs) if self.sometimes_padded.any() else ():
            constant[group, inputs[group]] = (block[..., self.sometimes_padded] == self._zero(group)).all(axis=(0, 2))
        return constant

    def sums(self, inputs: Bools, value: Floats) -> Floats:
        """[groups, filters] the bias, and what constant inputs ([groups, inputs], with their value) add to it."""
        used = inputs & (value != 0)
        if not any_of(used):
            return self.offset
        shift = np.zeros(self.shape[:2])
        for group, block in self._columns(used):
            inside = block[..., self.always_inside]
            sums = inside.sum(axis=2, dtype=np.float64) - self._zero(group)[:, 0].astype(np.float64) * inside.shape[2]
            shift[group] = sums @ value[group, used[group]]
        return self.offset + shift * self.scale

    def _columns(self, inputs: Bools) -> list[tuple[int, Array]]:
        """Group by group, the weights that read `inputs`: [filters, inputs, taps]."""
        return [(int(group), self.weight[group][:, inputs[group]]) for group in np.flatnonzero(inputs.any(axis=1))]

    def _zero(self, group: int) -> Array:
        """[filters or 1, 1, 1] what counts as zero in a group."""
        zero: Array = self.zero[group if len(self.zero) > 1 else 0][:, None, None]
        return zero


def per_filter(weight: Weight, groups: int) -> tuple[Array, Floats]:
    """Zero point and scale of a weight as `MixingWeights` takes them."""
    zero, scale = weight.zero, weight.scale
    return zero.reshape(1 if zero.size == 1 else groups, -1), scale.reshape(1 if scale.size == 1 else groups, -1)


def write_bias(step: Step, index: int, bias: Weight | None, trim: Trim, dtype: np.dtype[Any]) -> None:
    """Stores the bias of a trim at input `index`."""
    if trim.bias is None:
        return
    if bias is None or bias.plain:
        step.graph.set_constant(step.node, index, trim.bias[trim.kept].astype(dtype))
    else:  # integers, to which nothing was added
        stored = np.where(trim.bias == 0, bias.zero, bias.values)
        bias.write(step.graph, stored.compress(trim.kept, axis=-1), trim.kept)


@dataclass(eq=False, slots=True)
class Plan:
    """What a handler remembers of a node: see `Mixing.constants`."""

    mix: MixingWeights | None  # the constants as they stand; None: they have changed and were not read since
    present: Array | None  # [groups, filters, inputs / 8] as `MixingWeights.present` tells; a bit an input
    absorbed: Bools  # [groups, inputs] constant inputs that the bias takes up, so that nobody needs them
    value: Floats  # [groups, inputs] what they count as
    filters: int
    bias_locked_because: str | None = None  # why no constant moves into the bias, in words
    addend: Link | None = None  # what the layer adds to its result, channel by channel

    def reached(self, inputs: Bools) -> Bools:
        """[groups, filters] that read any of `inputs`."""
        if self.present is None:
            return _spread(inputs, self.filters)
        return np.asarray((self.present & np.packbits(inputs, axis=1)[:, None, :]).any(axis=2))

    def read(self, filters: Bools) -> Bools:
        """[groups, inputs] that any of `filters` reads."""
        if self.present is None:
            return _spread(filters, self.absorbed.shape[1])
        bits = np.bitwise_or.reduce(self.present, axis=1, where=filters[:, :, None])
        return np.unpackbits(bits, axis=1, count=self.absorbed.shape[1]).astype(bool)


@dataclass(eq=False, slots=True)
class Trim:
    """New constants of an operator.

    weight: as in `MixingWeights`, cut; None: unchanged
    bias: [outputs] before the cut; None: unchanged
    kept: [outputs]
    groups: how many are left
    """

    weight: Array | None
    bias: Floats | None
    kept: Bools
    groups: int


class Mixing(Operator[Plan]):
    """Handler of operators that mix. A family says how its weights are read and written.

    bias_input: the index of the bias among the inputs; None: there is none.
    """

    bias_input: int | None = 2

    def read(self, step: Step) -> MixingWeights:
        """The operator's constants as they stand, in the common form. Raises Unsupported."""
        raise NotImplementedError

    def write(self, step: Step, trim: Trim) -> None:
        """Stores new constants."""
        raise NotImplementedError

    def data(self, step: Step) -> int:
        """The input that is mixed."""
        return 0

    def input_axis(self, step: Step) -> int:
        """The axis of the input that is mixed."""
        return 1

    def output_axis(self, step: Step) -> int:
        """The axis of the output that the filters make."""
        return 1

    def contribution(self, step: Step, value: Floats) -> Floats:
        """What constant inputs count as in the sums."""
        return value

    def result(self, step: Step, sums: Floats) -> tuple[Floats, Bools]:
        """[outputs] what comes out for constant sums, and where that is certain."""
        return sums, fits(sums, step.graph.dtype(step.made[0]))

    def bias_type(self, step: Step) -> np.dtype[Any]:
        """The element type of the bias, be it there or not."""
        return step.graph.dtype(step.made[0])

    def mix(self, step: Step[Plan]) -> MixingWeights:
        """The operator's constants as they stand; `read` is asked once for as long as they do not change."""
        plan: Plan = step.plan
        if plan.mix is None:
            plan.mix = self.read(step)
        return plan.mix

    def rewrite(self, step: Step[Plan], trim: Trim) -> None:
        """Stores new constants."""
        self.write(step, trim)
        step.plan.mix = None

    def couple(self, step: Step[Plan]) -> None:
        mix, source = self.read(step), self.source(step)
        target = step.create((self.output_axis(step),))
        groups, filters, inputs = mix.shape
        if mix.bias is not None and mix.bias.shape != (groups, filters):
            raise ValueError(f"a bias of {mix.bias.size} numbers for {groups * filters} filters")
        present = mix.present()
        bits = None if present is None else np.packbits(present, axis=2)
        step.plan = Plan(mix, bits, np.zeros((groups, inputs), bool), np.zeros((groups, inputs)), filters)
        if source is not None and groups > 1 and filters == inputs == 1:  # depthwise
            numbers = every(groups)
            step.link(source, target, numbers, numbers)

    def source(self, step: Step) -> Channels | None:
        """The channels that are mixed; None where nothing is known about them."""
        return step.along(self.data(step), self.input_axis(step))

    def constants(self, step: Step[Plan]) -> None:
        plan, target = step.plan, step.output
        if step.facts.after_cut:  # the cut makes filters that nobody needs zero
            value, certain = self.result(step, np.zeros(len(target)))
            target.constant = ~target.needed & certain
        else:
            mix, source = self.mix(step), self.source(step)
            constant = np.zeros(plan.absorbed.shape, bool)
            if source is not None:
                plan.value = self.contribution(step, source.value).reshape(constant.shape).copy()  # settling writes
                constant = source.constant.reshape(constant.shape)
                if any_of(other := constant & (plan.value != 0)):
                    constant = constant & (~other | mix.stays_constant(other))
                elif all_of(plan.reached(~constant)):  # zeros alone, and some of the rest in every sum
                    plan.absorbed = constant.copy()
                    return
            sums = mix.sums(constant, plan.value)
            plan.bias_locked_because = mix.bias_locked_because
            if plan.bias_locked_because is None and any_of(constant) and not fits(sums, self.bias_type(step)).all():
                plan.bias_locked_because = "a bias that cannot hold it"
            plan.absorbed = constant & ((plan.value == 0) | (plan.bias_locked_because is None))
            unknown = plan.reached(~constant)
            if all_of(unknown):
                target.constant, target.nonnegative = np.zeros((2, len(target)), bool)
                target.value = np.zeros(len(target))
                return
            value, certain = self.result(step, sums.ravel())
            target.constant = ~unknown.ravel() & certain
        target.value = only(value, target.constant)
        target.nonnegative = target.constant & (target.value >= 0)

    def need(self, step: Step[Plan]) -> None:
        plan, source, target = step.plan, self.source(step), step.output
        for index, channels in enumerate(step.inputs):
            added = plan.addend is not None and channels is plan.addend.source
            if channels is not None and channels is not source and not added:
                mixed = index == self.data(step)
                channels.pin(step.note(OTHER_AXIS if mixed else WHOLE))
        if (link := plan.addend) is not None:
            link.source.needed[link.out_of[target.needed[link.into]]] = True
        if source is None:
            return
        wanted = target.needed.reshape(len(plan.absorbed), plan.filters)
        needed = (plan.read(wanted) & ~plan.absorbed).ravel()
        source.needed |= needed
        if any_of(constant := needed & source.constant):
            value, why = source.value[constant][0], plan.bias_locked_because or self.mix(step).padded_by
            source.notes.append(step.note(f"the constant {value:.6g} meets {why}", constant))

    def retain(self, step: Step[Plan]) -> list[Retained]:
        plan, source, target = step.plan, self.source(step), step.output
        groups = len(plan.absorbed)
        if groups == 1 or target.is_removed or step.links:
            return super().retain(step)
        sides = [channels for channels in (source, target) if channels is not None]
        alive = np.any([channels.kept.reshape(groups, -1).any(axis=1) for channels in sides], axis=0)
        if source is None:
            alive[:] = True
        missing = [(channels, unbalanced(channels.kept.reshape(groups, -1), alive)) for channels in sides]
        reason = "every group keeps as many channels as the fullest one"
        return [Retained(channels, indices, reason) for channels, indices in missing if len(indices)]

    def slice(self, step: Step[Plan]) -> None:
        plan, source, target, mix = step.plan, self.source(step), step.output, self.mix(step)
        groups, filters, inputs = mix.shape
        kept_in = np.ones((groups, inputs), bool) if source is None else source.kept.reshape(groups, inputs)
        kept_out, unneeded = target.kept.reshape(groups, filters), ~target.needed.reshape(groups, filters)
        alive = np.asarray(kept_in.any(axis=1) & kept_out.any(axis=1))
        cut = not (all_of(kept_in) and all_of(kept_out))
        rows, columns = unneeded & kept_out, plan.absorbed & kept_in
        emptied = (any_of(rows) and (plan.read(rows) & kept_in).any()) or (
            any_of(columns) and (plan.reached(columns) & kept_out).any()
        )
        weight = _select(mix.weight, kept_in, kept_out, alive) if cut else mix.weight.copy() if emptied else None
        if weight is not None and emptied:
            zero = _taken(np.broadcast_to(mix.zero, rows.shape), kept_out, alive)
            removed = _taken(rows, kept_out, alive)[:, :, None] | _taken(columns, kept_in, alive)[:, None, :]
            np.copyto(weight, zero[:, :, None, None], where=removed[..., None])
        bias = np.where(unneeded, 0.0, mix.sums(plan.absorbed, plan.value))
        changed = (mix.bias is not None and not all_of(kept_out)) or any_of(bias != mix.offset)
        if weight is not None or changed:
            self.rewrite(step, Trim(weight, bias.ravel() if changed else None, target.kept, int(alive.sum())))

    def scale_output(self, step: Step[Plan], factors: Floats) -> bool:
        mix = self.mix(step)
        if not mix.plain:
            return False
        scale = factors.reshape(mix.shape[:2])
        bias = None if mix.bias is None else (mix.bias * scale).ravel()
        with np.errstate(over="ignore"):
            weight = mix.weight * scale[:, :, None, None].astype(mix.weight.dtype)
        if not np.isfinite(weight).all():
            return False
        self.rewrite(step, Trim(weight, bias, np.ones(scale.size, bool), len(scale)))
        return True

    def scales_input(self, step: Step[Plan]) -> bool:
        return self.source(step) is not None and self.mix(step).plain

    def scale_input(self, step: Step[Plan], factors: Floats) -> None:
        mix = self.mix(step)
        groups, filters, inputs = mix.shape
        weight = mix.weight * factors.reshape(groups, 1, inputs, 1).astype(mix.weight.dtype)
        self.rewrite(step, Trim(weight, None, np.ones(groups * filters, bool), groups))


def _spread(channels: Bools, width: int) -> Bools:
    """[groups, width] whether any of the `channels` [groups, …] of a group is there; not to be written to."""
    if len(channels) == 1:
        return (yes(width) if any_of(channels) else no(width))[None]
    return np.repeat(channels.any(axis=1, keepdims=True), width, axis=1)


def _taken(values: Array, kept: Bools, alive: Bools) -> Array:
    """[groups, channels] of the living groups, as many that are kept in each."""
    taken: Array = values[alive][kept[alive]].reshape(int(alive.sum()), -1)
    return taken


def _select(weight: Array, kept_in: Bools, kept_out: Bools, alive: Bools) -> Array:
    """[groups, filters, inputs, taps] cut to what is kept: as many filters and inputs in every group that lives."""
    if len(weight) == 1:
        rows = weight if all_of(kept_out) else _rows(weight, kept_out.nonzero()[1])
        return rows if all_of(kept_in) else rows.take(kept_in.nonzero()[1], axis=2)
    filters = np.nonzero(kept_out[alive])[1].reshape(int(alive.sum()), -1)
    inputs = np.nonzero(kept_in[alive])[1].reshape(int(alive.sum()), -1)
    selected: Array = weight[np.flatnonzero(alive)[:, None, None], filters[:, :, None], inputs[:, None, :]]
    return selected


def _rows(weight: Array, filters: Ints) -> Array:
    """[1, filters, inputs, taps] those filters."""
    if weight.flags.aligned or not weight.flags.c_contiguous or not weight[0, 0].size:
        return weight.take(filters, axis=1)
    # Read from a file, numbers may lie anywhere: numpy would make an aligned copy of all. It takes blocks as they are.
    _, _, inputs, taps = weight.shape
    blocks = weight.reshape(weight.shape[1], -1).view(np.dtype((np.void, weight[0, 0].nbytes)))
    taken: Array = blocks.take(filters).view(weight.dtype)
    return taken.reshape(1, -1, inputs, taps)


def unbalanced(kept: Bools, alive: Bools) -> Ints:
    """Channels to take back so that every living group keeps as many as the fullest one, and at least one."""
    size = kept.shape[1]
    counts = kept.sum(axis=1)
    wanted = max(1, int(np.max(counts)))
    back = [
        group * size + np.flatnonzero(~kept[group])[: wanted - counts[group]]
        for group in np.flatnonzero(alive & (counts < wanted))
    ]
    return np.concatenate(back) if back else np.empty(0, np.int64)
