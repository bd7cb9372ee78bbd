"""What gates save: units of channels become sites, layers become terms of a cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.costs import Cost, Factor, Layer, Term
from polar_deploy.surgery import rounds
from polar_deploy.surgery.choices import NEVER, Block, Site
from polar_deploy.surgery.count import SUMS, WEIGHTS, count, foldable_norms, layer_work, parameters
from polar_deploy.surgery.mixing import Mixing, Plan
from polar_deploy.surgery.reshape_channels import ALONG_ONE
from polar_deploy.surgery.survey import Survey, is_writer, numbers

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Channels, Ints, Step

MOST_READERS = 10  # of one parameter, in branches of their own; beyond that it counts as always there


@dataclass(frozen=True)
class Part:
    """Something that costs: so much for each combination of channels along `axes`, while its blocks are open.

    axes: for each factor, int [its length], the number of the channel that each index stands for.
    kernel, weights: see `Layer`.
    """

    cost: str
    each: float
    axes: tuple[Ints, ...]
    blocks: frozenset[int]
    kernel: int = 1
    weights: float = 0.0


class Pricing:
    """Sites, blocks and costs of a network whose channels go in `units` [channels of the graph], see `Survey.units`.

    Attributes:
        sites, blocks, alive, gate_of, folding: as in `Choices`.
        gated: bool [channels of the graph], those that a gate closes.
    """

    def __init__(self, survey: Survey, units: Ints) -> None:
        self._survey, self._units = survey, units
        norms = foldable_norms(survey.whole)
        self.folding = {survey.label(position): bias for position, bias in norms.items()}
        self._full = count(survey.whole, norms)
        self._work = layer_work(survey.detached.model)
        self._parts = [*self._macs(), *self._params()]
        groups = self._grouped()
        self._site_of = np.full(len(units), NEVER)  # by unit
        self._gate_of = np.full(len(units), NEVER)
        for index, members in enumerate(groups):
            self._site_of[members] = index
        self.sites = self._name(groups, self._blocks_of(len(groups)))
        for site, members in zip(self.sites, groups, strict=True):
            self._gate_of[members] = site.gates
        self.gated = np.where(units == NEVER, NEVER, self._gate_of[units]) != NEVER
        self.alive = self._alive(len(groups))
        start = sum(site.width for site in self.sites)
        names = _unique([survey.masks[cone.mask].name for cone in survey.blocks])
        self.blocks = tuple(
            Block(
                name,
                cone.mask,
                start + index,
                self._gates(survey.channels(cone.mask), cone.mask),
                frozenset(at for at, node in enumerate(survey.graph.original_nodes) if id(node) in cone.nodes),
            )
            for index, (name, cone) in enumerate(zip(names, survey.blocks, strict=True))
        )
        block_of = {block.mask: block.gate for block in self.blocks}
        self.gate_of = tuple(
            np.full(mask.width, block_of[index])
            if index in block_of
            else self._gates(survey.closable.get(index), index)
            for index, mask in enumerate(survey.masks)
        )

    def cost(self, name: str) -> Cost:
        """The cost "macs" or "params"."""
        return Cost(float(getattr(self._full, name)), tuple(self._term(part) for part in self._parts_of(name)))

    def layers(self) -> tuple[Layer, ...]:
        """What the MACs are made of."""
        return tuple(Layer(self._term(part), part.kernel, part.weights) for part in self._parts_of("macs"))

    def additions(self) -> tuple[Term, ...]:
        """Elements of the sums of computed tensors; one that a block is added in goes with the block."""
        found = []
        for step, elements in self._working():
            if self._is_sum(step):
                axes = self._widths(step)
                blocks = self._survey.blocks_of(step.node) | self._survey.added_in(step.node)
                found.append(self._term(Part("additions", elements / math.prod(map(len, axes)), axes, blocks)))
        return tuple(found)

    def _working(self) -> Iterator[tuple[Step, int]]:
        """The nodes that multiply or add up, and how much: see `layer_work`."""
        for position, node in enumerate(self._survey.graph.original_nodes):
            step = self._survey.steps.get(id(node))
            if step is not None and self._work.get(position):
                yield step, self._work[position]

    def _parts_of(self, cost: str) -> Iterator[Part]:
        return (part for part in self._parts if part.cost == cost)

    def _term(self, part: Part) -> Term:
        return Term(part.each, tuple(map(self._factor, part.axes)), part.blocks)

    def _factor(self, axis: Ints) -> Factor:
        unit = self._units[axis]
        site = np.where(unit == NEVER, NEVER, self._site_of[unit])
        which, times = np.unique(site[site != NEVER], return_counts=True)
        tables = {
            int(index): np.arange(self.sites[index].width + 1) * (float(count) / self.sites[index].width)
            for index, count in zip(which.tolist(), times.tolist(), strict=True)
        }
        return Factor(float(np.count_nonzero(site == NEVER)), tables)

    def _gates(self, channels: Ints | None, mask: int) -> Ints:
        """[width of the mask] the gates of the channels that it masks."""
        if channels is None:
            return np.full(self._survey.masks[mask].width, NEVER)
        unit = self._units[channels]
        return np.where(unit == NEVER, NEVER, self._gate_of[unit])

    def _macs(self) -> Iterator[Part]:
        for step, macs in self._working():
            if step.node.op not in SUMS:
                axes = self._widths(step)
                products, blocks = math.prod(map(len, axes)), self._survey.blocks_of(step.node)
                yield Part("macs", macs / products, axes, blocks, _kernel(step), _weights(step) / products)

    def _params(self) -> Iterator[Part]:
        """The parameters that are left where nothing is closed: surgery folds factors and what is constant."""
        opened = rounds.operate(self._survey.detached)[-1]
        model = opened.model.model
        shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        sizes = parameters(model)
        left = dict(zip(opened.labels, model.graph.node, strict=True))
        found: dict[str, tuple[float, tuple[Ints, ...]]] = {}  # what each parameter costs
        readers: dict[str, list[frozenset[int]]] = {}  # the blocks of each node that reads it
        for node in self._survey.graph.original_nodes:
            step, label = self._survey.steps.get(id(node)), self._survey.graph.label(node)
            proto = left.get(label)
            if step is None or proto is None:
                continue
            blocks = self._survey.blocks_of(node)
            if label in self.folding:
                if self.folding[label]:
                    yield Part("params", 1.0, (numbers(step.output),), blocks)
                continue
            for index, name in enumerate(proto.input):
                if name in sizes:
                    readers.setdefault(name, []).append(blocks)
                    if name not in found:
                        axes = self._parameter_axes(step, index, shapes.get(name, (sizes[name],)))
                        found[name] = sizes[name] / math.prod(map(len, axes)), axes
        for name, (each, axes) in found.items():
            for sign, blocks in _any_open(readers[name]):
                yield Part("params", sign * each, axes, blocks)

    def _widths(self, step: Step) -> tuple[Ints, ...]:
        """The axes whose product a node's multiply-accumulates are: those of its output, and the one it sums over."""
        output = self._survey.facts.of(step.made[0])
        axes = [] if output is None else self._independent(output)
        if isinstance(step.handler, Mixing) and isinstance(step.plan, Plan):
            source = step.handler.source(step)
            if source is not None and len(step.plan.absorbed) == 1:
                axes.append(numbers(source))
        return tuple(axes)

    def _independent(self, channels: Channels) -> list[Ints]:
        """The axes along which other gates stand at each index; one, of all channels, where that is so along several.

        Behind a head of attention, which goes whole, that is the axis of heads alone.
        """
        units = self._units[numbers(channels)].reshape(channels.dims)
        varying = [axis for at, axis in enumerate(channels.axes) if (units != units.take([0], axis=at)).any()]
        return (
            [numbers(channels)] if len(varying) > 1 else [_along(channels, axis) for axis in varying or channels.axes]
        )

    def _parameter_axes(self, step: Step, index: int, shape: tuple[int, ...]) -> tuple[Ints, ...]:
        """The axes of a parameter that run along channels."""
        output = self._survey.facts.of(step.made[0])
        if output is None:
            return ()
        if isinstance(step.handler, Mixing):
            return self._widths(step) if index != step.handler.bias_input else (numbers(output),)
        if step.node.op in WEIGHTS:
            return ()  # a product over another axis, such as that of tokens: it is the same for all channels
        if step.node.op in ALONG_ONE:
            return (numbers(output),) if math.prod(shape) == len(output) else ()
        shift = len(step.graph.shape(step.made[0]) or ()) - len(shape)
        own = [(axis - shift, axis, dim) for axis, dim in zip(output.axes, output.dims, strict=True)]
        return tuple(_along(output, axis) for at, axis, dim in own if at >= 0 and shape[at] == dim)

    def _grouped(self) -> list[list[int]]:
        """The units that appear in the same parts equally often, together; those that cost nothing are left out."""
        draw = np.random.default_rng(0)
        marks = np.zeros(len(self._units), np.uint64)  # a hash of where a unit appears; sums wrap around
        for part in self._parts:
            for axis in part.axes:
                unit, times = np.unique(self._units[axis], return_counts=True)
                known = unit != NEVER
                marks[unit[known]] += draw.integers(1, 2**63, dtype=np.uint64) * times[known].astype(np.uint64)
        groups: dict[int, list[int]] = {}
        for index in np.flatnonzero(marks).tolist():
            groups.setdefault(int(marks[index]), []).append(index)
        return list(groups.values())

    def _blocks_of(self, count: int) -> list[frozenset[int]]:
        """For each site the blocks that hold every part it appears in."""
        inside: list[frozenset[int] | None] = [None] * count
        for part in self._parts:
            for site in self._sites_of(part.axes):
                known = inside[site]
                inside[site] = part.blocks if known is None else known & part.blocks
        return [blocks or frozenset() for blocks in inside]

    def _alive(self, count: int) -> tuple[frozenset[int], ...]:
        """Sets of blocks (indices) of which one has to stay: those of `Survey`, and blocks that alone write a site.

        Such are the blocks of a stage into whose shortcut zeros are padded: were all closed, so would be channels that
        have to pay for themselves behind them. Of blocks in each other the innermost stands for all.
        """
        survey = self._survey
        writers: list[set[frozenset[int]]] = [set() for _ in range(count)]  # the blocks of each, by site
        for step in filter(is_writer, survey.facts.alive):
            for site in self._sites_of([numbers(step.output)]):
                writers[site].add(survey.blocks_of(step.node))
        found = set(survey.alive)
        for part in self._parts:
            for site in self._sites_of(part.axes):
                away = [blocks - part.blocks for blocks in writers[site]]
                if away and all(away):
                    inner = (min(blocks, key=lambda index: len(survey.blocks[index].nodes)) for blocks in away)
                    found.add(frozenset(inner))
        return tuple(sorted((one for one in found if not any(other < one for other in found)), key=sorted))

    def _sites_of(self, axes: Sequence[Ints]) -> list[int]:
        """The sites that have channels on some of these axes."""
        units = np.unique(np.concatenate([self._units[axis] for axis in axes] or [np.empty(0, np.int64)]))
        sites = np.unique(self._site_of[units[units != NEVER]])
        return [site for site in sites.tolist() if site != NEVER]

    def _name(self, groups: Sequence[Sequence[int]], blocks: Sequence[frozenset[int]]) -> tuple[Site, ...]:
        """The sites, named by the first layer that writes their channels."""
        names, sizes, streams = ["gate"] * len(groups), [1] * len(groups), self._summed()
        layers = {id(node) for nodes in self._survey.layers.values() for node in nodes}  # tables as well
        for step in reversed([step for step in self._survey.facts.alive if is_writer(step) or id(step.node) in layers]):
            unit = self._units[numbers(step.outputs[0])] if step.outputs else np.empty(0, np.int64)
            site_of = self._site_of[unit[unit != NEVER]]
            written, times = np.unique(site_of[site_of != NEVER], return_counts=True)
            for site, channels in zip(written.tolist(), times.tolist(), strict=True):
                names[site], sizes[site] = self._survey.name(step.node), max(1, channels // len(groups[site]))
        starts = np.cumsum([0, *map(len, groups)]).tolist()
        return tuple(
            Site(
                name,
                "stream" if site in streams else "channel",
                range(starts[site], starts[site + 1]),
                sizes[site],
                blocks[site],
            )
            for site, name in enumerate(_unique(names))
        )

    @staticmethod
    def _is_sum(step: Step) -> bool:
        """Whether it adds computed tensors."""
        return step.node.op in SUMS and sum(channels is not None for channels in step.inputs) > 1

    def _summed(self) -> set[int]:
        """The sites that are sums of several computed tensors."""
        found: set[int] = set()
        for step in self._survey.facts.alive:
            if self._is_sum(step):
                for channels in step.outputs:
                    units = self._units[numbers(channels)]
                    found.update(self._site_of[units[units != NEVER]].tolist())
        return found


def _kernel(step: Step) -> int:
    """Elements of a layer's kernel; 1 where it has none."""
    shape = step.graph.shape(step.original[1]) if step.node.op in ("Conv", "ConvTranspose") else None
    return math.prod(dim for dim in shape[2:] if isinstance(dim, int)) if shape is not None else 1


def _weights(step: Step) -> int:
    """How many weights a layer has; 0 where it multiplies two computed tensors."""
    values = step.original[WEIGHTS[step.node.op]].values
    return values.size if values is not None else 0


def _any_open(readers: Sequence[frozenset[int]]) -> Iterator[tuple[int, frozenset[int]]]:
    """Signed sets of blocks whose products add up to 1 while all blocks of at least one reader are open, else to 0.

    By inclusion and exclusion; a reader that needs no more than another one stands for both.
    """
    least = [one for one in dict.fromkeys(readers) if not any(other < one for other in readers)]
    if len(least) > MOST_READERS:
        least = [frozenset()]
    for size in range(1, len(least) + 1):
        for chosen in combinations(least, size):
            yield (-1) ** (size + 1), frozenset().union(*chosen)


def _along(channels: Channels, axis: int) -> Ints:
    """[length of the axis] the number of the first channel at each index along it."""
    grid = numbers(channels).reshape(channels.dims)
    position = channels.axes.index(axis)
    return np.moveaxis(grid, position, 0).reshape(len(grid) if position == 0 else grid.shape[position], -1)[:, 0]


def _unique(names: Sequence[str]) -> list[str]:
    """The names, the second of a name with `#2`."""
    seen = Counter[str]()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
