"""LSTM, GRU and RNN: columns of closed input channels go, and hidden units that nobody needs.

What an input channel that is constant adds to the gates goes into the first half of the bias. A hidden unit is needed
where its output is, or where a needed unit reads it at the next step. A unit whose candidate state has no weights, and
that starts at zero, stays zero. Zeros that are computed, as PyTorch exports them, are no states to start from: without
any, units start at zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from polar_deploy.surgery.arrays import all_of, any_of, every
from polar_deploy.surgery.dtype_limits import fits
from polar_deploy.surgery.facts import Link
from polar_deploy.surgery.mixing import OTHER_AXIS, WHOLE
from polar_deploy.surgery.operator import Operator, Retained

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step

# W: [directions, gates * hidden, inputs]; R: the same with hidden units for inputs; P: [directions, 3 * hidden];
# B: [directions, 2 * gates * hidden], those of W and those of R.
INPUT, WEIGHT, RECURRENCE, BIAS, PEEPHOLES = 0, 1, 2, 3, 7
STATES = (5, 6)  # where units start: [directions, batch, hidden]
MIXED = "its units start where an input says"
FED = "units that stay read its units at the next step"
BOTH = "both directions keep the same hidden units"


class Kind(NamedTuple):
    """gates: how many there are; candidate: which of them makes the new state; squash: activations that this meets."""

    gates: int
    candidate: int
    squash: tuple[int, ...]


KINDS = {"LSTM": Kind(4, 3, (1, 2)), "GRU": Kind(3, 2, (1,)), "RNN": Kind(1, 0, (0,))}
ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
ZERO_AT_ZERO = ("Tanh", "Relu", "LeakyRelu", "ThresholdedRelu", "Softsign", "Elu", "ScaledTanh")


@dataclass(eq=False)
class Cells:
    """What a handler knows of a recurrent layer. [directions, hidden] each, unless it says otherwise.

    results: channels of the outputs, the same units in each; fixed: whether all units stay.
    zeros: inputs that hold computed states, all of them zero.
    absorbed: [input channels] constants that the bias takes up; moved: [directions, gates * hidden] what they add.
    zero: units that are zero throughout; needed: those that somebody needs.
    """

    directions: int
    hidden: int
    results: list[Channels] = field(default_factory=list)
    fixed: bool = False
    zeros: frozenset[int] = frozenset()
    absorbed: Bools = field(init=False)
    moved: Floats = field(init=False)
    zero: Bools = field(init=False)
    needed: Bools = field(init=False)

    def __post_init__(self) -> None:
        self.zero = np.zeros((self.directions, self.hidden), bool)
        self.needed = ~self.zero

    def of_units(self, array: Array) -> Array:
        """[directions, gates, hidden, …] of what has a row for each gate of each unit."""
        return array.reshape(self.directions, -1, self.hidden, *array.shape[2:])


class Recurrent(Operator[Cells]):
    """Handler of a recurrent layer. Its plan is a `Cells`."""

    def couple(self, step: Step[Cells]) -> None:
        source, attrs = self.source(step), step.node.attrs
        weight, recurrence = step.parameter(WEIGHT, "weight"), step.parameter(RECURRENCE, "weight")
        if source is not None and weight.shape[-1] != len(source):
            raise ValueError(f"it reads {len(source)} channels with {weight.shape}")
        for index, what in ((BIAS, "bias"), (PEEPHOLES, "peephole weight")):
            if step.has(index):
                step.parameter(index, what)
        step.plan = cells = Cells(len(recurrence), recurrence.shape[-1])
        if attrs.get("hidden_size", cells.hidden) != cells.hidden or weight.shape[1] % cells.hidden:
            raise ValueError(f"{attrs['hidden_size']} hidden units of {recurrence.shape}")
        computed = [index for index in STATES if step.has(index) and step.constant(index) is None]
        cells.zeros = frozenset(index for index in computed if _is_zero(step.inputs[index]))
        cells.fixed = not cells.zeros.issuperset(computed)
        for output, tensor in enumerate(step.made):
            if tensor.name and (tensor.outputs or not step.graph.is_private(tensor.name)):
                self._open(step, cells, output)

    def source(self, step: Step) -> Channels | None:
        """The channels that the layer reads; None where nothing is known about them."""
        return step.along(INPUT, step.rank() - 1)

    def _open(self, step: Step, cells: Cells, output: int) -> None:
        """Opens the facts about an output: [steps, directions, batch, hidden], the last two have no steps."""
        rank, batch_first = 4 if output == 0 else 3, bool(step.node.attrs.get("layout", 0))
        directions = (2 if batch_first else 1) if output == 0 else (1 if batch_first else 0)
        shape = step.graph.shape(step.made[output])
        if shape is None or shape[-1] != cells.hidden or shape[directions] != cells.directions:
            cells.fixed = True
            return
        axes = (rank - 1,) if cells.directions == 1 else (directions, rank - 1)
        target = step.create(axes, output)
        if cells.results:
            numbers = every(len(target))
            step.ties.append(Link(cells.results[0], target, numbers, numbers))
        cells.results.append(target)

    def constants(self, step: Step[Cells]) -> None:
        """Asked first, it finds what the bias can take up, and which units are zero; then, which become so."""
        cells = step.plan
        if not step.facts.after_cut:
            self._absorb(step, cells)
            cells.zero = self._zeros(step, cells)
        zero = cells.zero if not step.facts.after_cut else cells.zero | (~cells.needed & self._rests(step))
        for target in cells.results:
            target.constant, target.value = zero.ravel().copy(), np.zeros(len(target))
            target.nonnegative = zero.ravel().copy()

    def _absorb(self, step: Step, cells: Cells) -> None:
        source, weight = self.source(step), step.parameter(WEIGHT, "weight")
        if source is None:
            cells.absorbed = np.zeros(weight.shape[-1], bool)
            cells.moved = np.zeros(weight.shape[:2])
            return
        cells.absorbed = source.constant.copy()
        cells.moved = weight[..., cells.absorbed].astype(np.float64) @ source.value[cells.absorbed]
        if not fits(cells.moved, weight.dtype).all():
            cells.absorbed &= source.value == 0
            cells.moved = np.zeros_like(cells.moved)

    def _zeros(self, step: Step[Cells], cells: Cells) -> Bools:
        """[directions, hidden] units that are zero throughout: all at first, then those that others do not wake."""
        kind = KINDS[step.node.op]
        if not self._rests(step):
            return np.zeros_like(cells.zero)
        weight = cells.of_units(step.parameter(WEIGHT, "weight"))[:, kind.candidate]
        recurrence = cells.of_units(step.parameter(RECURRENCE, "weight"))[:, kind.candidate]
        bias = cells.of_units(cells.moved)[:, kind.candidate].copy()
        awake = weight[..., ~cells.absorbed].any(axis=2)
        if step.has(BIAS):
            both = step.parameter(BIAS, "bias").reshape(cells.directions, 2, kind.gates, -1)[:, :, kind.candidate]
            awake = awake | (both[:, 1] != 0)
            bias += both[:, 0]
        awake = awake | (bias != 0)
        while True:
            woken = awake | (recurrence.astype(bool) & awake[:, None, :]).any(axis=2)
            if np.array_equal(woken, awake):
                return np.asarray(~awake)
            awake = woken

    def _rests(self, step: Step[Cells]) -> bool:
        """Whether a unit without weights stays zero: it starts there, and its activations leave it there."""
        kind, cells = KINDS[step.node.op], step.plan
        names = list(step.node.attrs.get("activations", ACTIVATIONS[step.node.op] * cells.directions))
        squash = [names[at :: len(ACTIVATIONS[step.node.op])] for at in kind.squash]
        starts = [step.constant(index) for index in STATES if step.has(index) and index not in cells.zeros]
        if any(name not in ZERO_AT_ZERO for each in squash for name in each):
            return False
        return all(values is not None and not any_of(values != 0) for values in starts)

    def need(self, step: Step[Cells]) -> None:
        cells, source = step.plan, self.source(step)
        wanted = np.full(cells.zero.shape, cells.fixed)
        for target in cells.results:
            wanted = wanted | target.needed.reshape(wanted.shape)
        reads = cells.of_units(step.parameter(RECURRENCE, "weight")).any(axis=1) & ~cells.zero[:, None, :]
        asked = wanted
        while True:
            more = wanted | (reads & wanted[:, :, None]).any(axis=1)
            if np.array_equal(more, wanted):
                break
            wanted = more
        cells.needed = wanted
        for target in cells.results:
            if any_of(fed := wanted & ~asked):
                target.notes.append(step.note(FED, fed.ravel()))
            target.needed |= wanted.ravel()
            if cells.fixed:
                target.pin(step.note(MIXED))
        if source is not None:
            read = cells.of_units(step.parameter(WEIGHT, "weight"))[np.nonzero(wanted)[0], :, np.nonzero(wanted)[1]]
            source.needed |= read.any(axis=(0, 1)) & ~cells.absorbed
        for index, channels in enumerate(step.inputs):
            if index in cells.zeros and channels is not None:
                step.replaced[index] = np.zeros(len(channels))
            elif channels is not None and channels is not source:
                channels.pin(step.note(OTHER_AXIS if index == INPUT else WHOLE))

    def retain(self, step: Step[Cells]) -> list[Retained]:
        source, cells = self.source(step), step.plan
        found = []
        if source is not None and source.is_removed:
            found.append(Retained(source, np.zeros(1, np.int64), "an operator must keep one input channel"))
        for target in cells.results:
            kept = target.kept.reshape(cells.zero.shape)
            missing = np.flatnonzero(kept.any(axis=0) & ~kept)
            if len(missing):
                found.append(Retained(target, missing, BOTH))
        return found

    def slice(self, step: Step[Cells]) -> None:
        source, cells, weight = self.source(step), step.plan, step.parameter(WEIGHT, "weight")
        units: Bools = np.ones(cells.hidden, bool)
        for target in cells.results:
            units = np.any(target.kept.reshape(cells.zero.shape), axis=0)
        idle = ~cells.needed & units  # they stay, and nobody needs them
        held = step.constant(BIAS) if step.has(BIAS) else None
        bias = np.zeros((cells.directions, 2 * weight.shape[1])) if held is None else held.astype(np.float64)
        bias[:, : weight.shape[1]] += cells.moved
        emptied = np.where(cells.absorbed, np.zeros((), weight.dtype), weight)
        columns = None if source is None else source.kept
        self._write(step, WEIGHT, weight, emptied, idle, units, columns)
        recurrence = step.parameter(RECURRENCE, "weight")
        self._write(step, RECURRENCE, recurrence, recurrence, idle, units, units)
        if held is not None or cells.moved.any():
            self._write(step, BIAS, held, bias.astype(weight.dtype), idle, units)
        if step.has(PEEPHOLES):
            values = step.parameter(PEEPHOLES, "weight")
            self._write(step, PEEPHOLES, values, values, idle, units)
        for index in STATES:
            if index in cells.zeros:
                step.graph.leave_out(step.node, index)
            elif not units.all() and step.has(index):
                step.graph.set_constant(step.node, index, step.parameter(index, "state")[..., units])
        if not units.all() and "hidden_size" in step.node.attrs:
            step.graph.set_attribute(step.node, "hidden_size", int(units.sum()))

    def _write(
        self,
        step: Step[Cells],
        index: int,
        old: Array | None,
        new: Array,
        idle: Bools,
        units: Bools,
        columns: Bools | None = None,
    ) -> None:
        """Stores what has a row for each gate of each unit: zero for those that are idle, cut to the `units`."""
        cells = step.plan
        rows = cells.of_units(new).copy()
        rows[np.broadcast_to(idle[:, None], rows.shape[:3])] = 0
        rows = rows[:, :, units]
        values = rows.reshape(cells.directions, -1, *rows.shape[3:])
        values = values if columns is None else values[..., columns]
        if old is None or values.shape != old.shape or not np.array_equal(values, old):
            step.graph.set_constant(step.node, index, values)


def _is_zero(channels: Channels | None) -> bool:
    return channels is not None and all_of(channels.constant & (channels.value == 0))


HANDLERS: dict[str, Operator] = {name: Recurrent() for name in KINDS}
