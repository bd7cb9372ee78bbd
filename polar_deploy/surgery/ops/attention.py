"""Attention and RotaryEmbedding of ONNX: see `polar_deploy.surgery.attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.attention import Attention, Layer
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Step

PAST_KEY = 4


class StandardAttention(Layer[Attention]):
    """Attention, on [batch, heads, tokens, dimensions] or on [batch, tokens, channels]."""

    mask = 3

    def read(self, step: Step) -> Attention:
        rank, attrs = step.rank(), step.node.attrs
        axes = (1, 3) if rank == 4 else (2,)
        queries, keys, values = (step.require(index) for index in range(3))
        if any(channels.axes != axes for channels in (queries, keys, values)):
            raise Unsupported("the channels of its inputs are not those of heads")
        heads = keys.dims[0] if rank == 4 else attrs["kv_num_heads"]
        count = queries.dims[0] if rank == 4 else attrs["q_num_heads"]
        if heads < 1 or count % heads:
            raise ValueError(f"{count} heads of queries for {heads} of keys")
        layer = Attention(queries, keys, values, heads, count // heads, cached=step.has(PAST_KEY))
        layer.mask = self.mask_channels(step, count)
        return layer

    def resize(self, step: Step, heads: int, groups: int) -> None:
        for name, count in (("q_num_heads", heads * groups), ("kv_num_heads", heads)):
            if name in step.node.attrs:
                step.graph.set_attribute(step.node, name, count)


class Rotary(Operator[int]):
    """RotaryEmbedding turns pairs of dimensions of each head: heads go as a whole. Its plan: how many there are."""

    def couple(self, step: Step[int]) -> None:
        source, rank = step.require(), step.rank()
        if source.axes != ((1, 3) if rank == 4 else (2,)):
            raise Unsupported("the channels of its input are not those of heads")
        step.plan = source.dims[0] if rank == 4 else self.head_count(step)
        target = step.carry()
        numbers = np.arange(len(target)).reshape(step.plan, -1)
        step.tie(target, np.broadcast_to(numbers[:, :1], numbers[:, 1:].shape).ravel(), numbers[:, 1:].ravel())

    def head_count(self, step: Step) -> int:
        """How many heads lie on the one axis of the channels."""
        count: int = step.node.attrs.get("num_heads", 0)
        if count < 1:
            raise Unsupported("it is not told how many heads there are")
        return count

    def constants(self, step: Step[int]) -> None:
        source, target = step.require(), step.output
        zero = (source.constant & (source.value == 0)).reshape(step.plan, -1).all(axis=1)
        target.constant = np.repeat(zero, len(target) // step.plan)
        target.nonnegative = target.constant.copy()

    def need(self, step: Step[int]) -> None:
        source = step.require()
        heads: Bools = np.any(step.output.needed.reshape(step.plan, -1), axis=1)
        source.needed |= self.spread(step, heads)
        for other in step.inputs[1:]:
            if other is not None:
                other.pin(step.note("it is read as a whole"))

    def spread(self, step: Step, heads: Bools) -> Bools:
        """[channels] those of the given heads."""
        return np.repeat(heads, len(step.output) // len(heads))

    def slice(self, step: Step[int]) -> None:
        kept = int(step.output.kept.reshape(step.plan, -1).any(axis=1).sum())
        if kept != step.plan and step.node.attrs.get("num_heads", 0):
            step.graph.set_attribute(step.node, "num_heads", kept)


HANDLERS: dict[str, Operator] = {"Attention": StandardAttention(), "RotaryEmbedding": Rotary()}
