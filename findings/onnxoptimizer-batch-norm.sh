#!/usr/bin/env bash
# onnxoptimizer's fuse_bn_into_conv turns Conv + BatchNormalization into eleven nodes.
#
# Guessed: the pass multiplies the scale into the weights: one Conv is left, as in ONNX Runtime and every
#   simplifier.
# Seen: the weights' arithmetic is written into the graph as nodes that run at every inference (Cast, Add, Sqrt,
#   Div, Unsqueeze, Mul, Cast, Sub, Mul, Add before the Conv): 2 nodes become 11, and the Conv's weight is no
#   constant any more. The function is the same.
# Versions: onnx 1.23.2, onnxoptimizer 0.4.2, onnxruntime 1.32.0, Python 3.11; IR version 10, weights not listed as
#   inputs.
# For users of polar_deploy: a converter for a microcontroller or an NPU wants constant weights and refuses or slows
#   down on such a graph. Nothing here uses onnxoptimizer: export folds BatchNorm itself. Where a graph came from
#   it, fold constants before surgery (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 onnxoptimizer==0.4.2
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)
values = {name: (1 + random.random(8)).astype(np.float32) for name in ("scale", "bias", "mean", "variance")}
values["weight"] = random.normal(size=(8, 4, 3, 3)).astype(np.float32)
graph = helper.make_graph(
    [
        helper.make_node("Conv", ["x", "weight"], ["middle"]),
        helper.make_node("BatchNormalization", ["middle", "scale", "bias", "mean", "variance"], ["y"]),
    ],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 6, 6])],
    [numpy_helper.from_array(value, name) for name, value in values.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
fused = onnxoptimizer.optimize(model, ["fuse_bn_into_conv"])
onnx.checker.check_model(fused, full_check=True)

x = random.normal(size=(1, 4, 8, 8)).astype(np.float32)
before, after = (
    onnxruntime.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    for each in (model, fused)
)
kinds = [node.op_type for node in fused.graph.node]
constants = {initializer.name for initializer in fused.graph.initializer}
print(f"{len(model.graph.node)} nodes before, {len(kinds)} after: {', '.join(kinds)}")
print("largest difference", np.abs(before - after).max())
assert np.allclose(before, after, atol=1e-4)
assert len(kinds) == 11
assert next(node for node in fused.graph.node if node.op_type == "Conv").input[1] not in constants
PY
