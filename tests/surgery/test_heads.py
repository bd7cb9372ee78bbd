"""Attention heads: closed heads and dead dimensions inside of heads go, in the forms that exporters write."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from polar_deploy.surgery import compress
from tests.surgery.graphs import Array, Net, assert_same, constant, names

LENGTH, WIDTH, HEADS, DIMS = 6, 12, 4, 5
INNER = HEADS * DIMS
CLOSED = np.array([False, True, False, True])  # heads
OPEN = np.flatnonzero(~np.repeat(CLOSED, DIMS))  # their channels


class Attention(Net):
    """[batch, tokens, channels] through one attention layer, which is built in steps that tests change."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = [onnx.helper.make_tensor_value_info("input", 1, ["batch", LENGTH, WIDTH])]
        self.stream = self.linear("input", WIDTH, WIDTH, "stem")

    def shape(self, *dims: int) -> str:
        return self.constant(f"shape{len(self.constants)}", np.array(dims))

    def split(self, x: str, name: str) -> str:
        """To [batch, heads, tokens, dimensions]."""
        x = self.node("Reshape", [x, self.shape(0, LENGTH, HEADS, DIMS)], f"{name}.split")
        return self.node("Transpose", [x], f"{name}.heads", perm=[0, 2, 1, 3])

    def queries(self, zeros: dict[str, Array] | None = None) -> tuple[str, str, str]:
        found = [
            self.split(self.linear(self.stream, WIDTH, INNER, name, (zeros or {}).get(name)), name)
            for name in ("q", "k", "v")
        ]
        return found[0], found[1], found[2]

    def attend(self, q: str, k: str, v: str, *, turn: str = "direct") -> str:
        if turn == "joined":  # as PyTorch exports scaled_dot_product_attention
            k = self.node("Reshape", [k, self.shape(-1, LENGTH, DIMS)], "k.joined")
            k = self.node("Transpose", [k], "k.turned", perm=[0, 2, 1])
            k = self.node("Reshape", [k, self.shape(-1, HEADS, DIMS, LENGTH)], "k.split again")
        else:
            k = self.node("Transpose", [k], "k.turned", perm=[0, 1, 3, 2])
        scores = self.node(
            "Mul", [self.node("MatMul", [q, k], "scores"), self.constant("scale", np.float32(0.4))], "scaled"
        )
        mask = self.random.standard_normal((1, 1, LENGTH, LENGTH)).astype(np.float32)
        scores = self.node("Add", [scores, self.constant("bias", mask)], "biased")
        return self.node("MatMul", [self.node("Softmax", [scores], "softmax", axis=-1), v], "weighed")

    def done(self, y: str, *, mask: Array | None = None, rows: Array | None = None) -> onnx.ModelProto:
        """mask: heads, multiplied before they are joined; rows: of the projection that are not zero."""
        if mask is not None:
            y = self.node("Mul", [y, self.constant("mask", mask.astype(np.float32).reshape(1, -1, 1, 1))], "gate")
        y = self.node("Transpose", [y], "tokens", perm=[0, 2, 1, 3])
        y = self.node("Reshape", [y, self.shape(0, LENGTH, INNER)], "joined")
        weight = self.random.standard_normal((INNER, WIDTH)).astype(np.float32)
        if rows is not None:
            weight[~rows] = 0
        y = self.node("MatMul", [y, self.constant("out.w", weight)], "out")
        return self.model(self.node("Add", [y, self.stream], "end"), ranks=[3])

    def model(self, *outputs: str, ranks: Any = ()) -> onnx.ModelProto:
        self.width["end"] = WIDTH
        model = super().model(*outputs, ranks=ranks)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        return model


def _cut(model: onnx.ModelProto) -> onnx.ModelProto:
    smaller = compress(model).model
    assert_same(model, smaller)
    return smaller


@pytest.mark.parametrize("turn", ["direct", "joined"])
@pytest.mark.parametrize("how", ["mask", "rows"])
def test_closed_heads_go(how: str, turn: str) -> None:
    net = Attention()
    y = net.attend(*net.queries(), turn=turn)
    rows = np.repeat(~CLOSED, DIMS)
    model = net.done(y, mask=~CLOSED) if how == "mask" else net.done(y, rows=rows)
    smaller = _cut(model)
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(constant(smaller, f"{name}.w"), constant(model, f"{name}.w")[:, OPEN])
        np.testing.assert_array_equal(constant(smaller, f"{name}.b"), constant(model, f"{name}.b")[OPEN])
    np.testing.assert_array_equal(constant(smaller, "out.w"), constant(model, "out.w")[OPEN])
    assert "gate" not in names(smaller)


