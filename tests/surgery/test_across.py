"""Softmax, sums and sorting along an axis; and the operators that channels cannot be followed through."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.surgery import compress, ops
from polar_deploy.surgery.ops.unsupported import REASONS
from tests.surgery.graphs import CLOSED, Array, Net, around, cut, fates, names, outcome, weight

SUM = "kept: its sum runs over all channels"
COMPARES = "kept: it compares all channels"
COUPLED = "kept: it goes together with channels in use, in tested"


@pytest.mark.parametrize(
    ("operator", "extra", "opset", "attributes", "plain", "padded"),
    [
        ("Softmax", (), 13, {"axis": 1}, SUM, SUM),
        ("Softmax", (), 17, {"axis": -3}, SUM, SUM),
        ("Softmax", (), 17, {}, "folded", "kept: the constant 0.125 meets the zero padding"),
        ("Softmax", (), 11, {}, SUM, SUM),
        ("Softmax", (), 11, {"axis": 2}, "folded", "kept: the constant 0.015625 meets the zero padding"),
        ("Softmax", (), 11, {"axis": -1}, "folded", "kept: the constant 0.125 meets the zero padding"),
        ("LogSoftmax", (), 17, {"axis": 2}, "folded", "kept: the constant -2.07944 meets the zero padding"),
        ("LogSoftmax", (), 12, {"axis": 2}, "folded", "kept: the constant -4.15888 meets the zero padding"),
        ("LogSoftmax", (), 17, {"axis": 1}, SUM, SUM),
        ("Hardmax", (), 17, {"axis": 1}, COMPARES, COMPARES),
        ("Hardmax", (), 17, {"axis": 3}, COUPLED, COUPLED),
        ("Hardmax", (), 11, {"axis": 1}, COMPARES, COMPARES),
        ("CumSum", (np.array(2),), 17, {"reverse": 1}, "removed", "removed"),
        ("CumSum", (np.array(-1, np.int32),), 11, {"exclusive": 1}, "removed", "removed"),
        ("CumSum", (np.array(1),), 17, {}, "kept: its sums run over the channels", None),
    ],
)
def test_closed_channels(
    operator: str,
    extra: tuple[Array, ...],
    opset: int,
    attributes: dict[str, Any],
    plain: str,
    padded: str | None,
) -> None:
    """Behind it a convolution without padding, and one with."""
    assert outcome(around(operator, *extra, opset=opset, **attributes)) == plain
    if padded is not None:
        assert outcome(around(operator, *extra, opset=opset, kernel=3, **attributes)) == padded


@pytest.mark.parametrize(
    ("operator", "extra", "attributes", "expected"),
    [
        ("Softmax", (), {"axis": 2}, "removed"),
        ("Softmax", (), {"axis": 1}, SUM),
        ("Hardmax", (), {"axis": 3}, "removed"),
        ("CumSum", (np.array(1),), {}, "kept: its sums run over the channels"),
    ],
)
def test_a_gate_behind(operator: str, extra: tuple[Array, ...], attributes: dict[str, Any], expected: str) -> None:
    net = Net()
    inputs = [net.conv("input", 6, "one"), *(net.constant(f"extra{i}", values) for i, values in enumerate(extra))]
    x = net.gate(net.node(operator, inputs, "tested", **attributes), CLOSED, "gate")
    assert outcome(net.model(net.conv(x, 4, "two"))) == expected


def test_sums_do_not_miss_what_is_zero() -> None:
    """Cumulative sums over the channels, closed before and behind: nobody needs them, and they add nothing."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    x = net.node("CumSum", [x, net.constant("axis", np.array(1))], "tested")
    assert outcome(net.model(net.conv(net.gate(x, CLOSED, "gate2"), 4, "two"))) == "removed"


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [("CumSum", [np.array(1)], {}), ("LpNormalization", [], {"axis": 1})],
)
def test_a_spare_channel_that_stays_is_still_zero(
    operator: str, inputs: list[Array], attributes: dict[str, Any]
) -> None:
    """Groups stay equally wide: the sigmoid of a filter of zeros is no zero, so the gate must stay shut there."""
    net = Net(channels=4)
    x = net.gate(net.node("Sigmoid", [net.conv("input", 6, "one", group=2)], "act"), (0, 1, 4), "gate")
    x = net.node(operator, [x, *(net.constant(f"in{i}", v) for i, v in enumerate(inputs))], "tested", **attributes)
    surgery = cut(net.model(net.conv(net.gate(x, (0, 1, 4), "gate2"), 4, "two")))
    assert weight(surgery.model, "one").shape[0] == 4
    assert "gate" in names(surgery.model)


