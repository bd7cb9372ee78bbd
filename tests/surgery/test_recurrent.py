"""LSTM, GRU and RNN lose the columns of closed input channels; what these hold, if not zero, goes into the bias.

Hidden units go that nobody reads, neither behind the layer nor at its next step, and those that stay zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from polar_deploy.surgery import compress
from tests.surgery.graphs import CLOSED, Array, Net, constant, cut, weight

HIDDEN, OPEN = 5, [0, 2, 3, 5]
KINDS = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _model(kind: str, *, directions: int = 1, bias: bool = True, constant: bool = False) -> onnx.ModelProto:
    """Rows of an image are the steps. constant: closed channels hold 0.5."""
    net = Net(size=4)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("Sigmoid" if constant else "Relu", [x], "act")
    x = net.node("ReduceMean", [x], "rows", axes=[3], keepdims=0)
    x = net.node("Transpose", [x], "steps", perm=[2, 0, 1])
    gates = KINDS[kind] * HIDDEN
    inputs = [x, *(net.constant(f"w{n}", _normal(net, directions, gates, n)) for n in (6, HIDDEN))]
    if bias:
        inputs.append(net.constant("b", _normal(net, directions, 2 * gates)))
    way = {"direction": "bidirectional"} if directions == 2 else {}
    net.nodes.append(onnx.helper.make_node(kind, inputs, ["y", "last"], name="tested", hidden_size=HIDDEN, **way))
    x = net.node("Transpose", ["last"], "turn", perm=[1, 0, 2])
    net.width["flat"] = directions * HIDDEN
    x = net.node("Flatten", [x], "flat")
    return net.model(net.gemm(x, directions * HIDDEN, 4, "logits"))


def _normal(net: Net, *shape: int) -> Array:
    return np.asarray(0.5 * net.random.standard_normal(shape), np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
def test_columns_of_closed_channels_go(kind: str, directions: int) -> None:
    model = _model(kind, directions=directions)
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 4
    np.testing.assert_array_equal(weight(surgery.model, "tested"), weight(model, "tested")[..., OPEN])
    np.testing.assert_array_equal(weight(surgery.model, "tested", 2), weight(model, "tested", 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_constants_go_into_the_bias(kind: str, bias: bool) -> None:
    model = _model(kind, bias=bias, constant=True)
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 4
    before = weight(model, "tested", 3) if bias else np.zeros((1, 2 * KINDS[kind] * HIDDEN))
    gates = KINDS[kind] * HIDDEN
    moved = 0.5 * weight(model, "tested")[..., CLOSED].sum(axis=2)
    np.testing.assert_allclose(weight(surgery.model, "tested", 3)[:, :gates], before[:, :gates] + moved, atol=1e-6)
    np.testing.assert_array_equal(weight(surgery.model, "tested", 3)[:, gates:], before[:, gates:])


def test_one_column_is_left() -> None:
    net = Net(size=4)
    x = net.gate(net.conv("input", 6, "one"), range(6), "gate")
    x = net.node("Transpose", [net.node("ReduceMean", [x], "rows", axes=[3], keepdims=0)], "steps", perm=[2, 0, 1])
    inputs = [x, *(net.constant(f"w{n}", _normal(net, 1, HIDDEN, n)) for n in (6, HIDDEN))]
    inputs.append(net.constant("b", _normal(net, 1, 2 * HIDDEN)))  # without it, all units stay zero
    net.nodes.append(onnx.helper.make_node("RNN", inputs, ["y", "last"], name="tested", hidden_size=HIDDEN))
    x = net.node("Transpose", ["last"], "turn", perm=[1, 0, 2])
    net.width["flat"] = HIDDEN
    x = net.node("Flatten", [x], "flat")
    surgery = cut(net.model(net.gemm(x, HIDDEN, 4, "logits")))
    assert weight(surgery.model, "tested").shape == (1, HIDDEN, 1)


DEAD = (1, 3)  # of five hidden units
LEFT = [0, 2, 4]


def _hidden(
    kind: str, *, directions: int = 1, dead: str = "unread", output: str = "last", **more: Array
) -> onnx.ModelProto:
    """dead: whether units are read by nobody ("unread"), by others of them only, by a living one, or stay zero."""
    net = Net(channels=6, size=4)
    x = net.node("ReduceMean", ["input"], "rows", axes=[3], keepdims=0)  # [batch, channels, steps]
    x = net.node("Transpose", [x], "steps", perm=[2, 0, 1])
    gates = KINDS[kind]
    w, r = _normal(net, directions, gates, HIDDEN, 6), _normal(net, directions, gates, HIDDEN, HIDDEN)
    b = _normal(net, directions, 2, gates, HIDDEN)
    read = np.ones((directions, HIDDEN), bool)
    if dead == "zero":
        candidate = {"LSTM": 3, "GRU": 2, "RNN": 0}[kind]
        w[:, candidate, DEAD] = b[:, :, candidate, DEAD] = 0
        r[:, candidate, DEAD] = 0
    else:
        read[:, DEAD] = False
        for living in LEFT if dead == "read by dead ones" else range(HIDDEN):
            r[:, :, living, DEAD] = 0
        if dead == "read by one":
            r[:, 0, 0, 1] = 0.5
    flat = (w.reshape(directions, -1, 6), r.reshape(directions, -1, HIDDEN), b.reshape(directions, -1))
    inputs = [x, *(net.constant(name, values) for name, values in zip("wrb", flat, strict=True))]
    if more:
        inputs += ["", *(net.constant(name, values) if values is not None else "" for name, values in more.items())]
    way = {"direction": "bidirectional"} if directions == 2 else {}
    outputs = ["y", "last"] if output == "last" else ["y"]
    net.nodes.append(onnx.helper.make_node(kind, inputs, outputs, name="tested", hidden_size=HIDDEN, **way))
    if output == "last":
        x = net.node("Transpose", ["last"], "turn", perm=[1, 0, 2])
    else:  # [steps, directions, batch, hidden] to [batch, directions, hidden]
        x = net.node("ReduceMean", ["y"], "mean", axes=[0], keepdims=0)
        x = net.node("Transpose", [x], "turn", perm=[1, 0, 2])
    net.width["flat"] = directions * HIDDEN
    x = net.gemm(net.node("Flatten", [x], "flat"), directions * HIDDEN, 4, "logits")
    held = next(tensor for tensor in net.constants if tensor.name == "logits.weight")
    values = onnx.numpy_helper.to_array(held).copy()
    values[:, ~read.ravel()] = 0
    held.CopyFrom(onnx.numpy_helper.from_array(values, held.name))
    return net.model(x)


def _sizes(model: onnx.ModelProto) -> tuple[int, int, int]:
    """Hidden units, as the node is told, as its weights have, and as the layer behind reads them."""
    node = next(node for node in model.graph.node if node.name == "tested")
    told = next(entry.i for entry in node.attribute if entry.name == "hidden_size")
    return told, weight(model, "tested", 2).shape[2], weight(model, "logits").shape[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dead", ["unread", "read by dead ones", "zero"])
@pytest.mark.parametrize("output", ["last", "all"])
def test_hidden_units_that_nobody_needs_go(kind: str, directions: int, dead: str, output: str) -> None:
    model = _hidden(kind, directions=directions, dead=dead, output=output)
    surgery = cut(model)
    assert _sizes(surgery.model) == (3, 3, 3 * directions)
    rows = [gate * HIDDEN + unit for gate in range(KINDS[kind]) for unit in LEFT]
    np.testing.assert_array_equal(weight(surgery.model, "tested"), weight(model, "tested")[:, rows])
    np.testing.assert_array_equal(weight(surgery.model, "tested", 2), weight(model, "tested", 2)[:, rows][..., LEFT])


def _on_input(kind: str, shape: Sequence[int | str], *, directions: int = 1, turned: bool = False) -> onnx.ModelProto:
    """The units DEAD of a layer are closed behind it; it reads the input, [steps, batch, 6] or `turned` to that."""
    net = Net()
    net.inputs = [onnx.helper.make_tensor_value_info("input", 1, shape)]
    gates = KINDS[kind] * HIDDEN
    x = net.node("Transpose", ["input"], "steps", perm=[1, 0, 2]) if turned else "input"
    recurrence = _normal(net, directions, gates, HIDDEN)
    recurrence[..., DEAD] = 0
    weights = {"w": _normal(net, directions, gates, 6), "r": recurrence, "b": _normal(net, directions, 2 * gates)}
    inputs = [x, *(net.constant(name, values) for name, values in weights.items())]
    way = {"direction": "bidirectional"} if directions == 2 else {}
    net.nodes.append(onnx.helper.make_node(kind, inputs, ["y"], name="tested", hidden_size=HIDDEN, **way))
    x = net.node("ReduceMean", ["y"], "mean", axes=[0], keepdims=0)  # [directions, batch, hidden]
    x = net.node("Flatten", [net.node("Transpose", [x], "turn", perm=[1, 0, 2])], "flat")
    net.width["flat"] = directions * HIDDEN
    x = net.gate(x, [turn * HIDDEN + unit for turn in range(directions) for unit in DEAD], "gate", shape="1c")
    return net.model(net.gemm(x, directions * HIDDEN, 4, "logits"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("turned", [False, True], ids=["steps first", "batch first"])
@pytest.mark.parametrize(("steps", "batch"), [("steps", "batch"), (4, "batch"), ("steps", 3), (4, 3)])
def test_hidden_units_of_a_layer_that_reads_an_input_go(
    kind: str, directions: int, turned: bool, steps: int | str, batch: int | str
) -> None:
    model = _on_input(kind, (batch, steps, 6) if turned else (steps, batch, 6), directions=directions, turned=turned)
    surgery = cut(model)
    assert _sizes(surgery.model) == (3, 3, 3 * directions)
    rows = [gate * HIDDEN + unit for gate in range(KINDS[kind]) for unit in LEFT]
    np.testing.assert_array_equal(weight(surgery.model, "tested"), weight(model, "tested")[:, rows])


@pytest.mark.parametrize("kind", KINDS)
def test_channels_on_the_axis_of_the_batch_stay(kind: str) -> None:
    """Columns of an image are the inputs, its channels the batch, and images the steps."""
    net = Net(size=4)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    x = net.node("ReduceMean", [x], "columns", axes=[2], keepdims=0)
    recurrence = _normal(net, 1, KINDS[kind] * HIDDEN, HIDDEN)
    recurrence[..., DEAD] = 0
    inputs = [x, net.constant("w", _normal(net, 1, KINDS[kind] * HIDDEN, 4)), net.constant("r", recurrence)]
    net.nodes.append(onnx.helper.make_node(kind, inputs, ["y"], name="tested", hidden_size=HIDDEN))
    x = net.node("ReduceMean", ["y"], "mean", axes=[1, 2], keepdims=0)  # [images, hidden]
    net.width["mean"] = HIDDEN
    surgery = cut(net.model(net.gemm(net.gate(x, DEAD, "units", shape="1c"), HIDDEN, 4, "logits")))
    assert _sizes(surgery.model) == (3, 3, 3)
    assert weight(surgery.model, "one").shape[0] == 6
    reasons = {entry["reason"] for entry in surgery.report["cuts_not_made"]}
    assert reasons == {"it mixes another axis than that of the channels"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_a_living_one_reads_stays(kind: str) -> None:
    """Unit 1 is read by unit 0 at the next step, unit 3 by nobody."""
    surgery = cut(_hidden(kind, dead="read by one"))
    assert _sizes(surgery.model) == (4, 4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_start_elsewhere_are_not_zero(kind: str) -> None:
    """They fade, or stay what they were."""
    start = np.full((1, 1, HIDDEN), 0.5, np.float32)
    model = _hidden(kind, dead="zero", start=start)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    surgery = compress(model)
    assert _sizes(surgery.model)[0] == HIDDEN
    assert surgery.report["verified"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "left"), [(0.0, 3), (0.5, HIDDEN)])
def test_states_that_are_computed_zeros_are_left_out(kind: str, start: float, left: int) -> None:
    """PyTorch expands a zero to the batch, for all layers at once, and cuts out those of each."""
    model = _hidden(kind, directions=2)
    graph, net = model.graph, Net()
    batch = net.node("Shape", ["input"], "batch", start=0, end=1)
    parts = [net.constant(name, np.array([size])) for name, size in (("layers", 4), ("units", HIDDEN))]
    size = net.node("Concat", [parts[0], batch, parts[1]], "size", axis=0)
    every = net.node("Expand", [net.constant("number", np.float32(start)), size], "every")
    bounds = [net.constant(f"bound{number}", np.array([number])) for number in (0, 2)]
    net.node("Slice", [every, *bounds, bounds[0]], "state")
    graph.initializer.extend(net.constants)
    layer = next(node for node in graph.node if node.name == "tested")
    layer.input.extend(["", "state", "state"] if kind == "LSTM" else ["", "state"])
    nodes = [*net.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    surgery = cut(model)
    assert _sizes(surgery.model) == (left, left, 2 * left)
    operators = {node.op_type for node in surgery.model.graph.node}
    assert ("Expand" in operators) is (start != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_expanded_to_their_own_size_are_left_out(kind: str) -> None:
    """PyTorch writes them so for a batch of fixed size."""
    model = _on_input(kind, (4, 2, 6))
    graph, net = model.graph, Net()
    batch = net.node("Shape", ["input"], "batch", start=1, end=2)
    parts = [net.constant(name, np.array([size])) for name, size in (("layers", 1), ("units", HIDDEN))]
    size = net.node("Concat", [parts[0], batch, parts[1]], "size", axis=0)
    net.node("Expand", [net.constant("zeros", np.zeros((1, 2, HIDDEN), np.float32)), size], "state")
    graph.initializer.extend(net.constants)
    layer = next(node for node in graph.node if node.name == "tested")
    layer.input.extend(["", "state", "state"] if kind == "LSTM" else ["", "state"])
    nodes = [*net.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    surgery = cut(model)
    assert _sizes(surgery.model) == (3, 3, 3)
    assert "Expand" not in {node.op_type for node in surgery.model.graph.node}


def test_states_and_peepholes_are_cut() -> None:
    random = np.random.default_rng(3)
    states = {name: random.standard_normal((1, 1, HIDDEN)).astype(np.float32) for name in ("h", "c")}
    holes = random.standard_normal((1, 3 * HIDDEN)).astype(np.float32)
    model = _hidden("LSTM", **states, holes=holes)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    surgery = compress(model)
    assert surgery.report["verified"]
    assert _sizes(surgery.model) == (3, 3, 3)
    np.testing.assert_array_equal(constant(surgery.model, "h"), states["h"][..., LEFT])
    np.testing.assert_array_equal(constant(surgery.model, "holes"), holes.reshape(3, HIDDEN)[:, LEFT].reshape(1, -1))


def test_of_two_directions_each_keeps_what_one_of_them_needs() -> None:
    """Unit 1 is read by nobody, unit 3 in one direction only."""
    model = _hidden("GRU", directions=2, dead="unread")
    held = next(tensor for tensor in model.graph.initializer if tensor.name == "logits.weight")
    values = onnx.numpy_helper.to_array(held).copy()
    values[:, HIDDEN + 3] = 1
    held.CopyFrom(onnx.numpy_helper.from_array(values, held.name))
    surgery = cut(model)
    assert _sizes(surgery.model) == (4, 4, 8)
    idle = weight(surgery.model, "tested").reshape(2, 3, 4, 6)[0, :, 2]
    np.testing.assert_array_equal(idle, np.zeros_like(idle))


def test_recurrent_layers_behind_each_other() -> None:
    """What the second does not read, the first does not make."""
    net = Net(channels=6, size=4)
    x = net.node("ReduceMean", ["input"], "rows", axes=[3], keepdims=0)
    x = net.node("Transpose", [x], "steps", perm=[2, 0, 1])
    for name, inputs in (("first", 6), ("second", HIDDEN)):
        w, r = _normal(net, 1, 4 * HIDDEN, inputs), _normal(net, 1, 4 * HIDDEN, HIDDEN)
        r[..., DEAD] = 0
        if name == "second":
            w[..., DEAD] = 0
        weights = [net.constant(f"{name}.w", w), net.constant(f"{name}.r", r)]
        net.nodes.append(onnx.helper.make_node("LSTM", [x, *weights], [f"{name}.y"], name=name, hidden_size=HIDDEN))
        x = net.node("Squeeze", [f"{name}.y", net.constant(f"{name}.axis", np.array([1]))], f"{name}.out")
    x = net.node("Transpose", [x], "batch first", perm=[1, 2, 0])
    x = net.node("ReduceMean", [x], "mean", axes=[2], keepdims=0)
    surgery = cut(net.model(net.gemm(x, HIDDEN, 4, "logits")))
    assert weight(surgery.model, "first").shape == (1, 4 * 3, 6)
    assert weight(surgery.model, "second").shape == (1, 4 * HIDDEN, 3)
