#!/usr/bin/env bash
# onnxscript's constant folding makes a file larger: tables looked up by a constant index are written out.
#
# Guessed: an optimiser that folds constants weighs the sizes and never lets the file grow much.
# Seen: the relative position bias of one Swin block (169 x 24 table, Gather by 49 x 49 positions) is 35 kB before
#   and 231 kB after optimize(); every block of the network pays it again. The function is the same.
# Versions: onnx 1.23.2, onnxscript 0.7.2, onnx-ir as pip resolves it, Python 3.11.
# For users of polar_deploy: torch.onnx.export(dynamo=True) runs this optimiser, so an exported Swin is larger than
#   its weights: compare file sizes of compressed and full network with each other (the report does), never with the
#   checkpoint's (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)
heads = 24
graph = helper.make_graph(
    [
        helper.make_node("Gather", ["table", "index"], ["bias"]),
        helper.make_node("Add", ["x", "bias"], ["y"]),
    ],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2401, heads])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2401, heads])],
    [
        numpy_helper.from_array(random.normal(size=(169, heads)).astype(np.float32), "table"),
        numpy_helper.from_array(random.integers(0, 169, 2401), "index"),
    ],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
folded = onnxscript.optimizer.optimize(onnx.ModelProto.FromString(model.SerializeToString()))

x = random.normal(size=(2401, heads)).astype(np.float32)
before, after = (
    onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    for each in (model, folded)
)
sizes = len(model.SerializeToString()), len(folded.SerializeToString())
print(f"{sizes[0]} bytes before, {sizes[1]} after; nodes: {[node.op_type for node in folded.graph.node]}")
assert np.array_equal(before, after)
assert sizes[1] > 5 * sizes[0]
PY
