"""LSTM, GRU and RNN lose the columns of closed input channels; what these hold, if not zero, goes into the bias."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.surgery.graphs import CLOSED, Array, Net, cut, weight

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
    net.nodes.append(onnx.helper.make_node("RNN", inputs, ["y", "last"], name="tested", hidden_size=HIDDEN))
    x = net.node("Transpose", ["last"], "turn", perm=[1, 0, 2])
    net.width["flat"] = HIDDEN
    x = net.node("Flatten", [x], "flat")
    surgery = cut(net.model(net.gemm(x, HIDDEN, 4, "logits")))
    assert weight(surgery.model, "tested").shape == (1, HIDDEN, 1)
