"""Which channels of a network can go, found by closing them: surgery's own facts are asked with masks at zero."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import numpy as np

from polar_deploy.surgery import rounds, sets
from polar_deploy.surgery.choices import MASK, NEVER, Mask, constant_name, with_values
from polar_deploy.surgery.count import WEIGHTS
from polar_deploy.surgery.facts import Facts, Step
from polar_deploy.surgery.graph import Graph
from polar_deploy.surgery.ir import Node, Tensor
from polar_deploy.surgery.mixing import Mixing, Plan

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import DetachedModel
    from polar_deploy.surgery.facts import Bools, Channels, Ints, Note

QUIET_ROUNDS = 2  # pairs of random halves that have to be closed without a channel that stays


class Cone(NamedTuple):
    """A block that can close: the index of its mask, and the ids of the nodes that feed nothing then."""

    mask: int
    nodes: frozenset[int]


class Survey:
    """The facts about a graph with masks.

    Attributes:
        steps: by the id of their node, those that run.
        blocks: the blocks that can close, in the order of execution.
        alive: sets of blocks (indices) of which one has to stay.
        layers: the nodes that compute with the weights of each layer, by its name.
        reasons: why branches that a mask could close are no blocks, by the mask's name.
        stayed: channels (their numbers) that surgery left when masks closed them, and what it noted.
    """

    def __init__(
        self,
        whole: DetachedModel,
        detached: DetachedModel,
        masks: Sequence[Mask],
        name_of: Callable[[int], str | None],
        layers: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self.whole, self.detached, self.masks = whole.model, detached, masks
        self.graph = Graph(detached)
        self.facts = Facts(self.graph)
        sets.decide(self.facts)
        self.facts.update_after_cut()
        self.steps = {id(step.node): step for step in self.facts.alive}
        held = {self.graph.metadata(node).get(MASK): node for node in self.graph.original_nodes}
        own = [node for node in self.graph.original_nodes if MASK not in self.graph.metadata(node)]
        self._own = own
        self._names = {id(node): name_of(position) for position, node in enumerate(own)}
        self._muls: list[Node] = [held[mask.name] for mask in masks]
        self._layer_of: dict[int, str] = {}
        self.layers = self._layers(layers)
        self._layer_of.update({id(node): name for name, nodes in self.layers.items() for node in nodes})
        self.reasons: dict[str, str] = {}
        self.stayed: list[tuple[Ints, Note]] = []
        self.blocks, self.alive = self._blocks()
        self.alive += self._vital()

    def name(self, node: Node) -> str:
        """What a node's layer is called."""
        return self._names.get(id(node)) or self._layer_of.get(id(node)) or self.graph.label(node)

    def label(self, position: int) -> str:
        """What the node at a position of the graph without masks is called in reports."""
        return self.graph.label(self._own[position])

    def _layers(self, layers: Mapping[str, Collection[int]] | None) -> dict[str, list[Node]]:
        """By their names; where nobody tells, all nodes that multiply by a constant."""
        if layers is not None:
            return {name: [self._own[position] for position in positions] for name, positions in layers.items()}
        found: dict[str, list[Node]] = {}
        for node in self._own:
            if node.op in WEIGHTS and any(tensor.values is not None for tensor in node.inputs):
                found.setdefault(self.name(node), []).append(node)
        return found

    def blocks_of(self, node: Node) -> frozenset[int]:
        """Indices of the blocks that a node goes with."""
        return frozenset(index for index, cone in enumerate(self.blocks) if id(node) in cone.nodes)

    def added_in(self, node: Node) -> frozenset[int]:
        """Indices of the blocks that a sum adds to a shortcut."""
        return frozenset(self._added.get(id(node), ()))

    @cached_property
    def _added(self) -> dict[int, list[int]]:
        return self._by_sum(self.blocks)

    def channels(self, mask: int) -> Ints | None:
        """Numbers, in the graph, of the channels that a mask lies on; None where surgery cannot follow them."""
        step = self.steps.get(id(self._muls[mask]))
        source = step.inputs[0] if step is not None else None
        known = source is not None and source.axes == (self.masks[mask].axis,) and len(source) == self.masks[mask].width
        return numbers(source) if known and source is not None else None

    @cached_property
    def closable(self) -> dict[int, Ints]:
        """For each mask of single channels that can be followed: `channels`."""
        found = {index: self.channels(index) for index, mask in enumerate(self.masks) if not mask.block}
        return {index: channels for index, channels in found.items() if channels is not None}

    @cached_property
    def labels(self) -> Ints:
        """[channels of the graph] the smallest channel that each one goes with."""
        return sets.components(self.facts, list(self._bundles()))

    def units(self) -> Ints:
        """[channels of the graph] the smallest channel that each one can go with; `NEVER` for those that stay."""
        labels = self.labels
        possible = np.zeros(self.facts.total, bool)
        for closed in self.closable.values():
            possible[labels[closed]] = True
        for channels in self.facts.everything():
            possible[labels[numbers(channels)[channels.pinned]]] = False
        self._strike(labels, possible)
        return np.where(possible[labels], labels, NEVER)

    def _bundles(self) -> Iterator[tuple[Ints, Ints]]:
        """Pairs of channels that are chosen together although each could be cut alone.

        A group of a grouped convolution goes whole, inside and out (one channel of every group would be another way);
        so does a head of attention, with its queries, keys and values; and what one weight reads or writes in several
        places, as each place would get a copy of its own otherwise.
        """
        shared: dict[str, Step] = {}
        for step in self.facts.alive:
            tensors = step.handler.heads(step)
            for channels, head in tensors:
                leader, own = tensors[0]
                yield (leader.first + np.unique(own, return_index=True)[1])[head], numbers(channels)
            if is_writer(step) and (groups := len(step.plan.absorbed)) > 1:
                sides = [x for x in (step.handler.source(step), step.output) if x is not None]  # type: ignore[attr-defined]
                members = [numbers(side).reshape(groups, -1) for side in sides]
                for each in members:
                    yield np.broadcast_to(members[0][:, :1], each.shape).ravel(), each.ravel()
            for root in dict.fromkeys(filter(None, (self.parameter(step, i) for i in range(len(step.original))))):
                first = shared.setdefault(root, step)
                ends = [(self.facts.of(x.made[0]), x.inputs[0]) for x in (first, step)] if first is not step else []
                for a, b in zip(*ends, strict=True):
                    if a is not None and b is not None and len(a) == len(b):
                        yield numbers(a), numbers(b)

    def parameter(self, step: Step, index: int) -> str | None:
        """The name of the parameter (a float constant that is no scalar) that an input is, perhaps rearranged."""
        tensor = step.original[index]
        if tensor.values is None or not tensor.values.ndim or tensor.values.dtype.kind != "f":
            return None
        return None if MASK in self.graph.metadata(step.node) else self.graph.origin(tensor.name)

    def _strike(self, labels: Ints, possible: Bools) -> None:
        """Takes from `possible` [units] what surgery keeps when it is closed: random halves, until nothing stays."""
        draw = np.random.default_rng(0)
        quiet = 0
        while quiet < QUIET_ROUNDS and possible.any():
            half = possible & (draw.random(len(possible)) < 0.5)
            stayed = [self._staying(labels, closed) for closed in (half, possible & ~half)]
            possible &= ~(stayed[0] | stayed[1])
            quiet = 0 if np.any(stayed) else quiet + 1
        self._set_masks({})

    def _staying(self, labels: Ints, closed: Bools) -> Bools:
        """Which of the units `closed` surgery would keep. Each mask lets at least one channel through."""
        closed = closed.copy()
        for own in self.closable.values():
            if closed[labels[own]].all():
                closed[labels[own[0]]] = False
        self._set_masks({mask: ~closed[labels[own]] for mask, own in self.closable.items()})
        facts, _ = sets.plan(self.graph)
        kept = np.zeros_like(closed)
        for channels in facts.everything():
            kept[labels[numbers(channels)[channels.kept]]] = True
        kept &= closed
        for channels in facts.everything() if kept.any() else ():
            own = numbers(channels)
            if channels.notes and (stays := kept[labels[own]]).any():
                self.stayed.append((own[stays], channels.notes[-1]))
        return kept

    def _set_masks(self, values: dict[int, Bools]) -> None:
        """Writes values into the masks of the graph; those not named are open."""
        for index, node in enumerate(self._muls):
            if self.graph.contains(node):
                constant = node.inputs[1]
                assert constant.values is not None
                opened = values.get(index, np.ones(self.masks[index].width, bool))
                constant.values = opened.astype(np.float32).reshape(constant.values.shape)

    def _blocks(self) -> tuple[list[Cone], list[frozenset[int]]]:
        """The blocks, and which of them cannot all go.

        Blocks that are the sides of one sum must not all go. Any others that would take more with them together than
        each by itself lose the one with the smallest cone, until there are none.
        """
        found = [self._block(index) for index, mask in enumerate(self.masks) if mask.block]
        found = [cone for cone in found if self._saves(cone) and not self._leaves_factor(cone)]
        found = self._that_go(found)
        while True:
            sums = self._sums(found)
            single = frozenset[int]().union(*(cone.nodes for cone in found))
            for closed in _closed_together(found, sums):
                if extra := self._cone({cone.mask for cone in closed}) - single:
                    break
            else:
                return found, [frozenset(each) for each in sums]
            found.remove(min(self._behind(found, extra), key=lambda cone: len(cone.nodes)))

    def _block(self, mask: int) -> Cone:
        """What a mask on a branch closes: all that only feeds it, and what lies between it and the sum."""
        between, _, _ = self._way(mask)
        return Cone(mask, self._cone({mask}) | frozenset(map(id, between)))

    def _that_go(self, found: list[Cone]) -> list[Cone]:
        """The blocks of which surgery leaves nothing: it keeps a sum, for one, whose shape is not known."""
        pending = found
        for closed in _closed_together(found, self._sums(found)):
            masks = [self.masks[cone.mask] for cone in closed]
            zeros = {constant_name(mask): np.zeros(mask.shape, np.float32) for mask in masks}
            left = set(rounds.operate(with_values(self.detached, zeros))[-1].labels)
            stay = [
                c for c in closed if any(id(n) in c.nodes and self.graph.label(n) in left for n in self.graph.nodes)
            ]
            pending = [cone for cone in pending if cone not in stay]
            for cone in stay:
                self.reasons[self.masks[cone.mask].name] = "surgery cannot drop the sum that its branch is added in"
        return pending

    def _saves(self, cone: Cone) -> bool:
        """Whether a layer with weights goes with a block."""
        costs = (node for node in self.graph.nodes if node.op in WEIGHTS and node.domain in ("", "ai.onnx"))
        return any(id(node) in cone.nodes for node in costs)

    def _leaves_factor(self, cone: Cone) -> bool:
        """Whether the shortcut of a block has factors of its own, one a channel: they would fold into what comes next
        in its place, so that what a block saves would be a matter of which others are closed."""
        _, total, side = self._way(cone.mask)
        beside = [tensor.inputs[0] for tensor in total.inputs if tensor is not side and tensor.inputs]
        makers = [node.inputs[0].inputs[0] if MASK in self.graph.metadata(node) else node for node in beside]
        scaled = [tensor for node in makers if node.op == "Mul" for tensor in node.inputs]
        if not any(tensor.values is not None and tensor.values.size > 1 for tensor in scaled):
            return False
        self.reasons[self.masks[cone.mask].name] = "its shortcut has factors, which would fold into other layers"
        return True

    def _way(self, mask: int) -> tuple[list[Node], Node, Tensor]:
        """From the mask of a block to its shortcut: what lies between, the sum, and the block's side of it."""
        between, tensor = list[Node](), self._muls[mask].outputs[0]
        while (reader := tensor.outputs[0]).op != "Add":
            between.append(reader)
            tensor = reader.outputs[0]
        return between, reader, tensor

    def _sums(self, found: Sequence[Cone]) -> list[tuple[int, ...]]:
        """Blocks (indices) that are added to each other, with nothing else in the sum."""
        return [tuple(each) for each in self._by_sum(found).values() if len(each) > 1]

    def _by_sum(self, found: Sequence[Cone]) -> dict[int, list[int]]:
        """Blocks (indices) by the id of the sum that each is added in."""
        added: dict[int, list[int]] = {}
        for index, cone in enumerate(found):
            added.setdefault(id(self._way(cone.mask)[1]), []).append(index)
        return added

    def _vital(self) -> list[frozenset[int]]:
        """More sets of blocks (indices) that cannot all go: without them an output would be the same for all inputs."""
        every, vital = range(len(self.blocks)), list[frozenset[int]]()
        while not self._is_dead(set()):
            for pick in (min, max):
                closed = set(every) - {pick(kept) for kept in (*self.alive, *vital)}
                if self._is_dead(closed):
                    break
            else:
                break
            for block in sorted(closed):
                if self._is_dead(closed - {block}):
                    closed.remove(block)
            vital.append(frozenset(closed))
        return vital

    def _is_dead(self, blocks: set[int]) -> bool:
        """Whether no value of an input reaches some output while these are closed."""
        reached = depending(self.graph, {id(self._muls[self.blocks[index].mask]) for index in blocks})
        return not reached.issuperset(tensor.name for tensor in self.graph.outputs)

    def _behind(self, found: Sequence[Cone], nodes: frozenset[int]) -> list[Cone]:
        """The blocks that are computed from some of these nodes."""
        reached = set(nodes)
        for node in self.graph.nodes:
            if any(tensor.inputs and id(tensor.inputs[0]) in reached for tensor in node.inputs):
                reached.add(id(node))
        return [cone for cone in found if id(self._muls[cone.mask]) in reached] or list(found)

    def _cone(self, masks: set[int]) -> frozenset[int]:
        """Ids of the nodes that feed nothing when these masks are closed, and something when they are open."""
        return self._unread({id(self._muls[mask]) for mask in masks}) - self._idle

    @cached_property
    def _idle(self) -> frozenset[int]:
        """Ids of the nodes that others stand for."""
        return self._unread(set())

    def _unread(self, dead: set[int]) -> frozenset[int]:
        """Ids of `dead` nodes, and of those that only they read."""
        for node in reversed(self.graph.nodes):
            private = all(self.graph.is_private(tensor.name) for tensor in node.outputs)
            if private and all(id(reader) in dead for tensor in node.outputs for reader in tensor.outputs):
                dead.add(id(node))
        return frozenset(dead)


def _closed_together(found: list[Cone], sums: Sequence[tuple[int, ...]]) -> list[list[Cone]]:
    """All blocks but one of each sum: the first of them or, where there are sums, the last."""
    stay = [{each[0] for each in sums}, {each[-1] for each in sums}] if sums else [set[int]()]
    return [[cone for index, cone in enumerate(found) if index not in kept] for kept in stay] if found else []


def depending(graph: Graph, without: Collection[int] = ()) -> set[str]:
    """Names of the tensors that values of an input reach, other than through the nodes (by their ids) `without`."""
    reached = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        if node.op not in ("Shape", "Size") and id(node) not in without and reached & {t.name for t in node.inputs}:
            reached.update(tensor.name for tensor in node.outputs)
    return reached


def numbers(channels: Channels) -> Ints:
    """The numbers of a tensor's channels among all channels of the graph."""
    return channels.first + np.arange(len(channels))


def is_writer(step: Step) -> TypeGuard[Step[Plan]]:
    """Whether a node computes channels of its own from all that it reads: no depthwise convolution."""
    return isinstance(step.handler, Mixing) and not step.links
