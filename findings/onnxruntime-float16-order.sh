#!/usr/bin/env bash
# ONNX Runtime's float16 converter returns a graph that is no valid ONNX: its nodes are out of order.
#
# Guessed: convert_float_to_float16 of a valid graph is a valid graph, whatever the options.
# Seen: with keep_io_types=True, or with any op_block_list, the new Cast nodes are appended at the end, behind the
#   nodes that read them, and onnx.checker refuses the result ('Nodes in a graph must be topologically sorted').
#   ONNX Runtime itself loads it, so the fault shows only in the next tool. Without the options the graph is valid.
# Versions: onnx 1.23.2, onnxruntime 1.32.0, Python 3.11.
# For users of polar_deploy: the pipeline sorts the graph that this converter returns (precision/fp16.py). If you
#   convert by hand, sort as well (OnnxModel.topological_sort) before another compiler or an edge team gets the file
#   (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 sympy==1.14.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)


def converted(**options):
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "weight"], ["middle"], name="conv1"),
            helper.make_node("Relu", ["middle"], ["positive"], name="relu"),
            helper.make_node("Conv", ["positive", "weight"], ["y"], name="conv2"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return convert_float_to_float16(model, **options)


def verdict(model):
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # loads in any case
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        return str(error).splitlines()[0]
    return "valid"


plain = verdict(converted())
kept = verdict(converted(keep_io_types=True))
blocked = verdict(converted(op_block_list=["Relu"]))
print(f"no options: {plain}\nkeep_io_types: {kept}\nop_block_list: {blocked}")
assert plain == "valid"
assert "topologically sorted" in kept
assert "topologically sorted" in blocked
PY
