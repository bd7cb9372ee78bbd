"""One call goes to the fixpoint: what holds only after a cut is looked at again."""

from __future__ import annotations

import numpy as np
import onnx

from polar_deploy.surgery import compress
from tests.surgery.graphs import Net, constant, cut, operators, weight


def _finished(model: onnx.ModelProto) -> onnx.ModelProto:
    """The cut model, once it is sure that a second surgery leaves it as it is."""
    smaller = cut(model).model
    again = compress(smaller).model
    assert again.SerializeToString(deterministic=True) == smaller.SerializeToString(deterministic=True)
    return smaller


def test_a_gate_between_a_product_and_its_bias() -> None:
    """Hidden channels hold their bias behind the gate: once it is gone, the next bias takes that up."""
    net = Net(size=6)
    x = net.node("Transpose", [net.conv("input", 8, "one")], "last", perm=[0, 2, 3, 1])
    for name, inputs, outputs, closed in (("first", 8, 6, [1, 4]), ("second", 6, 5, [2])):
        weights = net.random.standard_normal((inputs, outputs)).astype(np.float32)
        gate = np.where(np.isin(np.arange(outputs), closed), 0, 1).astype(np.float32)
        bias = net.random.uniform(0.5, 1, outputs).astype(np.float32)
        x = net.node("MatMul", [x, net.constant(f"{name}.weights", weights)], name)
        x = net.node("Mul", [x, net.constant(f"{name}.gate", gate)], f"{name}.closed")
        x = net.relu(net.node("Add", [x, net.constant(f"{name}.bias", bias)], f"{name}.sum"), f"{name}.act")
    x = net.node("Transpose", [x], "back", perm=[0, 3, 1, 2])
    net.width[x] = 5
    smaller = _finished(net.model(net.conv(x, 4, "two", kernel=1)))
    assert constant(smaller, "first.weights").shape == (8, 4)
    assert constant(smaller, "second.weights").shape == (4, 4)
    assert operators(smaller)["Mul"] == 0


def test_a_computed_gate_that_comes_out_constant() -> None:
    """A mask from a branch that is closed: 1 - 0 everywhere, or less than half, is a gate of its own."""
    net = Net()
    x = net.relu(net.conv("input", 6, "one"), "act")
    side = net.gate(net.conv("input", 6, "side"), range(6), "closed")
    limits = net.constant("limits", np.array([1, -1, 1, 1, -1, 1], np.float32).reshape(6, 1, 1))
    mask = net.node("Less", [side, limits], "mask")
    x = net.node("Where", [mask, x, net.constant("zero", np.zeros((), np.float32))], "choice")
    smaller = _finished(net.model(net.conv(x, 4, "two")))
    assert weight(smaller, "one").shape[0] == weight(smaller, "two").shape[1] == 4
    assert operators(smaller)["Where"] == 0


def test_channels_that_a_shuffle_held_together() -> None:
    """Position by position, channels go along the last axis: where one of those is left, each goes by itself."""
    net = Net(size=4)
    x = net.gate(net.conv("input", 6, "one"), [0, 1, 4, 5], "gate")
    x = net.node("Reshape", [x, net.constant("apart", np.array([0, 3, 2, 4, 4]))], "split")
    x = net.node("Transpose", [x], "shuffled", perm=[0, 2, 1, 3, 4])
    x = net.node("Reshape", [x, net.constant("joined", np.array([0, 6, 4, 4]))], "shuffle")
    net.width[x] = 6
    smaller = _finished(net.model(net.conv(net.gate(x, [0, 4, 5], "last"), 4, "two")))
    assert weight(smaller, "one").shape[0] == weight(smaller, "two").shape[1] == 1
