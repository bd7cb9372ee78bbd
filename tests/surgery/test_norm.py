"""Normalisation: by stored statistics, by each channel's own, by those of a group, or of all channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from polar_deploy.surgery import compress
from tests.surgery.graphs import CLOSED, Array, Net, around, constant, cut, fates, names, operators, outcome, weight

ALL = "kept: its statistics run over all channels"
GROUP = "kept: the statistics of its group run over it"
# ONNX Runtime has had RMSNormalization since 1.23, the last one for Python 3.10.
needs_opset_23 = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 23), reason="this ONNX Runtime ends at opset 22"
)


def _v(*shape: int, seed: int = 0) -> Array:
    """Numbers of which none is zero, and no two are the same."""
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


def _same(*shape: int) -> Array:
    return np.full(shape, 0.75, np.float32)


def _none(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("operator", "opset", "parameters", "attributes", "plain", "padded"),
    [
        (
            "InstanceNormalization",
            17,
            (_v(6), _same(6)),
            {},
            "folded",
            "kept: the constant 0.75 meets the zero padding",
        ),
        ("InstanceNormalization", 22, (_v(6), _none(6)), {}, "removed", "removed"),
        ("InstanceNormalization", 8, (_v(6), _v(6)), {"epsilon": 0.01}, "folded", None),
        ("LayerNormalization", 17, (_v(8, 8), _same(8, 8)), {"axis": 2}, "folded", None),
        ("LayerNormalization", 17, (_v(8), _none(8)), {"axis": -1}, "removed", "removed"),
        ("LayerNormalization", 17, (_v(8),), {}, "removed", "removed"),
        (
            "LayerNormalization",
            17,
            (_v(8), _v(8)),
            {},
            "kept: it goes together with channels in use, in tested",
            None,
        ),
        ("LayerNormalization", 17, (_v(6, 8, 8), _v(6, 8, 8)), {"axis": 1}, ALL, ALL),
        ("LayerNormalization", 17, (_v(6, 8, 8), _v(6, 8, 8)), {"axis": -3}, ALL, ALL),
        ("GroupNormalization", 21, (_v(6), _v(6)), {"num_groups": 6}, "folded", None),
        ("GroupNormalization", 21, (_v(6), _v(6)), {"num_groups": 3}, GROUP, GROUP),
        ("GroupNormalization", 21, (_v(6), _v(6)), {"num_groups": 1}, GROUP, GROUP),
        pytest.param("RMSNormalization", 23, (_v(8, 8),), {"axis": 2}, "removed", "removed", marks=needs_opset_23),
        pytest.param("RMSNormalization", 23, (_v(6, 8, 8),), {"axis": 1}, ALL, ALL, marks=needs_opset_23),
        ("MeanVarianceNormalization", 13, (), {"axes": [0, 1, 2, 3]}, ALL, ALL),
        ("LpNormalization", 17, (), {"axis": 1}, "removed", "removed"),
        ("LpNormalization", 22, (), {"axis": -3, "p": 1}, "removed", "removed"),
        ("LpNormalization", 22, (), {"axis": -1}, "removed", "removed"),
        ("LRN", 17, (), {"size": 3}, "kept: its window runs over neighbouring channels", None),
    ],
)
def test_closed_channels(
    operator: str, opset: int, parameters: tuple[Array, ...], attributes: dict[str, Any], plain: str, padded: str | None
) -> None:
    """Behind it a convolution without padding, and one with."""
    assert outcome(around(operator, *parameters, opset=opset, **attributes)) == plain
    if padded is not None:
        assert outcome(around(operator, *parameters, opset=opset, kernel=3, **attributes)) == padded


@pytest.mark.parametrize(
    ("opset", "kernel", "mean", "offset", "expected"),
    [
        (8, 1, _v(6), _v(6), "folded"),
        (17, 1, _v(6), _v(6), "folded"),
        (
            17,
            3,
            _same(6),
            _none(6),
            f"kept: the constant {-(0.75**2) / np.sqrt(0.75 + 1e-5):.6g} meets the zero padding",
        ),
        (17, 3, _none(6), _none(6), "removed"),
    ],
)
def test_gate_before_batchnorm(opset: int, kernel: int, mean: Array, offset: Array, expected: str) -> None:
    """What is closed before it is `offset - mean * factor` behind it; either way, no gate is left."""
    model = around("BatchNormalization", _same(6), offset, mean, _same(6), opset=opset, kernel=kernel)
    surgery = cut(model)
    assert outcome(model, surgery) == expected
    assert "Mul" not in operators(surgery.model)


def test_gate_behind_batchnorm() -> None:
    net = Net()
    x = net.bn(net.conv("input", 6, "one"), "bn")
    model = net.model(net.conv(net.gate(net.relu(x, "act"), CLOSED, "gate"), 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "removed"
    assert all(weight(surgery.model, "bn", index).shape == (4,) for index in (1, 2, 3, 4))


def test_a_scale_of_zero_is_a_constant_too() -> None:
    """Whatever comes in, the offset comes out."""
    scale = _v(6)
    scale[list(CLOSED)] = 0
    net = Net()
    x = net.conv("input", 6, "one")
    parameters = [net.constant(f"p{i}", values) for i, values in enumerate((scale, _v(6), _v(6), _v(6)))]
    x = net.node("BatchNormalization", [x, *parameters], "tested")
    assert outcome(net.model(net.conv(x, 4, "two", kernel=1))) == "folded"


@pytest.mark.parametrize("operator", ["BatchNormalization", "InstanceNormalization", "GroupNormalization"])
def test_a_channel_that_stays_needs_nothing(operator: str) -> None:
    """A channel behind the norm reaches an output: it keeps its place, the filter before it becomes zero."""
    net = Net(opset=21)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), (2, 3), "gate")
    parameters = [net.constant(f"p{i}", _v(6, seed=i)) for i in range(4 if operator[0] == "B" else 2)]
    x = net.node(operator, [x, *parameters], "tested", **({"num_groups": 3} if operator[0] == "G" else {}))
    model = net.model(x)
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == 6
    assert not weight(surgery.model, "one")[[2, 3]].any()
    assert "Mul" not in operators(surgery.model)


@pytest.mark.parametrize(
    ("axes", "attributes"),
    [([0, 2, 3, 1], {"axis": -1}), ([0, 2, 3, 1], {"axis": 3}), ([0, 2, 1, 3], {"axis": 2})],
)
def test_layer_norm_over_channels_that_lie_behind(axes: list[int], attributes: dict[str, Any]) -> None:
    """Channels last, or in the middle: the shut gate behind it folds into its scale and offset."""
    at = axes.index(1)
    shape = [6] if at == 3 else [6, 8]
    net = Net()
    x = net.node("Transpose", [net.relu(net.conv("input", 6, "one"), "act")], "turn", perm=axes)
    x = net.node(
        "LayerNormalization", [x, net.constant("s", _v(*shape)), net.constant("b", _v(*shape))], "ln", **attributes
    )
    factor = np.ones([6] + [1] * (3 - at), np.float32)
    factor[list(CLOSED)] = 0
    x = net.node("Mul", [x, net.constant("factor", factor)], "gate")
    x = net.node("Transpose", [x], "back", perm=np.argsort(axes).tolist())
    model = net.model(net.conv(x, 4, "two"))
    surgery = cut(model)
    assert outcome(model, surgery) == "kept: its statistics run over all channels"
    assert "gate" not in names(surgery.model)
    assert not weight(surgery.model, "two")[:, list(CLOSED)].any()
    assert not weight(surgery.model, "ln")[list(CLOSED)].any()


def test_factors_fold_into_the_layer_norm_before_them() -> None:
    net = Net()
    x = net.node("Transpose", [net.conv("input", 6, "one")], "turn", perm=[0, 2, 3, 1])
    x = net.node("LayerNormalization", [x, net.constant("s", _v(6)), net.constant("b", _v(6, seed=1))], "ln")
    factors = _v(6, seed=2)
    x = net.node("Relu", [net.node("Mul", [x, net.constant("factors", factors)], "scale")], "act")
    surgery = cut(net.model(net.node("Transpose", [x], "back", perm=[0, 3, 1, 2])))
    assert "scale" not in names(surgery.model)
    np.testing.assert_allclose(constant(surgery.model, "s"), _v(6) * factors, rtol=1e-6)
    np.testing.assert_allclose(constant(surgery.model, "b"), _v(6, seed=1) * factors, rtol=1e-6)


@pytest.mark.parametrize(
    ("closed", "offset", "kernel", "groups", "expected"),
    [
        ((2, 3), _v(6), 1, 2, {2: "folded", 3: "folded"}),
        ((2, 3), _none(6), 3, 2, {2: "removed", 3: "removed"}),
        ((2, 3), _same(6), 3, 3, dict.fromkeys((2, 3), "kept: the constant 0.75 meets the zero padding")),
        ((0, 1, 4), _none(6), 3, 2, {0: GROUP, 1: GROUP, 4: GROUP}),
        ((0, 1, 4, 5), _none(6), 3, 1, {0: "removed", 1: "removed", 4: "removed", 5: "removed"}),
    ],
)
def test_whole_groups_go(
    closed: tuple[int, ...], offset: Array, kernel: int, groups: int, expected: dict[int, str]
) -> None:
    """`fates` calls channels that went "kept" where others keep a filter of zeros: widths tell those apart."""
    net = Net(opset=21)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), closed, "gate")
    x = net.node("GroupNormalization", [x, net.constant("s", _v(6)), net.constant("b", offset)], "tested", num_groups=3)
    model = net.model(net.conv(x, 4, "two", kernel=kernel))
    surgery = cut(model)
    assert {i: fate for i, fate in enumerate(fates(model, surgery, closed=closed)) if i in closed} == expected
    node = next(node for node in surgery.model.graph.node if node.name == "tested")
    assert {a.name: a.i for a in node.attribute}["num_groups"] == groups
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "tested").shape[0] == 2 * groups


@pytest.mark.parametrize(("closed", "width"), [((2, 3), 4), ((1, 4), 6)])
def test_a_gate_behind_group_norm(closed: tuple[int, ...], width: int) -> None:
    """What nobody needs goes in whole groups; of others, nothing but the scale and the offset is cleared."""
    net = Net(opset=21)
    x = net.relu(net.conv("input", 6, "one"), "act")
    x = net.node("GroupNormalization", [x, net.constant("s", _v(6)), net.constant("b", _v(6))], "tested", num_groups=3)
    model = net.model(net.conv(net.gate(x, closed, "gate"), 4, "two"))
    surgery = cut(model)
    assert weight(surgery.model, "one").shape[0] == weight(surgery.model, "tested").shape[0] == width
    assert "Mul" not in operators(surgery.model)
    assert np.count_nonzero(weight(surgery.model, "tested")) == 4


def test_a_group_of_which_one_channel_is_read_elsewhere() -> None:
    """Nobody needs channel 3, but its group stays for channel 2."""
    net = Net(opset=21)
    x = net.relu(net.conv("input", 6, "one"), "act")
    y = net.node("GroupNormalization", [x, net.constant("s", _v(6)), net.constant("b", _v(6))], "tested", num_groups=3)
    y = net.conv(net.gate(y, (2, 3), "gate"), 4, "two")
    model = net.model(y, net.conv(net.gate(x, [3], "gate2"), 4, "three"))
    surgery = cut(model)
    fate = fates(model, surgery, "one", "three", closed=[3])
    assert fate[3] == "kept: it goes together with channels in use, in one"
    assert weight(surgery.model, "tested").shape[0] == 6


def test_a_cleared_channel_is_zero() -> None:
    """Groups of the convolution stay equally wide: cleared by the norm, what stays adds nothing. No gate is left."""
    net = Net(channels=4, opset=13)
    x = net.relu(net.bn(net.conv("input", 6, "one", group=2), "bn"), "act")
    x = net.gate(x, (0, 1, 4), "gate")
    x = net.node("ReduceSum", [x, net.constant("axes", np.array([1]))], "sum")
    net.width[x] = 1
    surgery = cut(net.model(net.conv(x, 4, "two")))
    assert weight(surgery.model, "one").shape[0] == 4
    assert "Mul" not in operators(surgery.model)


@needs_opset_23
def test_zero_stays_zero_in_rms_normalisation() -> None:
    """Over the channels too: the channel has to be there, but nobody reads it behind."""
    smaller = cut(around("RMSNormalization", _v(6, 8, 8), opset=23, kernel=3, axis=1)).model
    columns = np.flatnonzero(weight(smaller, "two").any(axis=(0, 2, 3)))
    assert columns.tolist() == [0, 2, 3, 5]


@needs_opset_23
def test_what_is_not_zero_stays_so_in_rms_normalisation() -> None:
    """Closed channels are 0.5 behind the Sigmoid, and no mean is taken off: they do not vanish as in LayerNorm."""
    net = Net(opset=23)
    x = net.node("Sigmoid", [net.gate(net.conv("input", 6, "one"), CLOSED, "gate")], "half")
    x = net.node("RMSNormalization", [x, net.constant("scale", _v(8))], "norm", axis=-1)
    model = net.model(net.conv(x, 4, "two", kernel=1))
    assert np.array_equal(weight(cut(model).model, "two"), weight(model, "two"))


@pytest.mark.parametrize(
    ("closed", "expected"),
    [((2, 3), "folded"), ((1, 4), "kept: it goes together with channels in use, in one")],
)
def test_group_norm_as_exporters_write_it(closed: tuple[int, ...], expected: str) -> None:
    """Reshape to groups, InstanceNormalization, Reshape back, and a scale and an offset a channel."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), closed, "gate")
    shape = net.node("Shape", [x], "shape")
    x = net.node("Reshape", [x, net.constant("groups", np.array([0, 3, -1]))], "grouped")
    x = net.node("InstanceNormalization", [x, net.constant("s", _same(3)), net.constant("b", _none(3))], "tested")
    x = net.node("Reshape", [x, shape], "back")
    x = net.node("Mul", [x, net.constant("scale", _v(6, 1, 1))], "scaled")
    x = net.node("Add", [x, net.constant("offset", _v(6, 1, 1))], "shifted")
    net.width[x] = 6
    model = net.model(net.conv(x, 4, "two", kernel=1))
    found = fates(model, cut(model), closed=closed)
    assert {found[i] for i in closed} == {expected}


