#!/usr/bin/env bash
# ONNX Runtime does not load a valid graph of signed 8-bit pairs from opset 21 on.
#
# Guessed: QuantizeLinear and DequantizeLinear to INT8 around a Slice load in opset 21 as they do in opset 19; the
#   operators only gained types and an attribute that may be left out (output_dtype).
# Seen: the optimiser moves the DequantizeLinear behind the Slice and writes a QuantizeLinear of its own there, with
#   output_dtype INT8; then it makes signed activations unsigned, and leaves that attribute as it was. Loading ends with
#   "output_dtype INT8 does not match y_zero_point type UINT8". Opset 19, UINT8, and a session without optimisation load.
# Versions: onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6, Python 3.11, x86-64.
# For users of polar_deploy: INT8 graphs for ONNX Runtime have UINT8 activations, and those for TensorRT opset 19;
#   surgery proves graphs without the step of the optimiser that does it (QDQS8ToU8Transformer). Export signed pairs for
#   opset 19, or load with ORT_DISABLE_ALL.

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


def load(dtype, opset, level=levels.ORT_ENABLE_ALL):
    """What loading says; "loads" where it works."""
    constants = {"s": np.float32(0.03), "z": np.zeros((), dtype), "no": np.float32(0), "t": np.array(True)}
    constants |= {"from": np.array([0]), "to": np.array([3]), "along": np.array([1])}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Slice", ["d", "from", "to", "along"], ["part"], name="part"),
        helper.make_node("Where", ["t", "part", "no"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c, 6, 6]) for n, c in (("x", 4), ("y", 3))]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "pairs", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error)
    return "loads"


for dtype, opset in ((np.int8, 19), (np.int8, 21), (np.int8, 23), (np.uint8, 21)):
    said = load(dtype, opset)
    print(f"{dtype.__name__}, opset {opset}: {said}")
    assert ("output_dtype INT8 does not match" in said) == (dtype is np.int8 and opset >= 21)
    assert load(dtype, opset, levels.ORT_DISABLE_ALL) == "loads"
PY
