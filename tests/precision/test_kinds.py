"""Every kind of network that a quantizer or a converter is known to get wrong, in each precision, as it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.conftest import OLD_RUNTIME
from tests.precision.kinds import KINDS, images
from tests.support.residual import written

# Layers that have no integer kernel, or no constants of their own; norms that need FP32 inside.
WIDE = {
    ("transposed", "ort-int8"): ["t/ConvTranspose"],
    ("transposed_in_groups", "ort-int8"): ["t/ConvTranspose"],
    ("convolution_with_a_computed_bias", "ort-int8"): ["c/Conv"],
    ("convolution_with_a_computed_bias", "rtx-int8"): ["c/Conv"],
    **{("squares_beyond_fp16", target): ["n/MeanVarianceNormalization"] for target in ("rtx-int8", "rtx-fp16")},
}
LEVELS = onnxruntime.GraphOptimizationLevel


def outputs(network: onnx.ModelProto, *, fused: bool, batch: np.ndarray) -> dict[str, np.ndarray]:
    """What ONNX Runtime gives, with its fusions or node by node."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = LEVELS.ORT_ENABLE_ALL if fused else LEVELS.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in network.graph.output]
    return dict(zip(names, session.run(names, {"input": batch}), strict=True))


def errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(found[name] - exact) / np.linalg.norm(exact)) for name, exact in expected.items()
    }


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("target", "bound"), [("ort-int8", 0.03), ("rtx-int8", 0.03), ("rtx-fp16", 0.004)])
def test_every_output_is_that_of_fp32(target: str, bound: float, name: str, tmp_path: Path) -> None:
    if OLD_RUNTIME and target == "rtx-int8":
        pytest.skip("this ONNX Runtime computes FP16 with Q/DQ less exactly")
    network, batch = KINDS[name](), images(8, 1)
    calibration = images(32, 2) if target.endswith("int8") else None
    typed, said = written(network, target, tmp_path, calibration)
    expected = outputs(network, fused=False, batch=batch)
    found = outputs(typed, fused=target == "ort-int8", batch=batch)
    reduced = target == "ort-int8" and said["calibration"]["reduce_range"]  # steps of weights are twice as large then
    assert max(errors(found, expected).values()) < bound * (1 + reduced)
    assert [each["layer"] for each in said["high_precision_layers"]] == WIDE.get((name, target), [])
    if target == "ort-int8":  # integer kernels and the graph as it is written differ by single steps of a rounding
        assert max(errors(found, outputs(typed, fused=False, batch=batch)).values()) < 3e-3


IN_INTEGERS = ["sum_with_itself", "joined_with_itself", "output_before_a_relu", "what_lies_between"]


@pytest.mark.parametrize("name", [*IN_INTEGERS, *(name for name in KINDS if name.startswith("read_by_"))])
def test_convolutions_run_in_integers(name: str, tmp_path: Path) -> None:
    typed, _ = written(KINDS[name](), "ort-int8", tmp_path, images(32, 2))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(typed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert (fused.count("QLinearConv"), fused.count("Conv"), fused.count("FusedConv")) == (2, 0, 0)


def test_batch_norm_is_folded_before_weights_are_rounded(tmp_path: Path) -> None:
    typed, said = written(KINDS["batch_norms"](), "rtx-fp16", tmp_path)
    assert "BatchNormalization" not in {node.op_type for node in typed.graph.node}
    assert said["types"] == {"fp16": 7}


def test_one_weight_for_two_axes_has_scales_for_both(tmp_path: Path) -> None:
    """Rows of it differ a thousandfold: with the scales of its columns the small ones would be gone."""
    network = KINDS["matrix_along_both_axes"]()
    typed, said = written(network, "ort-int8", tmp_path, images(32, 2))
    largest = 64 if said["calibration"]["reduce_range"] else 127
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in typed.graph.initializer}
    tied = next(value for name, value in values.items() if value.dtype == np.int8 and value.shape == (8, 8))
    stored = [value for value in values.values() if value.dtype == np.int8 and value.shape == tied.shape]
    assert {(*np.abs(each).max(axis=0),) == (largest,) * 8 for each in stored} == {True, False}  # columns, and rows
