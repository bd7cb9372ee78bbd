#!/usr/bin/env bash
# Only ONNX Runtime keeps the metadata of nodes; ONNX's own version converter drops it.
#
# Guessed: metadata_props of a node are part of the format since IR version 10, so tools that keep a node keep them:
#   onnx's own version converter at least.
# Seen: version_converter, onnxoptimizer, onnxsim and onnxslim return the same two convolutions without any
#   metadata_props; shape inference and ONNX Runtime's optimised file (level basic) keep them. onnxsim adds 19
#   entries of its own to the model's metadata instead.
# Versions: onnx 1.23.2, onnxruntime 1.32.0, onnxsim 0.8.1, onnxslim 0.1.98, onnxoptimizer 0.4.2, Python 3.11.
# For users of polar_deploy: the names of gated layers travel as node metadata from export to surgery: run surgery
#   on the exported file as it is, and simplify or convert the opset afterwards (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 onnxsim==0.8.1 onnxslim==0.1.98 onnxoptimizer==0.4.2
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
import onnxsim
import onnxslim
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(0)
graph = helper.make_graph(
    [
        helper.make_node("Conv", ["x", "first"], ["middle"], name="conv1"),
        helper.make_node("Relu", ["middle"], ["positive"], name="relu"),
        helper.make_node("Conv", ["positive", "second"], ["y"], name="conv2"),
    ],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 4, 4])],
    [
        numpy_helper.from_array(random.normal(size=(8, 4, 3, 3)).astype(np.float32), "first"),
        numpy_helper.from_array(random.normal(size=(4, 8, 3, 3)).astype(np.float32), "second"),
    ],
)
for node in graph.node:
    node.metadata_props.add(key="layer", value=node.name)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)


def onnx_runtime(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = "optimised.onnx"
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load("optimised.onnx")


tools = {
    "onnx.version_converter": lambda model: onnx.version_converter.convert_version(model, 21),
    "onnxoptimizer": onnxoptimizer.optimize,
    "onnxsim": lambda model: onnxsim.simplify(model)[0],
    "onnxslim": onnxslim.slim,
    "onnx.shape_inference": onnx.shape_inference.infer_shapes,
    "onnxruntime": onnx_runtime,
}
kept = {}
for name, tool in tools.items():
    result = tool(onnx.ModelProto.FromString(model.SerializeToString()))
    assert [node.op_type for node in result.graph.node] == ["Conv", "Relu", "Conv"], name
    kept[name] = sum(len(node.metadata_props) for node in result.graph.node)
    print(f"{name}: {kept[name]} of 3 nodes keep their metadata, {len(result.metadata_props)} entries in the model's")
assert kept == {name: 3 if name in ("onnx.shape_inference", "onnxruntime") else 0 for name in tools}
PY