def test_a_closed_dimension_of_one_head_stays_and_one_of_all_heads_goes() -> None:
    """Of values: dimension 2 is not read in any head, dimension 4 not in one."""
    net = Attention()
    rows = np.ones((HEADS, DIMS), bool)
    rows[:, 2] = rows[1, 4] = False
    model = net.done(net.attend(*net.queries()), rows=rows.ravel())
    smaller = _cut(model)
    left = np.delete(np.arange(INNER).reshape(HEADS, DIMS), 2, axis=1).ravel()
    assert constant(smaller, "v.w").shape == (WIDTH, len(left))
    np.testing.assert_array_equal(constant(smaller, "out.w"), constant(model, "out.w")[left])
    assert constant(smaller, "q.w").shape == (WIDTH, INNER), "the scores of every head are in use"


def test_dimensions_of_one_head_go_where_only_keys_and_values_have_an_axis_for_it() -> None:
    """As in networks whose first stage has one head (PVT): an axis of one channel is no axis to follow in queries."""
    net, closed = Attention(), np.array([True, False, False, True, False])
    q = net.linear(net.stream, WIDTH, DIMS, "q")
    q = net.node(
        "Transpose", [net.node("Reshape", [q, net.shape(0, LENGTH, 1, DIMS)], "q.split")], "q.head", perm=[0, 2, 1, 3]
    )
    both = net.linear(net.stream, WIDTH, 2 * DIMS, "kv", np.tile(closed, 2))
    both = net.node("Reshape", [both, net.shape(0, LENGTH, 2, 1, DIMS)], "kv.split")
    both = net.node("Transpose", [both], "kv.heads", perm=[2, 0, 3, 1, 4])
    k, v = (net.node("Gather", [both, net.constant(f"which{i}", np.array(i))], f"kv.{i}") for i in (0, 1))
    k = net.node("Transpose", [k], "k.turned", perm=[0, 1, 3, 2])
    shares = net.node("Softmax", [net.node("MatMul", [q, k], "scores")], "softmax", axis=-1)
    y = net.node("Transpose", [net.node("MatMul", [shares, v], "weighed")], "tokens", perm=[0, 2, 1, 3])
    y = net.linear(net.node("Reshape", [y, net.shape(0, LENGTH, DIMS)], "joined"), DIMS, WIDTH, "out")
    model = net.model(net.node("Add", [y, net.stream], "end"), ranks=[3])
    smaller = _cut(model)
    np.testing.assert_array_equal(constant(smaller, "q.w"), constant(model, "q.w")[:, ~closed])
    np.testing.assert_array_equal(constant(smaller, "kv.w"), constant(model, "kv.w")[:, np.tile(~closed, 2)])


@pytest.mark.parametrize("which", [("q",), ("k",), ("q", "k")])
def test_dimensions_of_queries_or_keys_that_are_zero_go_from_both(which: tuple[str, ...]) -> None:
    zeros = np.zeros((HEADS, DIMS), bool)
    zeros[:, [0, 3]] = True
    net = Attention()
    model = net.done(net.attend(*net.queries(dict.fromkeys(which, zeros.ravel()))))
    smaller = _cut(model)
    left = np.flatnonzero(~zeros.ravel())
    for name in ("q", "k"):
        np.testing.assert_array_equal(constant(smaller, f"{name}.w"), constant(model, f"{name}.w")[:, left])
    assert constant(smaller, "v.w").shape == (WIDTH, INNER)


def test_a_dimension_that_is_zero_in_queries_here_and_in_keys_there() -> None:
    zeros = {name: np.zeros((HEADS, DIMS), bool) for name in ("q", "k")}
    zeros["q"][:2, 1] = zeros["k"][2:, 1] = True
    net = Attention()
    model = net.done(net.attend(*net.queries({name: mask.ravel() for name, mask in zeros.items()})))
    assert constant(_cut(model), "q.w").shape == (WIDTH, HEADS * (DIMS - 1))


