#!/usr/bin/env bash
# ONNX Runtime does not load a valid quantised convolution of opset 10 that has a bias.
#
# Guessed: QuantizeLinear and DequantizeLinear are there since opset 10, and so is everything that ONNX Runtime makes of
#   a convolution between them.
# Seen: the optimiser quantises a bias that the graph keeps in FP32, by Div, Round and Cast. Round came with opset 11:
#   loading ends with "No Op registered for Round with domain_version of 10". Without the bias, in opset 11, and in a
#   session without optimisation it loads.
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64.
# For users of polar_deploy: surgery proves graphs without the optimiser, and the cut graph keeps the opset of the one
#   that was given. Convert it to opset 13, or load with ORT_DISABLE_ALL.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

onnxruntime.set_default_logger_severity(4)
levels = onnxruntime.GraphOptimizationLevel


def load(opset, bias, level=levels.ORT_ENABLE_ALL):
    """What loading says; "loads" where it works."""
    constants = {"s": np.float32(0.1), "z": np.uint8(128), "weight": np.ones((4, 3, 1, 1), np.int8), "zero": np.int8(0)}
    constants |= {"bias": np.ones(4, np.float32)} if bias else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["weight", "s", "zero"], ["w"]),
        helper.make_node("Conv", ["d", "w", "bias"][: 2 + bias], ["c"], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c, 6, 6]) for n, c in (("x", 3), ("y", 4))]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "conv", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error)
    return "loads"


for opset, bias in ((10, True), (10, False), (11, True), (13, True)):
    said = load(opset, bias)
    print(f"opset {opset}, {'a' if bias else 'no'} bias: {said}")
    assert ("No Op registered for Round" in said) == (opset == 10 and bias)
    assert load(opset, bias, levels.ORT_DISABLE_ALL) == "loads"
PY
