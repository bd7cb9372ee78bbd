"""Attention layers and rotary embeddings of com.microsoft: see `polar_deploy.surgery.attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.attention import Attention, Layer
from polar_deploy.surgery.dtype_limits import fits
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Retained
from polar_deploy.surgery.ops.attention import Rotary

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step
    from polar_deploy.surgery.operator import Operator

PARTS = ("queries", "keys", "values")
Three = tuple["Channels", "Channels", "Channels"]


def _three(step: Step) -> Three:
    """The channels of queries, keys and values, each an input. Raises Unsupported."""
    if any(not step.has(index) for index in range(3)):
        raise Unsupported("its queries, keys and values are packed into one input")
    found = [step.require(index) for index in range(3)]
    for index, channels in enumerate(found):
        if channels.axes != ((1, 3) if step.rank(index) == 4 and index else (2,)):
            raise Unsupported("the channels of its inputs are not those of heads")
    return found[0], found[1], found[2]


def _offsets(bias: Array | None, sizes: list[int]) -> tuple[Floats, Floats, Floats] | None:
    """What a bias of all three adds to each."""
    if bias is None:
        return None
    if bias.size != sum(sizes):
        raise ValueError(f"a bias of {bias.size} numbers for {sum(sizes)} channels")
    parts = np.split(bias.astype(np.float64).ravel(), np.cumsum(sizes)[:-1])
    return parts[0], parts[1], parts[2]


class MultiHead(Layer[Attention]):
    """MultiHeadAttention; its bias is added to queries, keys and values."""

    bias, mask = 3, 5

    def read(self, step: Step) -> Attention:
        if any(step.has(index) for index in (8, 9)):
            raise Unsupported("its keys and values are written in place")
        three, heads = _three(step), step.node.attrs["num_heads"]
        values = step.parameter(self.bias, "bias") if step.has(self.bias) else None
        layer = Attention(*three, heads, offsets=_offsets(values, [len(channels) for channels in three]))
        layer.mask, layer.cached = self.mask_channels(step, heads), step.has(6)
        return layer

    def slice(self, step: Step[Attention]) -> None:
        super().slice(step)
        layer = step.plan
        for old in filter(None, [layer.offsets]):
            parts = zip(old, (layer.queries, layer.keys, layer.values), strict=True)
            values = np.concatenate([np.where(each.needed, part, 0.0)[each.kept] for part, each in parts])
            if values.size != sum(map(len, old)) or not np.array_equal(values, np.concatenate(old)):
                held = step.parameter(self.bias, "bias")
                step.graph.set_constant(step.node, self.bias, values.astype(held.dtype))


class GroupQuery(Layer[Attention]):
    """GroupQueryAttention: heads go, their dimensions stay, because kernels want multiples of 8 of them."""

    mask, sinks = 10, 11

    def read(self, step: Step) -> Attention:
        if step.has(12) or step.has(13) or step.node.attrs.get("qk_output", 0):
            raise Unsupported("its keys and values are quantised, or its scores are read")
        three, attrs = _three(step), step.node.attrs
        heads, count = attrs["kv_num_heads"], attrs["num_heads"]
        if heads < 1 or count % heads:
            raise ValueError(f"{count} heads of queries for {heads} of keys")
        if step.has(self.sinks):
            step.parameter(self.sinks, "sink of each head")
        layer = Attention(*three, heads, count // heads, whole=True)
        layer.mask, layer.cached = self.mask_channels(step, count), step.has(3)
        return layer

    def resize(self, step: Step, heads: int, groups: int) -> None:
        super().resize(step, heads, groups)
        step.graph.set_attribute(step.node, "kv_num_heads", heads)

    def cut_heads(self, step: Step, heads: Array) -> None:
        super().cut_heads(step, heads)
        if step.has(self.sinks):
            step.graph.set_constant(step.node, self.sinks, step.parameter(self.sinks, "sink")[heads])


@dataclass(eq=False, kw_only=True)
class Projected(Attention):
    """An attention layer that makes its queries, keys and values itself: `input @ weight + bias`.

    source: channels of its input, None where they are not those that the weight mixes.
    reads: [inputs, outputs of the three] where weights are.
    bias: [outputs], with what `absorbed` inputs ([inputs], constant) add.
    """

    source: Channels | None
    reads: Bools
    bias: Floats
    absorbed: Bools

    @property
    def three(self) -> Three:
        """What comes out of the product."""
        return self.queries, self.keys, self.values


class SelfAttention(Layer[Projected]):
    """Attention of com.microsoft. What its product makes has channels of its own here, as tensors have."""

    weight, bias, mask = 1, 2, 5

    def read(self, step: Step) -> Projected:
        matrix, heads = step.parameter(self.weight, "weight"), step.node.attrs["num_heads"]
        sizes = step.node.attrs.get("qkv_hidden_sizes") or [matrix.shape[1] // 3] * 3
        if sum(sizes) != matrix.shape[1] or step.has(6):
            raise Unsupported("its keys and values are written in place")
        source = step.inputs[0]
        if source is not None and (source.axes != (2,) or len(source) != len(matrix)):
            source = None
        queries, keys, values = (step.facts.inner(step, name, size) for name, size in zip(PARTS, sizes, strict=True))
        held = step.parameter(self.bias, "bias") if step.has(self.bias) else np.zeros(matrix.shape[1])
        return Projected(
            queries,
            keys,
            values,
            heads,
            mask=self.mask_channels(step, heads),
            cached=step.has(4),
            whole=bool(step.node.attrs.get("do_rotary", 0)),
            source=source,
            reads=matrix != 0,
            bias=held.astype(np.float64).ravel(),
            absorbed=np.zeros(len(matrix), bool),
        )

    def axes(self, step: Step) -> tuple[int, ...]:
        return (2,)

    def constants(self, step: Step[Projected]) -> None:
        layer = step.plan
        if not step.facts.after_cut:
            self._absorb(step, layer)
        read = layer.reads[~layer.absorbed].any(axis=0)
        parts = np.cumsum([len(channels) for channels in layer.three])[:-1]
        halves = np.split(read, parts), np.split(layer.bias, parts)
        for channels, computed, bias in zip(layer.three, *halves, strict=True):
            zero = ~channels.needed if step.facts.after_cut else np.zeros(len(channels), bool)
            channels.constant = ~computed | zero
            channels.value = np.where(channels.constant & ~zero, bias, 0.0)
            channels.nonnegative = channels.constant & (channels.value >= 0)
        super().constants(step)

    def _absorb(self, step: Step, layer: Projected) -> None:
        if layer.source is None:
            return
        weight, source = step.parameter(self.weight, "weight"), layer.source
        moved = source.value[source.constant] @ weight[source.constant].astype(np.float64)
        if fits(layer.bias + moved, weight.dtype).all():
            layer.absorbed, layer.bias = source.constant.copy(), layer.bias + moved
        else:
            layer.absorbed = source.constant & (source.value == 0)

    def need(self, step: Step[Projected]) -> None:
        super().need(step)
        layer = step.plan
        if layer.source is not None:
            wanted = np.concatenate([channels.needed for channels in layer.three])
            layer.source.needed |= layer.reads[:, wanted].any(axis=1) & ~layer.absorbed

    def need_other(self, step: Step[Projected], channels: Channels) -> None:
        if channels is not step.plan.source:
            super().need_other(step, channels)

    def retain(self, step: Step[Projected]) -> list[Retained]:
        source = step.plan.source
        found = super().retain(step)
        if source is not None and source.is_removed and not step.output.is_removed:
            found.append(Retained(source, np.zeros(1, np.int64), "an operator must keep one input channel"))
        return found

    def slice(self, step: Step[Projected]) -> None:
        super().slice(step)
        layer = step.plan
        weight = step.parameter(self.weight, "weight")
        needed, kept = (np.concatenate(parts) for parts in zip(*((c.needed, c.kept) for c in layer.three), strict=True))
        rows = np.ones(len(weight), bool) if layer.source is None else layer.source.kept
        values = np.where(needed & ~layer.absorbed[:, None], weight, np.zeros((), weight.dtype))
        if not (kept.all() and rows.all() and np.array_equal(values, weight)):
            step.graph.set_constant(step.node, self.weight, values[rows][:, kept])
        bias = np.where(needed, layer.bias, 0.0)[kept]
        held = step.parameter(self.bias, "bias") if step.has(self.bias) else np.zeros(weight.shape[1])
        if not np.array_equal(bias, held):
            step.graph.set_constant(step.node, self.bias, bias.astype(weight.dtype))
        sizes = [int(channels.kept.sum()) for channels in layer.three]
        if not kept.all() and ("qkv_hidden_sizes" in step.node.attrs or len(set(sizes)) > 1):
            step.graph.set_attribute(step.node, "qkv_hidden_sizes", sizes)


class MicrosoftRotary(Rotary):
    """RotaryEmbedding of com.microsoft: inputs are the data, positions and both tables."""

    def head_count(self, step: Step) -> int:
        if step.node.attrs.get("num_heads", 0):
            return super().head_count(step)
        table = step.graph.shape(step.original[2])
        width = table[-1] if table else None
        if not isinstance(width, int) or len(step.require()) % (2 * width):
            raise Unsupported("it is not told how many heads there are")
        return len(step.require()) // (2 * width)


MICROSOFT: dict[str, Operator] = {
    "Attention": SelfAttention(),
    "MultiHeadAttention": MultiHead(),
    "GroupQueryAttention": GroupQuery(),
    "RotaryEmbedding": MicrosoftRotary(),
}
