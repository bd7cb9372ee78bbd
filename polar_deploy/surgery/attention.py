"""Attention layers that are one operator: closed heads go, and dimensions of heads that nobody reads.

Queries have a channel for each head and each of its dimensions, keys and values one for each of theirs: several query
heads may share one head of keys and values (grouped-query attention). As in `heads`, where the products are nodes of
their own, a pair of dimensions of queries and keys goes where one of both is zero. Here heads only have to stay equal
in size, so that each may lose other dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.mixing import unbalanced
from polar_deploy.surgery.operator import Operator, Retained

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step

EVEN = "all heads keep as many dimensions, and all groups of heads as many heads"
HEAD_AXIS = -3  # of a mask: [batch, heads, queries, keys]
CACHED = "its keys and values are kept from call to call"


@dataclass(eq=False)
class Attention:
    """What a handler knows of an attention layer.

    queries, keys, values: what it is computed from, after `offsets` were added to their channels.
    heads: of keys and values; groups: query heads for each of them.
    mask: what is added to the scores, where it has channels of its own, one a query head.
    cached: whether keys and values are handed on, so that all of them stay.
    whole: whether dimensions of heads stay as they are.
    spare: [heads, groups, dimensions] pairs of which one is zero, which nobody needs as long as it is.
    silent: [heads, groups, dimensions] those of them where it is the one of the queries.
    """

    queries: Channels
    keys: Channels
    values: Channels
    heads: int
    groups: int = 1
    offsets: tuple[Floats, Floats, Floats] | None = None
    mask: Channels | None = None
    cached: bool = False
    whole: bool = False
    spare: Bools = field(init=False)
    silent: Bools = field(init=False)

    def __post_init__(self) -> None:
        count = self.heads * self.groups
        if self.groups < 1 or len(self.queries) % count or len(self.keys) % self.heads or len(self.values) % self.heads:
            raise ValueError(f"{count} heads of {len(self.queries)}, {len(self.keys)}, {len(self.values)} channels")
        if len(self.queries) // count != len(self.keys) // self.heads:
            raise ValueError(f"{len(self.queries)} channels of queries meet {len(self.keys)} of keys")
        self.spare = self.silent = self.of_queries(np.zeros(len(self.queries), bool))

    def of_queries(self, array: Array) -> Array:
        """[heads, groups, dimensions] of queries, and of results."""
        return array.reshape(self.heads, self.groups, -1)

    def of_keys(self, array: Array) -> Array:
        """[heads, dimensions] of keys, and of values."""
        return array.reshape(self.heads, -1)

    def are_zero(self, *, after_cut: bool) -> tuple[Bools, Bools, Bools]:
        """[channels] of queries, keys and values that are zero whatever comes in, before the cut or after."""
        found = []
        for index, channels in enumerate((self.queries, self.keys, self.values)):
            offset = np.zeros(len(channels)) if self.offsets is None else self.offsets[index]
            if after_cut:  # nothing is added to what nobody needs
                offset = np.where(channels.needed, offset, 0.0)
            found.append(np.asarray(channels.constant & (channels.value + offset == 0)))
        return found[0], found[1], found[2]


AttentionT = TypeVar("AttentionT", bound=Attention)


class Layer(Operator[AttentionT]):
    """Handler of an attention layer. Its plan is an `Attention`."""

    scale = "scale"  # the attribute that scores are multiplied with; absent or 0: one over the root of the dimensions
    mask: int  # the input that is added to the scores

    def read(self, step: Step) -> AttentionT:
        """What the node is told. Raises Unsupported."""
        raise NotImplementedError

    def resize(self, step: Step, heads: int, groups: int) -> None:
        """Writes how many heads are left, and for each of them how many query heads, into the attributes."""
        step.graph.set_attribute(step.node, "num_heads", heads * groups)

    def couple(self, step: Step[AttentionT]) -> None:
        step.plan = layer = self.read(step)
        target = step.create(self.axes(step))
        if len(target) != len(layer.values) * layer.groups:
            raise ValueError(f"{len(target)} channels come out of {len(layer.values)} of values")
        for index, tensor in enumerate(step.node.outputs):
            if index > 0 and tensor.name and (tensor.outputs or not step.graph.is_private(tensor.name)):
                if index > 2:
                    raise Unsupported("its scores are read")
                layer.cached = True
                step.facts.open_opaque(step, tensor, step.note(CACHED))

    def axes(self, step: Step[AttentionT]) -> tuple[int, ...]:
        """Where the channels of the result lie."""
        return step.plan.queries.axes

    def constants(self, step: Step[AttentionT]) -> None:
        layer, target = step.plan, step.output
        zero = np.broadcast_to(
            layer.of_keys(layer.are_zero(after_cut=step.facts.after_cut)[2])[:, None],
            layer.of_queries(target.constant).shape,
        ).ravel()
        target.constant, target.value = zero.copy(), np.zeros(len(target))
        target.nonnegative = zero.copy()

    def need(self, step: Step[AttentionT]) -> None:
        layer = step.plan
        queries, keys, values = layer.are_zero(after_cut=step.facts.after_cut)
        needed = layer.of_queries(step.output.needed)
        heads: Bools = np.any(needed & ~layer.of_keys(values)[:, None], axis=2)
        if not layer.whole:
            layer.silent = layer.of_queries(queries)
            layer.spare = layer.silent | layer.of_keys(keys)[:, None]
        pairs = heads[:, :, None] & ~layer.spare
        layer.queries.needed |= pairs.ravel()
        layer.keys.needed |= pairs.any(axis=1).ravel()
        layer.values.needed |= needed.any(axis=1).ravel()
        if layer.mask is not None:
            layer.mask.needed |= heads.ravel()
        for channels in (layer.keys, layer.values) if layer.cached else ():
            channels.pin(step.note(CACHED))
        mine = (layer.queries, layer.keys, layer.values, layer.mask)
        for other in step.inputs:
            if other is not None and not any(other is channels for channels in mine):
                self.need_other(step, other)

    def need_other(self, step: Step[AttentionT], channels: Channels) -> None:
        """Says what is needed of an input that is neither queries nor keys nor values."""
        channels.pin(step.note("it is read as a whole"))

    def retain(self, step: Step[AttentionT]) -> list[Retained]:
        layer, target = step.plan, step.output
        if all(channels.is_removed for channels in step.outputs):
            return []
        queries, results = layer.of_queries(layer.queries.kept), layer.of_queries(target.kept)
        keys, values = layer.of_keys(layer.keys.kept), layer.of_keys(layer.values.kept)
        heads: Bools = np.any(queries, axis=2) | np.any(results, axis=2)
        if layer.mask is not None:
            heads = heads | layer.mask.kept.reshape(heads.shape)
        alive: Bools = np.any(heads, axis=1) | np.any(keys, axis=1) | np.any(values, axis=1)
        heads = _level(heads, alive)
        pairs = self._dimensions(layer, keys | queries.any(axis=1), alive, layer.queries, layer.keys)
        read = self._dimensions(layer, values | results.any(axis=1), alive, target, layer.values)
        wanted = [
            (layer.queries, heads[:, :, None] & pairs[:, None]),
            (layer.keys, pairs),
            (layer.values, read),
            (target, heads[:, :, None] & read[:, None]),
            (layer.mask, heads),
        ]
        return [
            Retained(channels, np.flatnonzero(missing), EVEN)
            for channels, all_of_them in wanted
            if channels is not None and (missing := all_of_them.ravel() & ~channels.kept).any()
        ]

    def _dimensions(self, layer: Attention, kept: Bools, alive: Bools, *channels: Channels) -> Bools:
        """[heads, dimensions] what has to stay: as many in each head that is left, or the same ones."""
        if layer.whole:
            return np.broadcast_to(alive[:, None], kept.shape)
        if any(len(each.axes) > 1 for each in channels):
            kept = alive[:, None] & kept.any(axis=0)
        return _level(kept, alive)

    def must_keep_values(self, step: Step[AttentionT]) -> list[tuple[Channels, Bools]]:
        """Where a pair stays that nobody needs, the one that is zero has to be zero still."""
        layer = step.plan
        queries, keys, _ = layer.are_zero(after_cut=step.facts.after_cut)
        still = layer.of_queries(queries) | layer.of_keys(keys)[:, None]
        heads = layer.of_queries(step.output.needed).any(axis=2, keepdims=True)
        risk: Bools = layer.spare & ~still & heads & layer.of_queries(layer.queries.kept)
        found = [
            (layer.queries, (risk & layer.silent).ravel()),
            (layer.keys, (risk & ~layer.silent).any(axis=1).ravel()),
        ]
        return [(channels, which) for channels, which in found if (which & ~channels.needed).any()]

    def slice(self, step: Step[AttentionT]) -> None:
        layer = step.plan
        kept = layer.of_queries(layer.queries.kept)
        heads, before = np.asarray(np.any(kept, axis=2)), kept.shape[2]
        left = int(heads.any(axis=1).sum())
        dimensions = int(kept.sum()) // int(heads.sum())
        if dimensions != before and not step.node.attrs.get(self.scale):
            step.graph.set_attribute(step.node, self.scale, 1 / math.sqrt(before))
        if not heads.all():
            self.resize(step, left, int(heads.sum()) // left)
            self.cut_heads(step, np.flatnonzero(heads))

    def cut_heads(self, step: Step, heads: Array) -> None:
        """Cuts constants that have an entry for every query head. Default: the mask, if it is one."""
        values = step.constant(self.mask)
        if values is not None and values.ndim >= -HEAD_AXIS and values.shape[HEAD_AXIS] > 1:
            step.graph.set_constant(step.node, self.mask, values.take(heads, axis=HEAD_AXIS))

    def mask_channels(self, step: Step, heads: int) -> Channels | None:
        """The channels of the mask, one a head; None where it has none of its own.

        Raises:
            Unsupported: it differs from head to head, and its channels are not known.
        """
        if not step.has(self.mask) or step.constant(self.mask) is not None:
            return None
        shape, channels = step.graph.shape(step.original[self.mask]), step.inputs[self.mask]
        if shape is None:
            raise Unsupported("the shape of its mask is not known")
        if len(shape) < -HEAD_AXIS or shape[HEAD_AXIS] == 1:
            return None
        if channels is None or channels.axes != (len(shape) + HEAD_AXIS,) or len(channels) != heads:
            raise Unsupported("its mask differs from head to head, and its channels are not known")
        return channels


def _level(kept: Bools, alive: Bools) -> Bools:
    """[rows, entries] as many in each row that is alive as in the fullest one, and at least one."""
    level = kept & alive[:, None]
    level.ravel()[unbalanced(level, alive)] = True
    return level
