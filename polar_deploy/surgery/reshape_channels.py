"""Where channels lie after a reshape.

A reshape keeps the order of the elements. Dimensions before and after fall into groups that hold the same elements, and
only the group with the channels in it matters. There, an index along an axis of the result holds elements of certain
input channels. Where whole sets of such indices and channels go, what is left keeps its order too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from polar_deploy.surgery.facts import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Ints
    from polar_deploy.surgery.graph import Graph
    from polar_deploy.surgery.ir import Node, Tensor
    from polar_deploy.surgery.sizes import Dim, Shape

Group = tuple[range, range]  # dimensions before, dimensions after
MOST = 1 << 24  # elements of a group that are numbered one by one
AXIS = {  # where operators want the channels
    **dict.fromkeys(("MatMul", "Gemm", "Softmax", "LayerNormalization"), -1),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), -1),
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool"), 1),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "DepthToSpace", "SpaceToDepth", "LRN"), 1),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "GroupNormalization"), 1),
}
PASSING = {"Transpose", "Slice", "Squeeze", "Split", "Gather", "Identity", "Cast", "Mul", "Div", "Dropout", "Softmax"}
PASSING |= {"Add", "Sub", "Neg", "Concat", "Unsqueeze", "Expand", "Tile", "RotaryEmbedding"}  # of rotated heads
PASSING |= {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
PASSING |= {"QuantizeLinear", "DequantizeLinear"}
PRODUCTS = ("MatMul", "FusedMatMul", "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention")
MOST_STEPS = 30  # tensors that are looked at behind a reshape
ALONG_ONE = ("BatchNormalization", "GroupNormalization", "InstanceNormalization")  # parameters lie along axis 1


class Places(NamedTuple):
    """Channel `into[i]` of the result comes from channel `out_of[i]`; it has its channels on `axes`.

    split: one axis has become several, which are cut position by position along the last of them.
    """

    axes: tuple[int, ...]
    out_of: Ints
    into: Ints
    split: bool = False


def follow(before: Shape, after: Shape, axes: tuple[int, ...], choose: Callable[[Array, range], int | None]) -> Places:
    """Where the channels on `axes` lie afterwards.

    Args:
        choose: where they would lie on several axes, the one that the cut goes along; None: position by position. It
            is told the range of axes, and which channel each element along these holds.

    Raises:
        Unsupported: they cannot be followed.
    """
    inside, outside = _around(groups(before, after), before, axes)
    inner, outer = ([shape[i] for i in dims] for shape, dims in ((before, inside), (after, outside)))
    count = math.prod(dim for axis in axes if isinstance(dim := before[axis], int))
    sizes = [dim for dim in inner if isinstance(dim, int)]
    wanted = [dim for dim in outer if isinstance(dim, int)]
    if len(sizes) < len(inner) or len(wanted) < len(outer):
        return _at_an_end(inside, outside, outer, axes, count)
    if math.prod(sizes) > MOST:
        raise Unsupported(f"it spreads the channels over {math.prod(sizes)} elements")
    numbers = np.arange(count).reshape([size if axis in axes else 1 for axis, size in zip(inside, sizes, strict=True)])
    spread = np.broadcast_to(numbers, sizes).reshape(wanted)
    varying = varies(spread)
    stays = [outer[i] for i in varying] == [before[axis] for axis in axes]
    chosen = outside[varying[0]] if len(varying) == 1 else None if stays else choose(spread, outside)
    if chosen is not None:
        return Places((chosen,), *_slabs(spread, outside.index(chosen), count))
    corner = spread[tuple(slice(None) if i in varying else 0 for i in range(spread.ndim))].ravel()
    return Places(tuple(outside[i] for i in varying), corner, np.arange(len(corner)), split=not stays)


def apart(before: Shape, after: Shape, axes: tuple[int, ...]) -> Places | None:
    """Where one axis of channels becomes several, all of them, one by one; None where it does not, or not alone."""
    inside, outside = _around(groups(before, after), before, axes)
    dims = [dim for axis in outside if isinstance(dim := after[axis], int)]
    if tuple(inside) != axes or len(axes) > 1 or len(dims) < 2 or len(dims) < len(outside):
        return None
    every = np.arange(math.prod(dims))
    return Places(tuple(outside), every, every, split=True) if len(every) == before[axes[0]] else None


def each(before: Shape, after: Shape, axes: tuple[int, ...], *, apart: bool = False) -> Places | None:
    """Several axes of channels that go their own ways, one by one or joined; None where one of them does not.

    Heads of keys that were repeated for several heads of queries come out as so many heads.

    Args:
        apart: whether one axis may become several, as the pairs of dimensions that rotary embeddings turn.
    """
    places, order = np.zeros(1, np.int64), list[int]()
    for inside, outside in groups(before, after):
        mine = [axis for axis in axes if axis in inside]
        if not mine:
            continue
        sizes = [dim for i in inside if isinstance(dim := before[i], int)]
        wide = [i for i in outside if after[i] != 1]
        alone = all(axis in mine or before[axis] == 1 for axis in inside)
        fixed = len(sizes) == len(inside) and all(isinstance(after[i], int) for i in outside)
        if not fixed or not outside or (len(mine) > 1 and not alone) or (len(wide) > 1 and not (apart and alone)):
            return None
        own = [size if i in mine else 1 for i, size in zip(inside, sizes, strict=True)]
        numbers = np.arange(math.prod(own)).reshape(own)
        places = (places[:, None] * numbers.size + np.broadcast_to(numbers, sizes).ravel()).ravel()
        order += wide or outside[:1]
    return Places(tuple(order), places, np.arange(len(places))) if order == sorted({*order}) else None


def varies(spread: Array) -> list[int]:
    """The axes along which not everything is the same."""
    return [i for i in range(spread.ndim) if (spread != spread.take([0], axis=i)).any()]


def _slabs(spread: Array, axis: int, count: int) -> tuple[Ints, Ints]:
    """Input channels and indices along `axis` that hold the same elements."""
    rows = np.moveaxis(spread, axis, 0).reshape(spread.shape[axis], -1)
    pairs = np.unique(np.arange(len(rows))[:, None] * count + rows)
    return pairs % count, pairs // count


def _at_an_end(inside: range, outside: range, outer: list[Dim], axes: tuple[int, ...], count: int) -> Places:
    """Channels that are joined with dimensions that are not fixed: those before them, or those behind them."""
    if tuple(inside[: len(axes)]) == axes and isinstance(size := outer[0], int):
        if size % count == 0:
            return Places((outside[0],), np.arange(size) // (size // count), np.arange(size))
        if count % size == 0:
            return Places((outside[0],), np.arange(count), np.arange(count) // (count // size))
    if tuple(inside[-len(axes) :]) == axes and isinstance(size := outer[-1], int):
        if size % count == 0:
            return Places((outside[-1],), np.arange(size) % count, np.arange(size))
        if count % size == 0:
            return Places((outside[-1],), np.arange(count), np.arange(count) % size)
    raise Unsupported("it joins or splits the channels with a dimension that is not fixed")


def groups(before: Shape, after: Shape) -> list[Group]:
    """Dimensions that hold the same elements, in groups as short as possible."""
    head = same_head(before, after)
    tail = same_head(before[head:][::-1], after[head:][::-1])
    inner, outer = range(head, len(before) - tail), range(head, len(after) - tail)
    found = [(range(i, i + 1), range(i, i + 1)) for i in range(head)]
    found += _partition(before, after, inner, outer)
    found += [
        (range(inner.stop + i, inner.stop + i + 1), range(outer.stop + i, outer.stop + i + 1)) for i in range(tail)
    ]
    return found


def same_head(one: Shape, other: Shape) -> int:
    """How many leading dimensions two shapes share."""
    same = [a == b is not None for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def _partition(before: Shape, after: Shape, inner: range, outer: range) -> list[Group]:
    whole = [(inner, outer)] if inner or outer else []
    ins, outs = ([_probes(shape[i]) for i in dims] for shape, dims in ((before, inner), (after, outer)))
    found: list[Group] = []
    i = j = 0
    while i < len(ins) and j < len(outs):
        start, p, q = (i, j), ins[i], outs[j]
        i, j = i + 1, j + 1
        while p != q:
            if p is None or q is None or (i if p < q else j) == len(ins if p < q else outs):
                return whole
            if p < q:
                p, i = _times(p, ins[i]), i + 1
            else:
                q, j = _times(q, outs[j]), j + 1
        if p is None:
            return whole
        found.append((range(inner.start + start[0], inner.start + i), range(outer.start + start[1], outer.start + j)))
    if not found:
        return whole
    ones = range(found[-1][0].start, inner.stop), range(found[-1][1].start, outer.stop)
    return [*found[:-1], ones]


def _probes(dim: Dim) -> tuple[int, int] | None:
    """A dimension at both probes, see `model.Dim`."""
    return (dim, dim) if isinstance(dim, int) else dim if isinstance(dim, tuple) else None


def _times(one: tuple[int, int], other: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if other is None else (one[0] * other[0], one[1] * other[1])


def _around(found: list[Group], before: Shape, axes: tuple[int, ...]) -> Group:
    """The dimensions before and after that hold all of `axes`."""
    hit = [i for i, (inside, _) in enumerate(found) if any(axis in inside for axis in axes)]
    first, last = hit[0], hit[-1]
    while not range(found[first][1].start, found[last][1].stop):  # one channel whose axis goes: it joins a neighbour
        if first > 0 and all(isinstance(before[axis], int) for axis in found[first - 1][0]):
            first -= 1
        elif last + 1 < len(found):
            last += 1
        else:
            raise Unsupported("nothing is left of the axis of its channels")
    inside, outside = (range(found[first][k].start, found[last][k].stop) for k in (0, 1))
    return inside, outside


def cut_axis(graph: Graph, tensor: Tensor, spread: Array, among: range) -> int | None:
    """Which axis the cut goes along where one channel axis has become several, by what happens to them.

    Args:
        spread: which set of channels each element of `tensor` belongs to, along the axes `among`.

    Returns:
        An axis; None where several change places and are joined again: a channel shuffle.
    """
    total = len(np.unique(spread))
    sets = {among[i]: total // len(np.unique(spread.take(0, axis=i))) for i in varies(spread)}
    best = max(sets, key=sets.__getitem__) if total > 1 else among[0]
    marks = list(range(len(graph.shape(tensor) or ())))  # where each axis came from; -1: from several
    while len(tensor.outputs) == 1 and (moved := _moved(graph, tensor.outputs[0], marks)) is not None:
        joined = [axes for axes in moved[1] if axes & sets.keys()]
        if len(sets) > 1 and any(sets.keys() <= axes <= set(among) for axes in joined):
            in_order = [axis for axis in marks if axis in sets] == sorted(sets)
            return best if in_order else None
        if not all(axes <= set(among) for axes in joined):  # they become part of height or width
            lost = set().union(*joined)
            return max((axis for axis in among if axis not in lost), key=lambda axis: sets.get(axis, 1), default=best)
        if joined:
            break
        marks, tensor = moved[0], tensor.outputs[0].outputs[0]
    wanted = [marks[at] for reader in tensor.outputs if (at := AXIS.get(reader.op)) is not None]
    return wanted[0] if wanted and wanted[0] in among else best


def feeds_heads(graph: Graph, tensor: Tensor) -> bool:
    """Whether a tensor goes into a product of two computed tensors, past what only moves or scales it."""
    if not graph.follows_heads:
        return False
    pending, seen = [tensor], 0
    while pending and seen < MOST_STEPS:
        seen += 1
        for reader in (tensor := pending.pop()).outputs:
            if reader.op in PRODUCTS:
                if not any(graph.is_constant(factor) for factor in reader.inputs[:2]):
                    return True
            elif reader.outputs and (reader.op in PASSING or _joins_repeated(reader) or _regroups_last(graph, reader)):
                pending += reader.outputs
    return False


def _joins_repeated(reader: Node) -> bool:
    """Whether a Reshape makes one axis of heads of what was repeated for several of them."""
    makers = reader.inputs[0].inputs
    return reader.op == "Reshape" and bool(makers) and makers[0].op in ("Expand", "Tile")


def _regroups_last(graph: Graph, reader: Node) -> bool:
    """Whether a Reshape makes one axis of the last ones, or several of the last, as of pairs that are rotated."""
    before, after = (graph.shape(tensors[0]) if tensors else None for tensors in (reader.inputs, reader.outputs))
    if reader.op != "Reshape" or before is None or after is None:
        return False
    return len(after) != len(before) and same_head(before, after) == min(len(before), len(after)) - 1


def _moved(graph: Graph, reader: Node, marks: list[int]) -> tuple[list[int], list[set[int]]] | None:
    """Where marked axes go in one node, and the sets that it joins; None where that is not simple."""
    before, after = (graph.shape(tensors[0]) if tensors else None for tensors in (reader.inputs, reader.outputs))
    if before is None or after is None or len(before) != len(marks) or reader.op in AXIS:
        return None
    if reader.op == "Transpose":
        return [marks[axis] for axis in reader.attrs.get("perm") or range(len(marks))[::-1]], []
    if reader.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        moved, joined = [-1] * len(after), []
        for inside, outside in groups(before, after):
            wide = [[axis for axis in dims if shape[axis] != 1] for dims, shape in ((inside, before), (outside, after))]
            if len(inside) == len(outside) == 1 or len(wide[0]) == len(wide[1]) == 1:
                moved[(wide[1] or outside)[0]] = marks[(wide[0] or inside)[0]]
            else:
                joined.append({marks[axis] for axis in inside})
        return moved, joined
    return (marks, []) if before == after and reader.op not in ALONG_ONE else None
