"""Attention layers that are one operator: closed heads go, and of the heads that stay what nobody reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.surgery import Surgery, compress
from tests.surgery.graphs import Array, Net, assert_same, constant, newest_opset

LENGTH, WIDTH, DIMS = 5, 12, 8
MS = "com.microsoft"


class Layer(Net):
    """[batch, tokens, channels] through one attention layer and a projection."""

    def __init__(self, heads: int = 4, groups: int = 1, *, opset: int = 23) -> None:
        """heads: of keys and values; groups: query heads for each."""
        super().__init__(opset=opset)
        self.heads, self.groups = heads, groups
        self.inputs = [helper.make_tensor_value_info("input", 1, ["batch", LENGTH, WIDTH])]
        self.stream = self.linear("input", WIDTH, WIDTH, "stem")
        self.zeros: dict[str, Array] = {}

    def three(self) -> list[str]:
        """Queries, keys and values, [batch, tokens, channels] each."""
        few, many = self.heads * DIMS, self.heads * self.groups * DIMS
        return [
            self.linear(self.stream, WIDTH, width, name, self.zeros.get(name))
            for name, width in (("q", many), ("k", few), ("v", few))
        ]

    def split(self, x: str, heads: int) -> str:
        """To [batch, heads, tokens, dimensions]."""
        shape = self.constant(f"{x}.shape", np.array([0, LENGTH, heads, DIMS]))
        x = self.node("Reshape", [x, shape], f"{x}.split")
        return self.node("Transpose", [x], f"{x}.turned", perm=[0, 2, 1, 3])

    def join(self, x: str) -> str:
        x = self.node("Transpose", [x], "back", perm=[0, 2, 1, 3])
        return self.node("Reshape", [x, self.constant("joined", np.array([0, LENGTH, -1]))], "flat")

    def done(self, y: str, read: Array, *outputs: str) -> onnx.ModelProto:
        """read: [channels] rows of the projection that are not zero."""
        weight = self.random.standard_normal((len(read), WIDTH)).astype(np.float32)
        weight[~read] = 0
        y = self.node("MatMul", [y, self.constant("out.w", weight)], "out")
        self.width["end"] = WIDTH
        y = self.node("Add", [y, self.stream], "end")
        model = self.model(y, *outputs, ranks=[3, *[4] * len(outputs)])
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        return model


def standard(net: Layer, *extra: str, **attributes: Any) -> str:
    """Attention of ONNX on three axes."""
    heads: dict[str, Any] = {"q_num_heads": net.heads * net.groups, "kv_num_heads": net.heads}
    return net.node("Attention", [*net.three(), *extra], "attention", **heads, **attributes)


def split(net: Layer, *extra: str, **attributes: Any) -> str:
    """The same on four axes."""
    counts = (net.heads * net.groups, net.heads, net.heads)
    three = [net.split(x, count) for x, count in zip(net.three(), counts, strict=True)]
    return net.join(net.node("Attention", [*three, *extra], "attention", **attributes))


def multi_head(net: Layer, *extra: str, **attributes: Any) -> str:
    """MultiHeadAttention of com.microsoft; extra: what is added to the scores."""
    bias = net.random.standard_normal(3 * net.heads * DIMS).astype(np.float32)
    for index, name in enumerate("qkv"):
        if name in net.zeros:
            bias.reshape(3, -1)[index, net.zeros[name]] = 0
    inputs = [*net.three(), net.constant("packed", bias), "", *extra]
    return net.node("MultiHeadAttention", inputs, "attention", MS, num_heads=net.heads, **attributes)


def grouped(net: Layer, *extra: str, **attributes: Any) -> str:
    """GroupQueryAttention of com.microsoft, without a cache."""
    lengths = net.constant("lengths", np.full(1, LENGTH - 1, np.int32))
    batch = net.node("Gather", [net.node("Shape", ["input"], "sizes"), net.constant("zero", np.array([0]))], "batch")
    lengths = net.node("Expand", [lengths, batch], "seqlens")
    inputs = [*net.three(), "", "", lengths, net.constant("total", np.array(LENGTH, np.int32)), *extra]
    heads: dict[str, Any] = {"num_heads": net.heads * net.groups, "kv_num_heads": net.heads}
    net.nodes.append(
        helper.make_node(
            "GroupQueryAttention", inputs, ["y", "keys", "values"], "attention", domain=MS, **heads, **attributes
        )
    )
    net.width |= {"keys": net.heads, "values": net.heads}
    return "y"


def projected(net: Layer, *extra: str, **attributes: Any) -> str:
    """Attention of com.microsoft, which makes queries, keys and values itself."""
    weight = net.random.standard_normal((WIDTH, 3, net.heads * DIMS)).astype(np.float32) / 3
    bias = net.random.standard_normal((3, net.heads * DIMS)).astype(np.float32)
    for index, name in enumerate("qkv"):
        if name in net.zeros:
            weight[:, index, net.zeros[name]] = bias[index, net.zeros[name]] = 0
    inputs = [net.stream, net.constant("qkv.w", weight.reshape(WIDTH, -1)), net.constant("qkv.b", bias.ravel())]
    return net.node("Attention", [*inputs, "", "", *extra], "attention", MS, num_heads=net.heads, **attributes)


def sizes(model: onnx.ModelProto) -> tuple[int, int, int]:
    """Channels of queries, keys and values."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    if "qkv.w" in held:
        node = next(node for node in model.graph.node if node.op_type == "Attention")
        told = [list(entry.ints) for entry in node.attribute if entry.name == "qkv_hidden_sizes"]
        q, k, v = told[0] if told else [held["qkv.w"].dims[1] // 3] * 3
        assert q + k + v == held["qkv.w"].dims[1] == held["qkv.b"].dims[0]
        return q, k, v
    q, k, v = (held[f"{name}.w"].dims[1] for name in "qkv")
    return q, k, v


def heads_left(model: onnx.ModelProto) -> dict[str, int]:
    node = next(node for node in model.graph.node if node.name == "attention")
    return {entry.name: entry.i for entry in node.attribute if entry.name.endswith("num_heads")}


def check(model: onnx.ModelProto) -> Surgery:
    surgery = compress(model)
    assert surgery.report["as_it_is"] is None, surgery.report["as_it_is"]
    assert_same(model, surgery.model)
    again = compress(surgery.model)
    assert again.model.SerializeToString(deterministic=True) == surgery.model.SerializeToString(deterministic=True)
    return surgery


ALL = [standard, split, multi_head, grouped, projected]
IN_PART = [standard, multi_head, projected]  # heads may lose dimensions, each its own


@pytest.mark.parametrize("add", ALL, ids=lambda f: str(f.__name__))
def test_closed_heads_go(add: Any) -> None:
    net = Layer()
    read = np.repeat([True, False, False, True], DIMS)
    smaller = check(net.done(add(net), read)).model
    assert sizes(smaller) == (2 * DIMS,) * 3
    assert constant(smaller, "out.w").shape == (2 * DIMS, WIDTH)
    assert set(heads_left(smaller).values()) <= {2}


@pytest.mark.parametrize("add", [standard, split, grouped], ids=lambda f: str(f.__name__))
def test_groups_of_heads_go_with_their_keys_and_values(add: Any) -> None:
    net = Layer(heads=2, groups=3)
    read = np.repeat([False] * 3 + [True] * 3, DIMS)
    smaller = check(net.done(add(net), read)).model
    assert sizes(smaller) == (3 * DIMS, DIMS, DIMS)


@pytest.mark.parametrize("add", [standard, split, grouped], ids=lambda f: str(f.__name__))
def test_each_group_loses_as_many_heads_as_the_fullest_one_allows(add: Any) -> None:
    """Of the first group heads 0 and 1 are closed, of the second head 2: one of each can go."""
    net = Layer(heads=2, groups=3)
    read = np.repeat([False, False, True, True, True, False], DIMS)
    smaller = check(net.done(add(net), read)).model
    assert sizes(smaller) == (4 * DIMS, 2 * DIMS, 2 * DIMS)
    assert constant(smaller, "out.w").shape == (4 * DIMS, WIDTH)


@pytest.mark.parametrize("add", IN_PART, ids=lambda f: str(f.__name__))
def test_each_head_loses_dimensions_of_its_own(add: Any) -> None:
    """Heads read 5, 4, 5, 5 dimensions of their values: 5 are left in each."""
    net = Layer()
    read = np.ones((4, DIMS), bool)
    read[0, :3] = read[1, 2:6] = read[2, 5:] = read[3, [0, 4, 7]] = False
    smaller = check(net.done(add(net), read.ravel())).model
    assert sizes(smaller) == (4 * DIMS, 4 * DIMS, 4 * 5)


@pytest.mark.parametrize("which", ["q", "k", "both"])
@pytest.mark.parametrize("add", [*IN_PART, split], ids=lambda f: str(f.__name__))
def test_dimensions_that_are_zero_in_queries_or_keys_go_from_both(add: Any, which: str) -> None:
    """The scores keep their scale, which came from the number of dimensions."""
    net = Layer()
    zeros = np.zeros((4, DIMS), bool)
    zeros[:, [1, 6]] = True
    if which == "both":
        net.zeros = {"q": zeros.copy().ravel(), "k": zeros.copy().ravel()}
        net.zeros["q"].reshape(4, DIMS)[:2] = net.zeros["k"].reshape(4, DIMS)[2:] = False
    else:
        net.zeros = {which: zeros.ravel()}
    smaller = check(net.done(add(net), np.ones(4 * DIMS, bool))).model
    assert sizes(smaller) == (4 * 6, 4 * 6, 4 * DIMS)


@pytest.mark.parametrize("add", IN_PART, ids=lambda f: str(f.__name__))
def test_zeros_that_cannot_go_stay_zero(add: Any) -> None:
    """Only one head has them: it keeps as many dimensions as the others."""
    net = Layer()
    zeros = np.zeros(4 * DIMS, bool)
    zeros[:3] = True
    net.zeros = {"q": zeros}
    smaller = check(net.done(add(net), np.ones(4 * DIMS, bool))).model
    assert sizes(smaller) == (4 * DIMS,) * 3


@pytest.mark.parametrize("add", [standard, split, multi_head, grouped, projected], ids=lambda f: str(f.__name__))
def test_masks_with_a_number_for_each_head_are_cut(add: Any) -> None:
    net = Layer()
    mask = net.constant("scores", net.random.standard_normal((1, 4, LENGTH, LENGTH)).astype(np.float32))
    extra = ["", "", "", mask] if add is grouped else [mask]
    smaller = check(net.done(add(net, *extra), np.repeat([True, False, True, False], DIMS))).model
    assert sizes(smaller) == (2 * DIMS,) * 3
    assert constant(smaller, "scores").shape == (1, 2, LENGTH, LENGTH)


@pytest.mark.parametrize("add", [standard, projected], ids=lambda f: str(f.__name__))
def test_a_scale_that_is_told_stays(add: Any) -> None:
    net = Layer()
    net.zeros = {"q": np.arange(4 * DIMS) % DIMS < 2}
    smaller = check(net.done(add(net, scale=0.3), np.ones(4 * DIMS, bool))).model
    node = next(node for node in smaller.graph.node if node.name == "attention")
    assert next(entry.f for entry in node.attribute if entry.name == "scale") == np.float32(0.3)
    assert sizes(smaller) == (4 * 6, 4 * 6, 4 * DIMS)


def test_what_is_cached_stays_and_query_heads_go_evenly() -> None:
    """Keys and values are outputs, as of language models."""
    net = Layer(heads=2, groups=3)
    y = grouped(net)
    model = net.done(y, np.repeat([False, True, True, True, True, False], DIMS), "keys", "values")
    smaller = check(model).model
    assert sizes(smaller) == (4 * DIMS, 2 * DIMS, 2 * DIMS)
    assert heads_left(smaller) == {"num_heads": 4, "kv_num_heads": 2}


def test_keys_and_values_of_before_keep_all_heads() -> None:
    net = Layer()
    past = net.constant("past", net.random.standard_normal((1, 4, 2, DIMS)).astype(np.float32))
    shape = net.node("Shape", ["input"], "size")
    first = net.node("Slice", [shape, *(net.constant(f"c{i}", np.array([i])) for i in (0, 1))], "first")
    wide = net.node("Concat", [first, net.constant("ones", np.array([1, 1, 1]))], "wide", axis=0)
    past = net.node("Expand", [past, wide], "past.all")
    inputs, told = [*net.three(), "", past, past], dict[str, Any](q_num_heads=4, kv_num_heads=4)
    net.nodes.append(helper.make_node("Attention", inputs, ["y", "keys", "values"], "attention", **told))
    surgery = check(net.done("y", np.repeat([True, False, True, False], DIMS)))
    assert sizes(surgery.model) == (4 * DIMS,) * 3
    assert "Attention" not in {entry["operator"] for entry in surgery.report["unsupported"]}


@pytest.mark.parametrize("domain", ["", MS], ids=["onnx", "microsoft"])
@pytest.mark.parametrize("ranks", [3, 4])
def test_rotated_heads_go_as_a_whole(domain: str, ranks: int) -> None:
    """Of a head that stays, zeros of queries stay too: they are turned into something else."""
    net = Layer()
    angles = net.random.standard_normal((LENGTH, DIMS // 2))
    tables = [net.constant(name, table(angles).astype(np.float32)) for name, table in (("c", np.cos), ("s", np.sin))]
    where = np.arange(LENGTH)[None]
    sizes_ = net.node("Gather", [net.node("Shape", ["input"], "sizes"), net.constant("zero", np.array([0]))], "batch")
    shape = net.node("Concat", [sizes_, net.constant("long", np.array([LENGTH]))], "where.shape", axis=0)
    positions = net.node("Expand", [net.constant("where", where), shape], "positions")
    net.zeros = {"q": np.arange(4 * DIMS) % DIMS == 1}

    def turn(x: str) -> str:
        inputs = [x, positions, *tables] if domain else [x, *tables, positions]
        return net.node("RotaryEmbedding", inputs, f"{x}.rotary", domain, num_heads=4)

    three = net.three()
    if ranks == 4:
        three = [net.split(x, 4) for x in three]
    three = [turn(three[0]), turn(three[1]), three[2]]
    told: dict[str, Any] = {"q_num_heads": 4, "kv_num_heads": 4} if ranks == 3 else {}
    y = net.node("Attention", three, "attention", **told)
    y = y if ranks == 3 else net.join(y)
    smaller = check(net.done(y, np.repeat([True, False, True, True], DIMS))).model
    assert sizes(smaller) == (3 * DIMS,) * 3
    told_by = [entry.i for node in smaller.graph.node for entry in node.attribute if entry.name == "num_heads"]
    assert told_by == [3, 3]


def test_inputs_of_a_layer_that_projects_itself_go() -> None:
    """What closed channels of its input hold goes into its bias."""
    net = Layer()
    mask = np.ones(WIDTH, np.float32)
    mask[::3] = 0
    x = net.node("Mul", [net.stream, net.constant("mask", mask)], "gate")
    net.stream = net.node("Sigmoid", [x], "half")
    y = projected(net)
    net.stream = "input"
    smaller = check(net.done(y, np.ones(4 * DIMS, bool))).model
    assert constant(smaller, "qkv.w").shape == (8, 3 * 4 * DIMS)
    assert constant(smaller, "stem.w").shape == (WIDTH, 8)


@pytest.mark.skipif(newest_opset() < 23, reason="this ONNX Runtime has no Attention")
def test_an_attention_layer_of_which_nothing_is_read() -> None:
    net = Layer()
    model = net.done(standard(net), np.zeros(4 * DIMS, bool))
    smaller = compress(model).model
    assert_same(model, smaller)
    assert "attention" not in {node.name for node in smaller.graph.node}
