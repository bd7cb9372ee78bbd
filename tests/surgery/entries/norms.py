"""Normalization, reductions, and what else looks at more than one element of a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.surgery.entries.entry import Add, Entry, positive, small, unary
from tests.surgery.random_graphs import RandomGraph


def batch_norm(g: RandomGraph, x: str) -> str:
    width = g.width[x]
    scale = g.normal(width)
    if g.chance(2):
        scale[g.closed(width)] = 0
    return g.op("BatchNormalization", x, scale, g.normal(width), g.normal(width), g.around_one(width))


def _instance_norm(g: RandomGraph, x: str) -> str:
    width = g.width[x]
    return g.op("InstanceNormalization", x, g.normal(width), g.normal(width), epsilon=0.1)


def last_norm(operator: str) -> Add:
    """A norm over the last axis: the channels of tokens, or the width of an image."""

    def add(g: RandomGraph, x: str) -> str:
        def norm(y: str, count: int) -> str:
            bias = [g.normal(count)] if operator == "LayerNormalization" and g.chance(7) else []
            return g.op(operator, y, g.normal(count), *bias, epsilon=0.1, axis=-1)

        if g.chance(3):
            return norm(x, g.space[x][1])
        last = norm(g.op("Transpose", x, perm=[0, 2, 3, 1]), g.width[x])
        return g.op("Transpose", last, perm=[0, 3, 1, 2])

    return add


def _layer_norm_all(g: RandomGraph, x: str) -> str:
    shape = (g.width[x], *g.space[x])
    return g.op("LayerNormalization", x, g.normal(*shape), g.normal(*shape), epsilon=0.1, axis=1)


def _group_norm(g: RandomGraph, x: str) -> str:
    width = g.width[x]
    groups = g.pick((1, width)) if width % 2 else g.pick((2, 1, width // 2, width))
    return g.op("GroupNormalization", x, g.normal(width), g.normal(width), num_groups=groups, epsilon=0.1)


def _mean_variance(g: RandomGraph, x: str) -> str:
    """Over space alone it divides by next to nothing where a channel is closed; so over all."""
    noise = g.op("Add", x, g.normal(1, 1, *g.space[x]))
    return g.op("MeanVarianceNormalization", noise, axes=[1, 2, 3])


def reduction(operator: str, since: int = 18, prepare: Add = lambda g, x: x) -> Add:
    """Over space, with or without the axes, or over the channels; what is left is joined with the image."""

    def add(g: RandomGraph, x: str) -> str:
        width, space = g.width[x], g.space[x]
        kind = g.pick(("space", "vector", "channels", "one axis"))
        y = prepare(g, x)
        if kind == "vector":
            left = g.axes(operator, y, g.pick(([2, 3], [-1, -2])), since, keepdims=0)
            left = g.as_image(left, width)
        elif kind == "one axis":
            left = g.axes(operator, y, [g.pick((2, -1))], since)
        else:
            left = g.axes(operator, y, [1] if kind == "channels" else [2, 3], since)
            g.width[left], g.space[left] = (1, space) if kind == "channels" else (width, (1, 1))
        return g.merge(x, small(g, left))

    return add


def arg(operator: str) -> Add:
    """The place of the largest (or smallest), as a number."""

    def add(g: RandomGraph, x: str) -> str:
        axis = g.pick((1, 2))
        place = g.op("Cast", g.op(operator, x, axis=axis), to=onnx.TensorProto.FLOAT)
        return g.op("Add", x, g.op("Mul", place, np.float32(0.1)))

    return add


def _top_k(g: RandomGraph, x: str) -> str:
    """The largest values, over channels or over rows."""
    width, (height, across) = g.width[x], g.space[x]
    if g.chance(5) and width > 1:
        count, axis = np.array([width - 1]), 1
        return g.ops("TopK", x, count, widths=[width - 1, None], axis=axis)[0]
    space = (max(1, height - 1), across)
    return g.ops("TopK", x, np.array([space[0]]), widths=[width, None], space=space, axis=2)[0]


def _softmax(operator: str) -> Add:
    return lambda g, x: g.op(operator, x, axis=g.pick((3, 1, 2, -1)))


def _cumulated(g: RandomGraph, x: str) -> str:
    """Running sums over rows, or over the channels."""
    axis = g.pick((2, 1, -1))
    how: dict[str, Any] = g.pick(({}, {"reverse": 1}, {"exclusive": 1}))
    sums = g.op("CumSum", x, np.array(axis), **how)
    return g.op("Mul", sums, np.float32(0.2))


ENTRIES: dict[str, Entry] = {
    "BatchNormalization": Entry(batch_norm),
    "InstanceNormalization": Entry(_instance_norm),
    "LayerNormalization": Entry(last_norm("LayerNormalization"), 17, fixed=True),
    "LayerNormalization all": Entry(_layer_norm_all, 17, fixed=True),
    "RMSNormalization": Entry(last_norm("RMSNormalization"), 23, fixed=True),
    "GroupNormalization": Entry(_group_norm, 21),  # before, it had a scale a group, and is deprecated
    "LRN": Entry(unary("LRN", size=3, alpha=0.5)),
    "LpNormalization": Entry(unary("LpNormalization", positive, axis=1)),
    "MeanVarianceNormalization": Entry(_mean_variance, fixed=True),
    **{name: Entry(reduction(name)) for name in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")},
    **{name: Entry(reduction(name)) for name in ("ReduceSumSquare", "ReduceLogSumExp")},
    "ReduceSum": Entry(reduction("ReduceSum", 13)),
    "ReduceProd": Entry(reduction("ReduceProd", prepare=small)),
    "ReduceLogSum": Entry(reduction("ReduceLogSum", prepare=positive)),
    "ArgMax": Entry(arg("ArgMax")),
    "ArgMin": Entry(arg("ArgMin")),
    "TopK": Entry(_top_k, 10, fixed=True),
    "Softmax": Entry(_softmax("Softmax"), 11),
    "LogSoftmax": Entry(_softmax("LogSoftmax"), 11),
    "Hardmax": Entry(_softmax("Hardmax"), 11),
    "CumSum": Entry(_cumulated, 11),
}