def test_instance_norm_over_channels_that_lie_behind() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
    x = net.node("Transpose", [x], "turn", perm=[0, 2, 3, 1])
    x = net.node("InstanceNormalization", [x, net.constant("s", _v(8)), net.constant("b", _v(8))], "tested")
    x = net.node("Transpose", [x], "back", perm=[0, 3, 1, 2])
    assert outcome(net.model(net.conv(x, 4, "two"))) == "kept: its statistics run over several channels"


@pytest.mark.parametrize(
    ("operator", "opset", "parameters", "attributes", "expected"),
    [
        ("InstanceNormalization", 17, (_v(6), _v(6)), {}, "removed"),
        ("InstanceNormalization", 17, (_v(6), _v(6)), {"epsilon": 0.0}, "kept: its epsilon is zero"),
        ("GroupNormalization", 21, (_v(6), _v(6)), {"num_groups": 2}, GROUP),
        ("LayerNormalization", 17, (_v(8), _v(8)), {"axis": -1}, "removed"),
        ("MeanVarianceNormalization", 13, (), {"axes": [0, 2, 3]}, "removed"),
        ("MeanVarianceNormalization", 9, (), {}, "removed"),
        ("LRN", 17, (), {"size": 3}, "kept: its window runs over neighbouring channels"),
        ("LRN", 17, (), {"size": 3, "bias": 0.0}, "kept: it divides by what may be zero"),
    ],
)
def test_a_gate_behind(
    operator: str, opset: int, parameters: tuple[Array, ...], attributes: dict[str, Any], expected: str
) -> None:
    net = Net(opset=opset)
    inputs = [net.conv("input", 6, "one"), *(net.constant(f"p{i}", values) for i, values in enumerate(parameters))]
    x = net.gate(net.node(operator, inputs, "tested", **attributes), CLOSED, "gate")
    assert outcome(net.model(net.conv(x, 4, "two"))) == expected


