"""Operators of com.microsoft are cut like the standard ones that they were made of; behind others, the cut goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from polar_deploy.surgery import Surgery, compress
from tests.surgery.graphs import Array, Net, names, run, weight
from tests.surgery.test_strangers import images
from tests.surgery.test_strangers import run as run_on

MS = "com.microsoft"


def same(model: onnx.ModelProto, surgery: Surgery, tolerance: float = 1e-5) -> None:
    for batch in (2, 5):
        for one, other in zip(run(model, batch), run(surgery.model, batch), strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance * float(np.abs(one).max()))


def _fused(activation: str, *, added: bool = False, **attributes: Any) -> onnx.ModelProto:
    """A FusedConv whose second half is closed behind its activation, between two plain layers."""
    net = Net()
    x = net.conv("input", 6, "one")
    extra = [net.constant(f"fused.{i}", values.astype(np.float32)) for i, values in enumerate(_numbers(net))]
    inputs = [x, *extra, *([net.conv("input", 8, "other")] if added else [])]
    y = net.node("FusedConv", inputs, "fused", MS, activation=activation, pads=[1] * 4, **attributes)
    net.width[y] = 8
    return net.model(net.conv(net.gate(y, range(4), "gate"), 4, "two"))


def _numbers(net: Net) -> tuple[Array, Array]:
    return net.random.standard_normal((8, 6, 3, 3)) / 8, net.random.standard_normal(8)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "with a sum"])
@pytest.mark.parametrize(
    ("activation", "numbers"),
    [
        ("Relu", []),
        ("Tanh", []),
        ("Sigmoid", []),
        ("LeakyRelu", [0.2]),
        ("Clip", [0.0, 6.0]),
        ("HardSigmoid", [0.2, 0.5]),
    ],
)
def test_fused_convolutions(activation: str, numbers: list[float], added: bool) -> None:
    model = _fused(activation, added=added, **({"activation_params": numbers} if numbers else {}))
    surgery = compress(model)
    same(model, surgery)
    assert weight(surgery.model, "fused").shape == (4, 6, 3, 3)
    assert weight(surgery.model, "two").shape[1] == 4
    if added:
        assert weight(surgery.model, "other").shape[0] == 4
    assert "gate" not in names(surgery.model)


def test_what_a_fused_convolution_adds_stays_where_it_is_used() -> None:
    """Channels that a layer behind reads keep their addends, and the constant of a closed one moves on."""
    net = Net()
    first = net.gate(net.conv("input", 8, "one"), range(4), "gate")
    extra = [net.constant(f"fused.{i}", values.astype(np.float32)) for i, values in enumerate(_numbers(net))]
    extra[0] = net.constant("wide", (net.random.standard_normal((8, 8, 1, 1)) / 3).astype(np.float32))
    y = net.node("FusedConv", [first, *extra, first], "fused", MS, activation="Relu")
    net.width[y] = 8
    model = net.model(net.conv(y, 4, "two"))
    surgery = compress(model)
    same(model, surgery)
    assert weight(surgery.model, "two").shape[1] == 8, "what the layer itself makes is in use"


def test_a_factor_moves_into_a_fused_convolution_only_where_the_activation_lets_it() -> None:
    for activation, folded in (("Relu", True), ("Sigmoid", False)):
        net = Net()
        extra = [net.constant(f"fused.{i}", values.astype(np.float32)) for i, values in enumerate(_numbers(net))]
        y = net.node(
            "FusedConv", [net.conv("input", 6, "one"), *extra], "fused", MS, activation=activation, pads=[1] * 4
        )
        net.width[y] = 8
        x = net.scale(y, net.random.uniform(0.5, 2, 8), "scale")
        model = net.model(net.node("Softmax", [x], "out", axis=1))  # no weights behind it
        surgery = compress(model)
        same(model, surgery)
        assert ("scale" not in names(surgery.model)) is folded


def _tokens(operator: str, *extra: Array, width: int = 32, **attributes: Any) -> onnx.ModelProto:
    """[batch, 8 × 8 positions, channels]: a matrix product, the operator, a gate on half of it, another product."""
    net = Net(channels=16)
    x = net.node("Reshape", ["input", net.constant("shape", np.array([0, 16, 64]))], "flat")
    x = net.node("Transpose", [x], "tokens", perm=[0, 2, 1])
    x = net.node("MatMul", [x, net.constant("one.w", _matrix(net, 16, width))], "one")
    held = [net.constant(f"held{i}", values.astype(np.float32)) for i, values in enumerate(extra)]
    x = net.node(operator, [x, *held], "tested", MS, **attributes)
    mask = np.ones(width, np.float32)
    mask[: width // 2] = 0
    x = net.node("Mul", [x, net.constant("mask", mask)], "gate")
    x = net.node("MatMul", [x, net.constant("two.w", _matrix(net, width, 8))], "two")
    net.width["two"] = 0
    return net.model("two", ranks=[3])


def _matrix(net: Net, inputs: int, outputs: int) -> Array:
    return np.asarray(net.random.standard_normal((inputs, outputs)) / np.sqrt(inputs), np.float32)


BIAS = np.random.default_rng(5).standard_normal(32)


@pytest.mark.parametrize(
    ("operator", "extra"),
    [("Gelu", ()), ("BiasGelu", (BIAS,)), ("FastGelu", ()), ("FastGelu", (BIAS,)), ("QuickGelu", ())],
)
def test_activations(operator: str, extra: tuple[Array, ...]) -> None:
    model = _tokens(operator, *extra)
    surgery = compress(model)
    same(model, surgery)
    assert weight(surgery.model, "one").shape == (16, 16)
    assert weight(surgery.model, "two").shape == (16, 8)


@pytest.mark.parametrize("operator", ["Gelu", "FastGelu", "QuickGelu", "BiasGelu"])
def test_constants_go_through_activations_with_the_right_value(operator: str) -> None:
    """A unit without weights is a constant, which a Gemm behind takes up: computed here by ONNX Runtime alone."""
    net = Net(channels=6, size=1)
    x = net.node("Flatten", ["input"], "flat")
    one = net.gemm(x, 6, 8, "one")
    held = next(tensor for tensor in net.constants if tensor.name == "one.weight")
    values = onnx.numpy_helper.to_array(held).copy()
    values[:3] = 0
    held.CopyFrom(onnx.numpy_helper.from_array(values, held.name))
    bias = [net.constant("added", net.random.standard_normal(8).astype(np.float32))] if operator == "BiasGelu" else []
    y = net.node(operator, [one, *bias], "tested", MS)
    model = net.model(net.gemm(y, 8, 5, "logits"))
    surgery = compress(model)
    same(model, surgery)
    assert weight(surgery.model, "logits").shape[1] == 5


@pytest.mark.parametrize("turned", [0, 1])
def test_fused_matrix_products(turned: int) -> None:
    net = Net(channels=6, size=1)
    x = net.gate(net.gemm(net.node("Flatten", ["input"], "flat"), 6, 8, "one"), range(4), "gate", shape="1c")
    matrix = _matrix(net, 8, 5)
    held = net.constant("two.w", matrix.T.copy() if turned else matrix)
    x = net.node("FusedMatMul", [x, held], "two", MS, alpha=0.5, transB=turned)
    net.width["two"] = 5
    model = net.model("two", ranks=[2])
    surgery = compress(model)
    same(model, surgery)
    kept = matrix[4:]
    np.testing.assert_array_equal(weight(surgery.model, "two"), kept.T if turned else kept)


@pytest.mark.parametrize(("operator", "parameters"), [("LayerNormalization", 2), ("SimplifiedLayerNormalization", 1)])
@pytest.mark.parametrize("opset", [11, 14, 21])
def test_normalisations_that_the_optimiser_writes_in_the_standard_domain(
    operator: str, parameters: int, opset: int
) -> None:
    """ONNX has the first one since opset 17, the second one never; what lies behind them is followed all the same."""
    net = Net(opset=opset)
    net.inputs = [onnx.helper.make_tensor_value_info("input", 1, ["batch", 5, 6])]
    x = net.linear("input", 6, 6, "stem")
    vectors = [net.constant(f"p{i}", np.linspace(0.5, 1, 6).astype(np.float32)) for i in range(parameters)]
    y = net.node(operator, [x, *vectors], "norm", axis=-1, epsilon=1e-5)
    factor = net.constant("factor", np.repeat(np.float32([0, 1]), 4))
    y = net.node("Mul", [net.relu(net.linear(y, 6, 8, "wide"), "act"), factor], "gate")
    net.width["sum"] = 6
    model = net.model(net.node("Add", [net.linear(y, 8, 6, "narrow"), x], "sum"), ranks=[3])
    surgery = compress(model)
    feeds = {"input": images(2, 5, 6)}
    np.testing.assert_allclose(run_on(model, feeds)[0], run_on(surgery.model, feeds)[0], atol=1e-5)
    np.testing.assert_array_equal(weight(surgery.model, "wide"), weight(model, "wide")[:, 4:])
    np.testing.assert_array_equal(weight(surgery.model, "narrow"), weight(model, "narrow")[4:])


@pytest.mark.parametrize("free", [False, True], ids=["fixed size", "free size"])
def test_shapes_behind_an_operator_that_nobody_knows_are_seen_by_running_it(free: bool) -> None:
    net = Net(channels=6)
    if free:
        net.inputs[0] = onnx.helper.make_tensor_value_info("input", 1, ["batch", 6, "height", "width"])
    x = net.node("Trilu", ["input"], "unknown", MS)
    net.width[x] = 6
    y = net.gate(net.conv(net.node("BatchNormalization", [x, *_norm(net)], "norm"), 8, "one"), range(4), "gate")
    model = net.model(net.conv(y, 4, "two"))
    surgery = compress(model)
    for size in (8, 11) if free else (8,):
        feeds = {"input": images(2, 6, size, size)}
        expected, found = run_on(model, feeds)[0], run_on(surgery.model, feeds)[0]
        np.testing.assert_allclose(expected, found, atol=1e-5 * float(np.abs(expected).max()))
    assert weight(surgery.model, "one").shape[0] == 4
    seen = next(value.type.tensor_type for value in surgery.model.graph.value_info if value.name == "unknown")
    sizes = [dim.dim_param or dim.dim_value for dim in seen.shape.dim]
    assert sizes == ["batch", 6, *(["height", "width"] if free else [8, 8])]


def _norm(net: Net) -> list[str]:
    return [net.constant(f"norm{i}", np.linspace(0.5, 1.5, 6).astype(np.float32)) for i in range(4)]


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_a_network_that_onnx_runtime_optimised_loses_the_same(level: str, tmp_path: Path) -> None:
    net = Net()
    x = net.gate(net.relu(net.bn(net.conv("input", 8, "stem"), "norm"), "act"), [0, 1], "gate0")
    y = net.gate(net.relu(net.conv(x, 8, "a"), "act.a"), range(4), "gate1")
    y = net.gate(net.conv(y, 8, "b"), [0, 1], "gate2")
    x = net.relu(net.add(y, x, "add"), "out")
    model = net.model(net.head(net.gate(x, [5], "gate3")))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    plain, surgery = compress(model), compress(optimised)
    same(optimised, surgery)
    feeds = {"input": images(3, 3, 8, 8)}
    expected, found = run_on(model, feeds)[0], run_on(surgery.model, feeds)[0]
    np.testing.assert_allclose(expected, found, atol=1e-5 * float(np.abs(expected).max()))
    assert surgery.report["macs"][1] == plain.report["macs"][1]
