"""The proof of a typed graph: what counts as off, what is found by bisection, and that it is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.errors import ContentError
from polar_deploy.precision import int8, proof
from polar_deploy.precision.rounding import computed_wide
from tests.precision.kinds import Net, stem
from tests.precision.test_kinds import errors, outputs
from tests.precision.test_kinds import images as larger
from tests.support.residual import behind, images, residual, run, written


@pytest.mark.parametrize("seed", range(5))
def test_bisection_finds_what_has_to_be_left_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"node{index}" for index in range(int(rng.integers(1, 300)))]
    wanted = {names[index] for index in rng.integers(0, len(names), int(rng.integers(0, 4)))}
    calls = []

    def holds(left_out: Sequence[str]) -> bool:
        calls.append(len(left_out))
        return wanted <= {*left_out}

    assert sorted(proof.culprits(names, holds)) == sorted(wanted)
    assert len(calls) <= (len(wanted) + 1) * (3 + math.log2(len(names)))


def test_bisection_says_that_nothing_helps() -> None:
    with pytest.raises(LookupError):
        proof.culprits(["a", "b", "c"], lambda _: False)


@pytest.mark.parametrize(
    ("found", "exact", "error"),
    [
        ([[1.0, np.inf]], [[1.0, 2.0]], np.inf),
        ([[1.0, np.nan]], [[1.0, 2.0]], np.inf),
        ([[[1.0, 7.0]]], [[[1.0, np.nan]]], 0),  # what FP32 does not know proves nothing
        ([[[2.0, 2.0]]], [[[1.0, 1.0]]], 1),  # no logits: a mean that is off is off
    ],
)
def test_outputs_that_are_no_numbers_and_outputs_that_are_no_logits(
    found: list[object], exact: list[object], error: float
) -> None:
    assert proof.relative_error(np.array(found), np.array(exact)) == pytest.approx(error)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (TensorProto.FLOAT16, 1 + 2**-12, 1.0),
        (TensorProto.FLOAT16, 1 + 2**-10, 1 + 2**-10),
        (TensorProto.FLOAT16, 7e4, np.inf),
        (TensorProto.BFLOAT16, 1 + 2**-9, 1.0),
        (TensorProto.BFLOAT16, 7e4, 70144.0),
    ],
)
def test_narrow_graphs_are_rounded_after_each_node(kind: int, value: float, expected: float) -> None:
    """x + 0 in FP16 or BF16, between two casts: ONNX Runtime alone would drop the casts."""
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=kind),
        helper.make_node("Add", ["narrow", "zero"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    zero = helper.make_tensor("zero", kind, [1], [0.0])
    graph = helper.make_graph(nodes, "g", edges[:1], edges[1:], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    wide = computed_wide(onnx.shape_inference.infer_shapes(model))
    assert outputs_of(wide, np.float32([value])) == expected


def outputs_of(model: onnx.ModelProto, value: np.ndarray) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": value})[0][0])


def overflowing() -> onnx.ModelProto:
    """Two tensors hold numbers beyond 65504, where FP16 ends, and are divided again: FP32 and BF16 do not mind."""
    net = stem()
    net.node("Mul", ["r", net.constant("large", value=np.float32(3e4))], "grown")
    net.node("Conv", ["grown", net.constant("g.w", 8, 8, 3, 3)], "g", pads=[1] * 4)
    net.node("Mul", ["g", net.constant("small", value=np.float32(1 / 3e4))], "shrunk")
    return net.classifier(net.conv("shrunk", "c", 8, 8), 8)


def test_what_fp16_cannot_hold_stays_fp32_and_is_named(tmp_path: Path) -> None:
    network, batch = overflowing(), larger(8, 3)
    typed, said = written(network, "rtx-fp16", tmp_path)
    layers = {each["layer"]: each for each in said["high_precision_layers"]}
    assert layers.keys() == {"grown/Mul", "g/Conv", "shrunk/Mul"}
    assert {(each["type"], each["why"]) for each in layers.values()} == {("fp32", "it overflows")}
    assert said["types"] == {"fp16": 3, "fp32": 1}
    found = outputs(computed_wide(typed), fused=False, batch=batch)
    assert errors(found, outputs(network, fused=False, batch=batch))["logits"] < 0.005
    assert written(network, "trt-bf16", tmp_path)[1]["high_precision_layers"] == []


def test_bf16_that_loses_too_much_stays_fp32(tmp_path: Path) -> None:
    """The difference of two numbers that are equal in BF16's 8 bits: the subtraction and what makes its inputs stay."""
    net = stem()
    net.node("Add", ["r", net.constant("offset", value=np.float32(1000))], "up")
    net.node("Sub", ["up", "offset"], "down")
    network, batch = net.classifier(net.conv("down", "c", 8, 8), 8), larger(8, 3)
    typed, said = written(network, "trt-bf16", tmp_path)
    assert {"up/Add"} <= {each["layer"] for each in said["high_precision_layers"]} <= {"up/Add", "down/Sub", "r/Relu"}
    found = outputs(computed_wide(typed), fused=False, batch=batch)
    assert errors(found, outputs(network, fused=False, batch=batch))["logits"] < 0.05


