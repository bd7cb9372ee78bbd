#!/usr/bin/env bash
# onnxoptimizer moves a Pad of zeros into MaxPool, where padding is minus infinity.
#
# Guessed: fuse_pad_into_pool, one of the default passes, takes a Pad of zeros into an AveragePool that counts what is
#   padded, and leaves one in front of a MaxPool alone, unless what is padded cannot be negative.
# Seen: Pad of zeros and MaxPool become one MaxPool with pads. Where the input is negative (behind a BatchNormalization,
#   a convolution, a LeakyRelu) the border's outputs were 0 and are negative now; behind a Relu nothing changes. The
#   checker passes both. onnxsim and onnxslim leave the two nodes.
# Versions: onnx 1.23.2, onnxoptimizer 0.4.2, onnxsim 0.8.1, onnxslim 0.1.98, onnxruntime 1.32.0, numpy 2.4.6, Python
#   3.11.
# For users of polar_deploy: surgery takes a Pad as what it says, and proves what it cut. Nothing here uses
#   onnxoptimizer; after a simplifier of your own compare outputs, with inputs that are negative, too
#   (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxoptimizer==0.4.2 onnxsim==0.8.1 onnxslim==0.1.98 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
import onnxsim
import onnxslim
from onnx import TensorProto, helper, numpy_helper

x = -1 - np.random.default_rng(0).random((1, 8, 6, 6)).astype(np.float32)


def network(*before, pool="MaxPool"):
    middle = "x"
    nodes = []
    for operator in before:
        nodes.append(helper.make_node(operator, [middle], [operator]))
        middle = operator
    nodes.append(helper.make_node("Pad", [middle, "pads"], ["padded"]))
    nodes.append(helper.make_node(pool, ["padded"], ["y"], kernel_shape=[3, 3]))
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 6, 6])],
        [numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


def difference(tool, model):
    changed = tool(onnx.ModelProto.FromString(model.SerializeToString()))
    onnx.checker.check_model(changed, full_check=True)
    kinds = [node.op_type for node in changed.graph.node]
    found = float(np.abs(outputs(changed) - outputs(model)).max())
    print(f"{[node.op_type for node in model.graph.node]} become {kinds}, largest difference {found:.2f}")
    return kinds, found


kinds, found = difference(onnxoptimizer.optimize, network())
assert (kinds, found > 1) == (["MaxPool"], True)
kinds, found = difference(onnxoptimizer.optimize, network("LeakyRelu"))
assert (kinds, found > 0.01) == (["LeakyRelu", "MaxPool"], True)
assert difference(onnxoptimizer.optimize, network("Relu"))[1] == 0
assert difference(onnxoptimizer.optimize, network(pool="AveragePool"))[1] < 1e-6
assert difference(lambda model: onnxsim.simplify(model)[0], network()) == (["Pad", "MaxPool"], 0)
assert difference(onnxslim.slim, network()) == (["Pad", "MaxPool"], 0)
PY