def test_what_some_runtimes_divide_by_zero_keeps_its_input() -> None:
    """The filter of a channel that stays and that nobody needs is not cleared: zero has no variance."""
    net = Net(channels=4, opset=13)
    x = net.node("MeanVarianceNormalization", [net.conv("input", 6, "one", group=2)], "tested", axes=[0, 2, 3])
    surgery = cut(net.model(net.conv(net.gate(x, (0, 1, 4), "gate"), 4, "two")))
    assert weight(surgery.model, "one").reshape(4, -1).any(axis=1).all(), "two groups of two"


def test_batchnorm_over_another_axis_than_the_channels() -> None:
    """Tokens: [batch, positions, channels], a parameter a position. Zero is the same nowhere, but for equal ones."""
    for shift, expected in ((_none(64), "removed"), (_v(64), "kept: it goes together with channels in use, in tested")):
        net = Net()
        x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), CLOSED, "gate")
        x = net.node("Reshape", [x, net.constant("flat", np.array([0, 6, 64]))], "flat_")
        x = net.node("Transpose", [x], "tokens", perm=[0, 2, 1])
        parameters = [net.constant(f"p{i}", p) for i, p in enumerate((_v(64), shift, _none(64), _v(64)))]
        x = net.node("BatchNormalization", [x, *parameters], "tested")
        x = net.node("Transpose", [x], "turn", perm=[0, 2, 1])
        x = net.node("Reshape", [x, net.constant("image", np.array([0, 6, 8, 8]))], "image_")
        net.width[x] = 6
        assert outcome(net.model(net.conv(x, 4, "two"))) == expected


