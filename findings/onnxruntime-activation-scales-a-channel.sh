#!/usr/bin/env bash
# ONNX Runtime does not load a valid graph whose Sigmoid or LeakyRelu stands between scales of one number a channel.
#
# Guessed: scales a channel are slow for activations, and are computed in FP32 where no kernel takes them, as between
#   the same pairs around a Relu or a Softmax.
# Seen: the optimiser makes a QLinearSigmoid or a QLinearLeakyRelu of the pairs, whose table of 256 values takes one
#   scale only, and does not look at how many there are: loading ends with "input X_scale must be a scalar or 1D tensor
#   of size 1". One scale for all channels, a Relu, a Softmax, and a session without optimisation load.
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64.
# For users of polar_deploy: its INT8 graphs have one scale for each activation; scales a channel are for weights.
#   Surgery proves graphs of others without the optimiser.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import itertools

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

onnxruntime.set_default_logger_severity(4)
levels = onnxruntime.GraphOptimizationLevel


def load(operator, scales, level=levels.ORT_ENABLE_ALL):
    """What loading says; "loads" where it works."""
    constants = {"s": np.full(scales, 0.1, np.float32), "z": np.full(scales, 128, np.uint8)}
    pair = {"axis": 1} if scales else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **pair),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], **pair),
        helper.make_node(operator, ["d"], ["a"], name="act"),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["r"], **pair),
        helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"], **pair),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 6, 6]) for name in "xy"]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "act", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error).strip()
    return "loads"


for operator, scales in itertools.product(("Sigmoid", "LeakyRelu", "Relu", "Softmax"), ((), (3,))):
    said = load(operator, scales)
    print(f"{operator}, {'a scale a channel' if scales else 'one scale'}: {said[-80:]}")
    assert ("X_scale must be a scalar" in said) == (operator in ("Sigmoid", "LeakyRelu") and bool(scales))
    assert load(operator, scales, levels.ORT_DISABLE_ALL) == "loads"
PY
