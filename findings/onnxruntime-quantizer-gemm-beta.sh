#!/usr/bin/env bash
# ONNX Runtime's quantiser changes the function of a Gemm whose beta is not 1.
#
# Guessed: quantize_static either handles alpha and beta of a Gemm, or leaves such a node in FP32.
# Seen: with beta = 1 the quantised graph is within 2 % of the float one (relative RMS); with beta = 0.5 and nothing
#   else changed it is off by 104 %, without a warning. alpha = 2 is handled.
# Versions: onnx 1.23.2, onnxruntime 1.32.0, Python 3.11.
# For users of polar_deploy: a Gemm from scikit-learn, Keras or an old exporter may have beta != 1. The build
#   measures what INT8 does in each layer: above build.max_layer_error (0.1) it stays in FP32 and build.json lists
#   it, so such a Gemm costs speed, not accuracy. Multiply beta into the bias to have it in INT8 (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

random = np.random.default_rng(0)
weight, bias = random.normal(size=(16, 8)), 3 * random.normal(size=8)
samples = random.normal(size=(16, 4, 16)).astype(np.float32)


class Samples(CalibrationDataReader):
    def __init__(self):
        self.left = iter(samples)

    def get_next(self):
        sample = next(self.left, None)
        return None if sample is None else {"x": sample}


def error(alpha, beta):
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], alpha=alpha, beta=beta)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        [
            numpy_helper.from_array(weight.astype(np.float32), "weight"),
            numpy_helper.from_array(bias.astype(np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "float.onnx")
    quantize_static("float.onnx", "int8.onnx", Samples())
    exact, quantised = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": samples[0]})[0]
        for path in ("float.onnx", "int8.onnx")
    )
    return float(np.sqrt(np.mean((quantised - exact) ** 2) / np.mean(exact**2)))


plain, doubled, halved = error(1.0, 1.0), error(2.0, 1.0), error(1.0, 0.5)
print(f"relative error: alpha 1, beta 1: {plain:.4f}; alpha 2, beta 1: {doubled:.4f}; alpha 1, beta 0.5: {halved:.4f}")
assert plain < 0.02
assert doubled < 0.02
assert halved > 0.5
PY