def test_a_layer_that_the_runtime_computes_otherwise_stays_wide_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime whose integer kernel of one layer is wrong: as ONNX Runtime's Gemm was with beta."""
    honest = int8._Writer._disagreement

    def disagreement(self: int8._Writer, typed: onnx.ModelProto, kernels: proof.Kernels) -> float:
        return 1.0 if behind(typed, "conv3")[0] == "DequantizeLinear" else honest(self, typed, kernels)

    monkeypatch.setattr(int8._Writer, "_disagreement", disagreement)
    typed, said = written(residual(), "ort-int8", tmp_path, images(16))
    assert [(each["layer"], each["error"]) for each in said["high_precision_layers"]] == [("conv3", None)]
    assert "integer kernel" in said["high_precision_layers"][0]["why"]
    assert said["types"] == {"int8": 6, "fp32": 1}
    batch = images(8, seed=2)
    assert np.linalg.norm(run(typed, batch) - run(residual(), batch)) < 0.05 * np.linalg.norm(run(residual(), batch))


def test_no_float_precision_that_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof.Reference, "error", lambda *_, **__: 0.5)
    with pytest.raises(ContentError, match=r"typed\.onnx|source\.onnx: the typed graph is off by 0\.5 of its outputs"):
        written(residual(), "rtx-fp16", tmp_path)
    assert not (tmp_path / "typed.onnx").exists()


def test_an_output_beside_the_logits_counts(tmp_path: Path) -> None:
    """INT8 does nothing to the logits, and ruins the second output: its convolution reads very unequal channels."""
    net = Net()
    net.node("Relu", [net.conv("input", "a", 3, 8)], "r")
    scale = np.ones((1, 8, 1, 1), np.float32)
    scale[0, 0] = 1000
    net.node("Mul", ["r", net.constant("uneven", value=scale)], "grown")
    net.constant("second.w", 8, 8, 3, 3)
    net.constants["second.w"][:, 0] = 0
    net.node("Conv", ["grown", "second.w"], "second", pads=[1] * 4)
    network = net.classifier(net.conv("r", "c", 8, 8), 8, outputs={"second": 8})
    typed, said = written(network, "ort-int8", tmp_path, larger(32, 2), calibration={"method": "minmax"})
    assert [each["layer"] for each in said["high_precision_layers"]] == ["second/Conv"]
    batch = larger(8, 3)
    found, expected = (outputs(each, fused=True, batch=batch) for each in (typed, network))
    assert max(errors(found, expected).values()) < 0.03


def test_numpy_helper_reads_bf16() -> None:
    """What the rounding of constants relies on, in every version of onnx."""
    tensor = helper.make_tensor("t", TensorProto.BFLOAT16, [2], [1.5, -2.0])
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.float32), [1.5, -2.0])