@pytest.mark.parametrize(
    ("operator", "attributes", "outputs", "reason"),
    [
        ("BatchNormalization", {"training_mode": 1}, 3, "it is in training mode"),
        ("LayerNormalization", {"axis": 2}, 2, "its statistics are used"),
    ],
)
def test_walls(operator: str, attributes: dict[str, Any], outputs: int, reason: str) -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    shapes = [[6]] * 4 if operator[0] == "B" else [[8, 8]] * 2
    x = net.node(operator, [x, *(net.constant(f"p{i}", _v(*s)) for i, s in enumerate(shapes))], "tested", **attributes)
    net.nodes[-1].output.extend(f"more{i}" for i in range(outputs - 1))
    if operator[0] == "L":
        y = net.node("Identity", ["more0"], "statistics")
        net.width[y] = 6
    model = net.model(net.conv(x, 4, "two"), *(["statistics"] if operator[0] == "L" else []))
    surgery = compress(model, verify=operator[0] == "L")  # ONNX Runtime does not train on its own
    assert outcome(model, surgery) == f"kept: {reason}"
    assert {"node": "tested", "operator": operator, "reason": reason} in surgery.report["unsupported"]


def test_a_parameter_that_is_computed_is_a_wall() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    s = net.node("ReduceMean", [net.conv("input", 6, "style")], "mean", axes=[0, 2, 3], keepdims=0)
    x = net.node("InstanceNormalization", [x, s, net.constant("b", _v(6))], "tested")
    assert outcome(net.model(net.conv(x, 4, "two"))) == "kept: its scale is computed"


def test_half_precision() -> None:
    """Parameters stay in their type."""
    net = Net(opset=21)
    x = net.gate(net.relu(net.conv("input", 6, "one"), "act"), (2, 3), "gate")
    x = net.node("GroupNormalization", [x, net.constant("s", _v(6)), net.constant("b", _v(6))], "tested", num_groups=3)
    model = net.model(net.conv(x, 4, "two"))
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    smaller = compress(model).model
    onnx.checker.check_model(smaller, full_check=True)
    assert weight(smaller, "tested").dtype == np.float16