@pytest.mark.parametrize(("axis", "expected"), [(1, "folded"), (2, SUM), (3, "folded")])
def test_softmax_within_a_channel_shuffle(axis: int, expected: str) -> None:
    """Between two reshapes channels lie on two axes. Over the first, 1 and 4 are all that is summed up: halves."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    x = net.node("Reshape", [x, net.constant("parts", np.array([0, 2, 3, 64]))], "split")
    x = net.node("Softmax", [x], "tested", axis=axis)
    x = net.node("Transpose", [x], "turn", perm=[0, 2, 1, 3])
    x = net.node("Reshape", [x, net.constant("whole", np.array([0, 6, 8, 8]))], "joined")
    net.width[x] = 6
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == expected


@pytest.mark.parametrize("read", ["values", "both"])
@pytest.mark.parametrize(("opset", "attributes"), [(9, {"axis": 3, "k": 4}), (17, {"axis": -1}), (17, {"axis": 2})])
def test_topk_over_space(opset: int, attributes: dict[str, Any], read: str) -> None:
    model = _topk(opset, attributes, read)
    surgery = cut(model)
    assert outcome(model, surgery) == ("removed" if read == "values" else COUPLED.replace("tested", "places"))


def _topk(opset: int, attributes: dict[str, Any], read: str) -> onnx.ModelProto:
    """`read`: the largest numbers alone, or also where they were."""
    net = Net(opset=opset)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    inputs = [x] if "k" in attributes else [x, net.constant("k", np.array([4]))]
    x = net.node("TopK", inputs, "tested", **attributes)
    net.nodes[-1].output.append("places")
    if read == "both":
        x = net.add(x, net.node("Cast", ["places"], "numbers", to=1), "sum")
        net.width[x] = 6
    return net.model(net.conv(x, 4, "two"))


def test_topk_over_the_channels() -> None:
    model = _topk(17, {"axis": 1}, "values")
    next(node for node in model.graph.node if node.name == "two").input[0] = "tested"
    two = next(tensor for tensor in model.graph.initializer if tensor.name == "two.weight")
    two.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(two)[:, :4], "two.weight"))
    surgery = cut(model)
    assert outcome(model, surgery) == "kept: it sorts the channels"
    assert surgery.report["unsupported"] == [{"node": "tested", "operator": "TopK", "reason": "it sorts the channels"}]


def _wall(operator: str) -> onnx.ModelProto:
    """A closed layer before it, another one behind it."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    if operator == "Einsum":
        x = net.node("Einsum", [x, x], "tested", equation="bchw,bdhw->bchw")
        net.width[x] = 6
    else:
        x = net.node("Det", [x], "det")
        x = net.node("Unsqueeze", [x, net.constant("space", np.array([2, 3]))], "tested")
        net.width[x] = 6
    return net.model(net.conv(net.gate(net.conv(x, 5, "two", kernel=1), [2], "gate2"), 4, "three"))


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        ("Einsum", "both of its factors are computed, and their channels are not those of attention heads"),
        ("Det", "it mixes all numbers along an axis"),
    ],
)
def test_walls_say_why(operator: str, reason: str) -> None:
    model = _wall(operator)
    surgery = cut(model)
    assert fates(model, surgery, "one", "two")[1] == f"kept: {reason}"
    assert fates(model, surgery, "two", "three", closed=[2]) == ["open", "open", "removed", "open", "open"]
    assert surgery.report["unsupported"][0]["reason"] == reason


def test_a_loop_is_a_wall() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Neg", ["carried"], ["result"])],
        "body",
        [value("count", 7, []), value("go", 9, []), value("carried", 1, None)],
        [value("on", 9, []), value("result", 1, None)],
    )
    x = net.node(
        "Loop", [net.constant("times", np.array(3)), net.constant("yes", np.array(True)), x], "tested", body=body
    )
    net.width[x] = 6
    surgery = compress(net.model(x))
    assert weight(surgery.model, "one").shape[0] == 6
    assert {entry["reason"] for entry in surgery.report["cuts_not_made"]} == {"its body is not followed"}


@pytest.mark.parametrize("table", ["HANDLERS", "MICROSOFT"])
def test_every_operator_has_one_handler(table: str) -> None:
    """The modules of `ops` are merged into one table: none may overwrite what another one says."""
    modules = [importlib.import_module(f"{ops.__name__}.{info.name}") for info in pkgutil.iter_modules(ops.__path__)]
    counts = Counter(operator for module in modules for operator in getattr(module, table, ()))
    assert len(counts) > 10
    assert {operator for operator, count in counts.items() if count > 1} == set()


def test_walls_are_operators() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    newer = {"CausalConvWithState", "LinearAttention", "TensorScatter"}  # than the oldest onnx that is supported
    assert {operator for operators in REASONS.values() for operator in operators} - known <= newer