def test_zeros_that_do_not_fill_a_dimension_stay_zero() -> None:
    """Dimension 1 of one head is zero in the queries: its place stays, and so must the zero."""
    zeros = np.zeros((HEADS, DIMS), bool)
    zeros[0, 1] = True
    net = Attention()
    model = net.done(net.attend(*net.queries({"q": zeros.ravel()})))
    assert constant(_cut(model), "q.w").shape == (WIDTH, INNER)


def test_a_head_whose_queries_are_zero_stays_where_its_values_are_read() -> None:
    """It takes the mean over all tokens."""
    zeros = np.zeros((HEADS, DIMS), bool)
    zeros[1] = True
    net = Attention()
    model = net.done(net.attend(*net.queries({"q": zeros.ravel()})))
    smaller = _cut(model)
    assert constant(smaller, "v.w").shape == (WIDTH, INNER)


def test_all_heads_closed() -> None:
    net = Attention()
    model = net.done(net.attend(*net.queries()), mask=np.zeros(HEADS, bool))
    smaller = _cut(model)
    assert not names(smaller) & {"scores", "softmax", "weighed"}


def test_one_layer_for_queries_keys_and_values() -> None:
    """As timm writes it: one layer, split into three by a Slice each along a leading axis."""
    net = Attention()
    x = net.node(
        "Reshape", [net.linear(net.stream, WIDTH, 3 * INNER, "qkv"), net.shape(0, LENGTH, 3, HEADS, DIMS)], "view"
    )
    x = net.node("Transpose", [x], "permuted", perm=[2, 0, 3, 1, 4])
    parts = []
    for i in range(3):
        part = net.node("Slice", [x, net.shape(i), net.shape(i + 1), net.shape(0)], f"part{i}")
        parts.append(net.node("Squeeze", [part, net.shape(0)], f"squeezed{i}"))
    model = net.done(net.attend(*parts), rows=np.repeat(~CLOSED, DIMS))
    smaller = _cut(model)
    columns = (np.arange(3)[:, None] * INNER + OPEN).ravel()
    np.testing.assert_array_equal(constant(smaller, "qkv.w"), constant(model, "qkv.w")[:, columns])


def _leading(net: Attention, how: str) -> list[str]:
    """Queries, keys and values along an axis of their own: first as timm has it, or third as Bloom does."""
    x = net.linear(net.stream, WIDTH, 3 * INNER, "qkv")
    if how == "bloom":
        x = net.node("Reshape", [x, net.shape(0, LENGTH, HEADS, 3, DIMS)], "view")
        x = net.node("Transpose", [x], "permuted", perm=[3, 0, 2, 1, 4])
    else:
        x = net.node("Reshape", [x, net.shape(0, LENGTH, 3, HEADS, DIMS)], "view")
        x = net.node("Transpose", [x], "permuted", perm=[2, 0, 3, 1, 4])
    if how != "split":
        return [net.node("Gather", [x, net.constant(f"index{i}", np.array(i))], f"part{i}", axis=0) for i in (0, 1, -1)]
    net.nodes.append(onnx.helper.make_node("Split", [x], ["a", "b", "c"], "split", axis=0))
    return [net.node("Squeeze", [part, net.shape(0)], f"squeezed {part}") for part in "abc"]


@pytest.mark.parametrize("how", ["timm", "split", "bloom", "neox"])
def test_one_layer_for_queries_keys_and_values_in_every_order(how: str) -> None:
    net = Attention()
    if how == "neox":  # [heads, queries and keys and values]
        x = net.linear(net.stream, WIDTH, 3 * INNER, "qkv")
        x = net.node("Reshape", [x, net.shape(0, LENGTH, HEADS, 3 * DIMS)], "view")
        x = net.node("Transpose", [x], "permuted", perm=[0, 2, 1, 3])
        net.nodes.append(onnx.helper.make_node("Split", [x], ["a", "b", "c"], "split", axis=-1))
        parts = ["a", "b", "c"]
    else:
        parts = _leading(net, how)
    model = net.done(net.attend(parts[0], parts[1], parts[2]), mask=~CLOSED)
    columns = np.arange(3 * INNER)
    order = (HEADS, 3, DIMS) if how in ("bloom", "neox") else (3, HEADS, DIMS)
    left = columns.reshape(order).compress(~CLOSED, axis=order.index(HEADS)).ravel()
    np.testing.assert_array_equal(constant(_cut(model), "qkv.w"), constant(model, "qkv.w")[:, left])


