"""Operators that channels are not followed through: what comes in front of them has to stay as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper

from polar_deploy.surgery.standins import MICROSOFT
from tests.surgery.entries.entry import Add, Entry, inside, small
from tests.surgery.random_graphs import RandomGraph


def recurrent(operator: str, gates: int) -> Add:
    """Over the positions of an image, one after the other."""

    def add(g: RandomGraph, x: str) -> str:
        width, space, hidden = g.width[x], g.space[x], 3
        steps = g.op("Transpose", g.tokens(x), perm=[1, 0, 2])
        weight, recurrence = g.normal(1, gates, hidden, width) * np.float32(0.3), g.normal(1, gates, hidden, hidden)
        closed = g.chance(5)
        if closed:  # unit 0 is not read, at the next step
            recurrence[:, :, 1:, 0] = 0
        if g.chance(2):  # unit 1 stays zero
            weight[:, :, 1] = recurrence[:, :, 1] = 0
        flat = (np.reshape(values, (1, gates * hidden, -1)) for values in (weight, recurrence))
        y = g.op(operator, steps, *flat, hidden_size=hidden)
        y = g.op("Transpose", g.axes("Squeeze", y, [1], 13), perm=[1, 0, 2])
        if closed:
            y = g.op("Mul", y, np.array([0, 1, 1], np.float32))
        return g.untokens(y, hidden, space)

    return add


def _halves(g: RandomGraph, x: str, width: int) -> str:
    """A product of which, now and then, every second channel is zero."""
    weight = g.matrix(g.width[x], width)
    if g.chance(2):
        weight[:, ::2] = 0
    return g.op("MatMul", g.tokens(x), weight)


def _attention(g: RandomGraph, x: str) -> str:
    """Heads of two dimensions each, some of them with keys and values for two; now and then one is closed."""
    space, heads, groups = g.space[x], g.pick((1, 2)), g.pick((1, 2))
    few, many = 2 * heads, 2 * heads * groups
    query, key, value = (_halves(g, x, width) for width in (many, few, few))
    y = g.op("Attention", query, key, value, q_num_heads=heads * groups, kv_num_heads=heads)
    if g.chance(5):
        y = g.op("Mul", y, np.array([0, 0, *[1] * (many - 2)], np.float32))
    return g.untokens(y, many, space)


def _multi_head(g: RandomGraph, x: str) -> str:
    """The same of com.microsoft, with a bias for all three."""
    space, heads = g.space[x], g.pick((1, 2))
    width = 2 * heads
    three = [_halves(g, x, width) for _ in range(3)]
    bias = g.normal(3 * width)
    if g.chance(5):
        bias[: 2 * width : 2] = 0
    y = g.op("MultiHeadAttention", *three, bias, num_heads=heads, domain=MICROSOFT)
    if g.chance(5):
        y = g.op("Mul", y, np.array([0, 0, *[1] * (width - 2)], np.float32))
    return g.untokens(y, width, space)


def _grouped(g: RandomGraph, x: str) -> str:
    """Two heads of eight dimensions for one of keys and values, of com.microsoft."""
    space = g.space[x]
    query, key, value = (_halves(g, x, width) for width in (16, 8, 8))
    length = space[0] * space[1]
    batch = g.op("Gather", g.op("Shape", x), np.array([0]), axis=0)
    lengths = g.op("Expand", np.array([length - 1], np.int32), batch)
    given = [query, key, value, "", "", lengths, np.array(length, np.int32)]
    y, *_ = g.ops("GroupQueryAttention", *given, widths=[16, 1, 1], num_heads=2, kv_num_heads=1, domain=MICROSOFT)
    if g.chance(5):
        y = g.op("Mul", y, np.array([0] * 8 + [1] * 8, np.float32))
    return g.untokens(y, 16, space)


def _projected(g: RandomGraph, x: str) -> str:
    """Attention of com.microsoft, which multiplies by its weights itself."""
    space, width, heads = g.space[x], g.width[x], g.pick((1, 2))
    weight, bias = g.matrix(width, 6 * heads), g.normal(6 * heads)
    if g.chance(3):
        weight[:, ::2] = bias[::2] = 0
    y = g.op("Attention", g.tokens(x), weight, bias, num_heads=heads, domain=MICROSOFT)
    if g.chance(5):
        y = g.op("Mul", y, np.array([0, 0, *[1] * (2 * heads - 2)], np.float32))
    return g.untokens(y, 2 * heads, space)


def _rotated(g: RandomGraph, x: str) -> str:
    """Two heads of two dimensions, turned by where they lie in the image."""
    space, tokens = g.space[x], _halves(g, x, 4)
    angles = g.normal(space[0] * space[1], 1)
    batch = g.op("Gather", g.op("Shape", x), np.array([0]), axis=0)
    shape = g.op("Concat", batch, np.array([1, 1]), axis=0)
    tables = (g.op("Expand", table(angles)[None].astype(np.float32), shape) for table in (np.cos, np.sin))
    y = g.op("RotaryEmbedding", tokens, *tables, num_heads=2)
    if g.chance(5):
        y = g.op("Mul", y, np.array([0, 0, 1, 1], np.float32))
    return g.untokens(y, 4, space)


def heads(g: RandomGraph, x: str) -> str:
    """Two attention heads of two dimensions each, written out; now and then one is closed, or parts are zero."""
    width, space = g.width[x], g.space[x]
    length, tokens = space[0] * space[1], g.tokens(x)

    def split() -> str:
        y = g.op("Reshape", g.op("MatMul", tokens, g.matrix(width, 4)), np.array([0, length, 2, 2]))
        return g.op("Transpose", y, perm=[0, 2, 1, 3])

    query, key, value = split(), split(), split()
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
    y = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)
    if g.chance(5):
        y = g.op("Mul", y, np.array(g.pick(([0, 1], [1, 0])), np.float32).reshape(1, 2, 1, 1))
    y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), np.array([0, length, 4]))
    return g.untokens(y, 4, space)


def _rotary(g: RandomGraph, x: str) -> str:
    """The channels are its heads."""
    height, across = g.space[x]
    if across % 2:
        return x
    angles = g.normal(height, across // 2)
    batch = g.op("Gather", g.op("Shape", x), np.array([0]), axis=0)
    shape = g.op("Concat", batch, np.array([1, 1]), axis=0)
    tables = (g.op("Expand", table(angles)[None].astype(np.float32), shape) for table in (np.cos, np.sin))
    return g.op("RotaryEmbedding", x, *tables)


def _einsum(g: RandomGraph, x: str) -> str:
    return g.op("Einsum", x, g.matrix(g.width[x], 4), equation="nchw,co->nohw", width=4)


def _body(name: str, inputs: list[str], nodes: list[Any], outputs: list[str]) -> Any:
    """A graph inside a graph; truth values are called `go...`, counters `at...`."""
    kinds = {"go": 9, "at": 7}

    def info(tensor: str) -> Any:
        kind = kinds.get(tensor[:2], 1)
        return helper.make_tensor_value_info(tensor, kind, None if kind == 1 else [])

    return helper.make_graph(nodes, name, [info(x) for x in inputs], [info(x) for x in outputs])


def _if(g: RandomGraph, x: str) -> str:
    """Its bodies read the image from outside."""
    inner = f"inner{len(g.nodes)}"
    bodies = [
        _body(name, [], [helper.make_node(operator, [x], [inner + name])], [inner + name])
        for name, operator in (("yes", "Relu"), ("no", "Neg"))
    ]
    chosen = g.op("If", np.array(g.chance(5)), then_branch=bodies[0], else_branch=bodies[1])
    g.width[chosen], g.space[chosen] = g.width[x], g.space[x]
    return chosen


def _loop(g: RandomGraph, x: str) -> str:
    """A branch that is squashed three times, an image from outside added. Nobody knows its shape behind it."""
    inner, outer, number = g.conv_of(x, 2), g.conv_of(x, 2), len(g.nodes)
    old, half, new, at, go, on = (f"{name}{number}" for name in ("old", "half", "new", "at", "go", "go.on"))
    nodes = [
        helper.make_node("Sigmoid", [old], [half]),
        helper.make_node("Add", [half, outer], [new]),
        helper.make_node("Identity", [go], [on]),
    ]
    body = _body("again", [at, go, old], nodes, [on, new])
    g.images.append(g.op("Loop", np.array(3), np.array(True), inner, body=body, width=2, space=g.space[x]))
    return g.act(x)


def _scan(g: RandomGraph, x: str) -> str:
    """Sample by sample, on their own."""
    one, two = (
        helper.make_tensor_value_info(f"{n}{len(g.nodes)}", 1, [g.width[x], *g.space[x]]) for n in ("one", "two")
    )
    body = helper.make_graph([helper.make_node("Tanh", [one.name], [two.name])], "each", [one], [two])
    return g.op("Scan", x, body=body, num_scan_inputs=1)


def _added(g: RandomGraph, x: str, number: str) -> str:
    """A single number for all, kept small."""
    return g.op("Add", x, small(g, number))


def _det(g: RandomGraph, x: str) -> str:
    height, across = g.space[x]
    if height != across or height == 1:
        return x
    volume = g.op("Det", inside(g, x))
    return g.op("Add", x, g.as_image(small(g, volume), g.width[x]))


def _stft(g: RandomGraph, x: str) -> str:
    width, (height, across) = g.width[x], g.space[x]
    if width * height * across < 16:
        return x
    signal = g.op("Reshape", inside(g, x), np.array([0, width * height * across, 1]))
    found = g.op("STFT", signal, np.array(4), g.around_one(8))
    return g.merge(x, g.axes("ReduceMean", found, [1, 2, 3], 18))


def _dft(g: RandomGraph, x: str) -> str:
    wide = g.axes("Unsqueeze", x, [4], 13)
    found = g.op("DFT", wide, axis=2) if g.opset < 20 else g.op("DFT", wide, "", np.array(2))
    return g.axes("ReduceMean", found, [4], 18, keepdims=0)


def _col2im(g: RandomGraph, x: str) -> str:
    """Blocks of one element."""
    width, (height, across) = g.width[x], g.space[x]
    columns = g.op("Reshape", x, np.array([0, width, height * across]))
    return g.op("Col2Im", columns, np.array([height, across]), np.array([1, 1]))


def _compress(g: RandomGraph, x: str) -> str:
    chosen = g.random.random(g.width[x]) < 0.7
    chosen[0] = True
    return g.op("Compress", x, chosen, axis=1, width=int(chosen.sum()))


def _unique(g: RandomGraph, x: str) -> str:
    return _added(g, x, g.op("ReduceMax", g.op("Unique", x), keepdims=1))


def _non_zero(g: RandomGraph, x: str) -> str:
    """How many there are."""
    found = g.op("Cast", g.op("Size", g.op("NonZero", x)), to=1)
    return _added(g, x, g.op("Mul", found, np.float32(0.001)))


def drawn(operator: str) -> Add:
    """Random numbers, the same ones in every session."""

    def add(g: RandomGraph, x: str) -> str:
        if operator.endswith("Like"):
            return g.op("Add", x, g.op(operator, x, seed=3.0))
        if operator == "Bernoulli":
            return g.op("Mul", x, g.op(operator, g.op("Sigmoid", x), seed=3.0))
        return g.op("Add", x, g.op(operator, shape=[1, 1, *g.space[x]], seed=3.0), width=g.width[x])

    return add


def _multinomial(g: RandomGraph, x: str) -> str:
    """One class a sample."""
    drawn = g.op("Cast", g.op("Multinomial", g.vector(small(g, x)), seed=3.0), to=1)
    return g.op("Add", x, g.as_image(g.op("Mul", drawn, np.float32(0.1)), 1))


def loss(operator: str) -> Add:
    """Of the classes that are the most likely."""

    def add(g: RandomGraph, x: str) -> str:
        scores = g.op("LogSoftmax", x, axis=1) if g.opset >= 13 else small(g, x)
        target = g.op("ArgMax", x, axis=1, keepdims=0)
        return g.merge(x, g.axes("Unsqueeze", g.op(operator, scores, target, reduction="none"), [1], 13))

    return add


def _sequence(*operators: str) -> Add:
    """Two images in a sequence, and one of them, or both, out of it."""

    def add(g: RandomGraph, x: str) -> str:
        images = g.op("SequenceConstruct", x, g.partner(x))
        if "SequenceInsert" in operators:
            images = g.op("SequenceInsert", images, g.act(x), np.array(1))
        if "SequenceErase" in operators:
            images = g.op("SequenceErase", images, np.array(0))
        if "ConcatFromSequence" in operators:
            return g.op("ConcatFromSequence", images, axis=1, width=2 * g.width[x])
        return g.op("SequenceAt", images, np.array(0))

    return add


def _split_to_sequence(g: RandomGraph, x: str) -> str:
    parts = g.op("SplitToSequence", x, axis=1)
    return g.op("Add", x, g.op("SequenceAt", parts, np.array(0)))


def _optional(g: RandomGraph, x: str) -> str:
    return g.op("OptionalGetElement", g.op("Optional", x))


def _has_element(g: RandomGraph, x: str) -> str:
    return g.op("Mul", x, g.op("Cast", g.op("OptionalHasElement", g.op("Optional", x)), to=1))


ENTRIES: dict[str, Entry] = {
    **{name: Entry(recurrent(name, gates), fixed=True) for name, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4))},
    "Attention": Entry(_attention, 23, fixed=True),
    "Attention projected": Entry(_projected, fixed=True),
    "MultiHeadAttention": Entry(_multi_head, fixed=True),
    "GroupQueryAttention": Entry(_grouped, fixed=True),
    "RotaryEmbedding": Entry(_rotary, 23, fixed=True),
    "RotaryEmbedding heads": Entry(_rotated, 23, fixed=True),
    "MatMul heads": Entry(heads, 13, fixed=True),
    "Einsum": Entry(_einsum, 12),
    "If": Entry(_if),
    "Loop": Entry(_loop),
    "Scan": Entry(_scan, fixed=True),
    "Det": Entry(_det, 11, fixed=True),
    "STFT": Entry(_stft, 17, fixed=True),
    "DFT": Entry(_dft, 17),
    "Col2Im": Entry(_col2im, 18, fixed=True),
    "Compress": Entry(_compress),
    "Unique": Entry(_unique, 11),
    "NonZero": Entry(_non_zero),
    **{name: Entry(drawn(name), 9, 21) for name in ("RandomNormalLike", "RandomUniformLike")},
    **{name: Entry(drawn(name), 9, 21, fixed=True) for name in ("RandomNormal", "RandomUniform")},
    "Bernoulli": Entry(drawn("Bernoulli"), 15, 21),
    "Multinomial": Entry(_multinomial, 9, 21),
    **{name: Entry(loss(name), 12) for name in ("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")},
    "SequenceConstruct": Entry(_sequence(), 11),
    "SequenceAt": Entry(_split_to_sequence, 11),
    **{name: Entry(_sequence(name), 11) for name in ("SequenceInsert", "SequenceErase", "ConcatFromSequence")},
    "SplitToSequence": Entry(_split_to_sequence, 11),
    # ONNX Runtime has none of opset 28 yet
    "OptionalGetElement": Entry(_optional, 18, 27),
    "Optional": Entry(_has_element, 18, 27),
    "OptionalHasElement": Entry(_has_element, 18, 27),
}