def test_a_scale_that_is_told_by_the_shape_of_the_queries() -> None:
    """As PyTorch exports scaled_dot_product_attention; the number of dimensions is read, that of heads is not."""
    net = Attention()
    q, k, v = net.queries()
    size = net.node("Shape", [q], "sizes")
    size = net.node("Slice", [size, net.shape(-1), net.shape(1 << 40)], "size")
    root = net.node("Sqrt", [net.node("Cast", [size], "real", to=1)], "root")
    y = net.attend(net.node("Div", [q, root], "small"), k, v)
    model = net.done(y, rows=np.repeat(~CLOSED, DIMS))
    np.testing.assert_array_equal(constant(_cut(model), "q.w"), constant(model, "q.w")[:, OPEN])


@pytest.mark.parametrize("way", ["Split", "Slice", "pairs"])
def test_heads_that_nodes_rotate_go_as_a_whole(way: str) -> None:
    """Rotary embeddings: halves are exchanged (Llama), every second dimension (GPT-J), or pairs."""
    net, dims = Attention(), DIMS - 1
    cos, sin = (net.random.standard_normal((1, 1, LENGTH, dims)).astype(np.float32) for _ in range(2))
    net.constant("cos", cos if way != "pairs" else cos[..., :2, None])
    net.constant("sin", sin if way != "pairs" else sin[..., :2, None])

    def heads(name: str) -> str:
        x = net.linear(net.stream, WIDTH, HEADS * dims, name)
        x = net.node("Reshape", [x, net.shape(0, LENGTH, HEADS, dims)], f"{name}.split")
        return net.node("Transpose", [x], f"{name}.heads", perm=[0, 2, 1, 3])

    def halves(x: str) -> tuple[str, str]:
        if way == "Slice":
            bounds = [net.shape(1 << 40), net.shape(3), net.shape(2)]
            even, odd = (net.node("Slice", [x, net.shape(at), *bounds], f"{x}.{at}") for at in range(2))
            return even, odd
        net.nodes.append(onnx.helper.make_node("Split", [x], [f"{x}.0", f"{x}.1"], f"{x}.halves", axis=-1))
        return f"{x}.0", f"{x}.1"

    def rotated(x: str) -> str:
        if way == "pairs":
            pairs = net.node("Reshape", [x, net.shape(0, HEADS, LENGTH, dims // 2, 2)], f"{x}.pairs")
            a, b = halves(pairs)
            parts = [
                net.node(
                    op, [net.node("Mul", [u, "cos"], f"{u}{op}.cos"), net.node("Mul", [w, "sin"], f"{w}{op}.sin")], name
                )
                for op, u, w, name in (("Sub", a, b, f"{x}.real"), ("Add", b, a, f"{x}.imaginary"))
            ]
            joined = net.node("Concat", parts, f"{x}.turned", axis=-1)
            return net.node("Reshape", [joined, net.shape(0, HEADS, LENGTH, dims)], f"{x}.joined")
        a, b = halves(x)
        b = net.node("Neg", [b], f"{x}.minus")
        if way == "Slice":
            last = [net.node("Unsqueeze", [part, net.shape(4)], f"{part}.last") for part in (b, a)]
            pairs = net.node("Concat", last, f"{x}.stacked", axis=-1)
            turned = net.node("Reshape", [pairs, net.shape(0, HEADS, LENGTH, dims)], f"{x}.turned")
        else:
            turned = net.node("Concat", [b, a], f"{x}.turned", axis=-1)
        cosine, sine = net.node("Mul", [x, "cos"], f"{x}.cos"), net.node("Mul", [turned, "sin"], f"{x}.sin")
        return net.node("Add", [cosine, sine], f"{x}.rotated")

    q, k = rotated(heads("q")), rotated(heads("k"))
    model = net.done(net.attend(q, k, net.split(net.linear(net.stream, WIDTH, INNER, "v"), "v")), mask=~CLOSED)
    left = np.flatnonzero(~np.repeat(CLOSED, dims))
    smaller = _cut(model)
    for name in ("q", "k"):
        np.testing.assert_array_equal(constant(smaller, f"{name}.w"), constant(model, f"{name}.w")[:, left])


def test_heads_go_with_what_is_one_number_for_all_of_their_dimensions() -> None:
    """Queries of length one, as in cosine attention."""
    net = Attention()
    q, k, v = net.queries()
    length = net.node("ReduceL2", [q], "length", axes=[-1], keepdims=1)
    model = net.done(net.attend(net.node("Div", [q, length], "unit"), k, v), mask=~CLOSED)
    np.testing.assert_array_equal(constant(_cut(model), "q.w"), constant(model, "q.w")[:, OPEN])


def test_a_mask_in_front_of_the_scores() -> None:
    """A mask [batch, tokens] that comes in has its channels along the tokens, and is the first input of a Where."""
    net = Attention()
    net.inputs.append(onnx.helper.make_tensor_value_info("real tokens", onnx.TensorProto.BOOL, ["batch", LENGTH]))
    q, k, v = net.queries()
    scores = net.node("MatMul", [q, net.node("Transpose", [k], "k.turned", perm=[0, 1, 3, 2])], "scores")
    keys = net.node("Unsqueeze", ["real tokens", net.shape(1, 2)], "keys")
    scores = net.node("Where", [keys, scores, net.constant("low", np.float32(-1e4))], "masked")
    y = net.node("MatMul", [net.node("Softmax", [scores], "softmax", axis=-1), v], "weighed")
    model = net.done(y, mask=~CLOSED)
    smaller = compress(model).model
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(constant(smaller, f"{name}.w"), constant(model, f"{name}.w")[:, OPEN])


@pytest.mark.parametrize("way", ["Einsum", "Einsum of tokens", "FusedMatMul", "values first"])
def test_products_in_other_words(way: str) -> None:
    net = Attention()
    if way == "Einsum of tokens":  # [batch, tokens, heads, dimensions]
        q, k, v = (
            net.node(
                "Reshape", [net.linear(net.stream, WIDTH, INNER, n), net.shape(0, LENGTH, HEADS, DIMS)], f"{n}.view"
            )
            for n in ("q", "k", "v")
        )
        scores = net.node("Einsum", [q, k], "scores", equation="blhd,bmhd->bhlm")
        weights = net.node("Softmax", [scores], "softmax", axis=-1)
        y = net.node("Einsum", [weights, v], "weighed", equation="bhlm,bmhd->bhld")
    else:
        q, k, v = net.queries()
        if way == "FusedMatMul":
            scores = net.node("FusedMatMul", [q, k], "scores", "com.microsoft", transB=1, alpha=0.4)
        else:
            scores = net.node("Einsum", [q, k], "scores", equation="bhid,bhjd->bhij")
        weights = net.node("Softmax", [scores], "softmax", axis=-1)
        if way == "values first":
            turned = net.node("Transpose", [weights], "turned", perm=[0, 1, 3, 2])
            y = net.node("MatMul", [net.node("Transpose", [v], "v.turned", perm=[0, 1, 3, 2]), turned], "columns")
            y = net.node("Transpose", [y], "weighed", perm=[0, 1, 3, 2])
        else:
            y = net.node("MatMul", [weights, v], "weighed")
    model = net.done(y, mask=~CLOSED)
    smaller = _cut(model)
    for name in ("q", "k", "v"):
        np.testing.assert_array_equal(constant(smaller, f"{name}.w"), constant(model, f"{name}.w")[:, OPEN])
    np.testing.assert_array_equal(constant(smaller, "out.w"), constant(model, "out.w")[OPEN])


def test_quantised_attention() -> None:
    net = Attention()
    net.constant("step", np.float32(0.05))
    net.constant("middle", np.int8(0))

    def rounded(x: str) -> str:
        stored = net.node("QuantizeLinear", [x, "step", "middle"], f"{x}.stored")
        return net.node("DequantizeLinear", [stored, "step", "middle"], f"{x}.rounded")

    q, k, v = net.queries()
    y = net.attend(rounded(q), rounded(k), rounded(v))
    model = net.done(rounded(y), mask=~CLOSED)
    np.testing.assert_array_equal(constant(_cut(model), "q.w"), constant(model, "q.w")[:, OPEN])


@pytest.mark.parametrize("repeat", ["Expand", "Tile"])
def test_groups_of_queries_that_share_keys_and_values(repeat: str) -> None:
    """Two heads of keys and values, each repeated for two of the queries; the second one is not read."""
    net = Attention()
    q = net.split(net.linear(net.stream, WIDTH, INNER, "q"), "q")

    def repeated(name: str) -> str:
        x = net.linear(net.stream, WIDTH, INNER // 2, name)
        x = net.node("Reshape", [x, net.shape(0, LENGTH, 2, DIMS)], f"{name}.split")
        x = net.node("Transpose", [x], f"{name}.heads", perm=[0, 2, 1, 3])
        x = net.node("Unsqueeze", [x, net.shape(2)], f"{name}.groups")
        sizes = net.shape(1, 1, 2, 1, 1) if repeat == "Tile" else net.shape(1, 2, 2, LENGTH, DIMS)
        x = net.node(repeat, [x, sizes], f"{name}.repeated")
        return net.node("Reshape", [x, net.shape(0, HEADS, LENGTH, DIMS)], f"{name}.joined")

    model = net.done(net.attend(q, repeated("k"), repeated("v")), mask=np.array([True, True, False, False]))
    smaller = _cut(model)
    np.testing.assert_array_equal(constant(smaller, "q.w"), constant(model, "q.w")[:, : 2 * DIMS])
    for name in ("k", "v"):
        np.testing.assert_array_equal(constant(smaller, f"{name}.w"), constant(model, f"{name}.w")[:, :DIMS])


@pytest.mark.parametrize("zeros", ["none", "values"])
def test_linear_attention(zeros: str) -> None:
    """Keys weigh values first, which makes a matrix of dimensions for each head; queries are weighed by it."""
    net, dead = Attention(), np.zeros((HEADS, DIMS), bool)
    dead[:, [0, 3]] = zeros == "values"
    q, k, v = net.queries({"v": dead.ravel()})
    k = net.node("Transpose", [net.node("Softmax", [k], "k.softmax", axis=2)], "k.turned", perm=[0, 1, 3, 2])
    context = net.node("MatMul", [k, v], "context")
    model = net.done(net.node("MatMul", [q, context], "weighed"), mask=~CLOSED)
    smaller = _cut(model)
    for name in ("q", "k"):
        np.testing.assert_array_equal(constant(smaller, f"{name}.w"), constant(model, f"{name}.w")[:, OPEN])
    left = np.flatnonzero(~(np.repeat(CLOSED, DIMS) | dead.ravel()))
    np.testing.assert_array_equal(constant(smaller, "v.w"), constant(model, "v.w")[:, left])
    np.testing.assert_array_equal(constant(smaller, "out.w"), constant(model, "out.w")[left])


def test_queries_that_share_one_head_of_keys_and_values() -> None:
    """Multi-query attention; dimension 1 is zero in the keys, and goes from every head of the queries."""
    net = Attention()
    dead = np.arange(DIMS) == 1
    q = net.split(net.linear(net.stream, WIDTH, INNER, "q"), "q")
    k, v = (
        net.node(
            "Unsqueeze",
            [net.linear(net.stream, WIDTH, DIMS, name, dead if name == "k" else None), net.shape(1)],
            f"{name}.head",
        )
        for name in ("k", "v")
    )
    model = net.done(net.attend(q, k, v), mask=~CLOSED)
    smaller = _cut(model)
    left = np.flatnonzero(~(np.repeat(CLOSED, DIMS) | np.tile(dead, HEADS)))
    np.testing.assert_array_equal(constant(smaller, "q.w"), constant(model, "q.w")[:, left])
    np.testing.assert_array_equal(constant(smaller, "k.w"), constant(model, "k.w")[:, ~dead])
    assert constant(smaller, "v.w").shape == (WIDTH, DIMS)


def test_heads_that_are_an_output_stay() -> None:
    net = Attention()
    y = net.attend(*net.queries())
    model = net.done(y, mask=~CLOSED)
    model.graph.output.append(onnx.helper.make_tensor_value_info("weighed", 1, None))
    assert constant(_cut(model), "v.w").shape == (WIDTH, INNER)
