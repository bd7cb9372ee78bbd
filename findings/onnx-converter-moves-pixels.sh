#!/usr/bin/env bash
# onnx's version converter moves the pixels of an Upsample or an old Resize, and may change what a Softmax sums over.
#
# Guessed: convert_version returns the same function in another opset, or refuses.
# Seen: from opset 9 or 10 to 11 or later the Resize that it writes samples half a pixel further, for opset 11 brought
#   coordinate_transformation_mode, and its default is not what older opsets did: a linear Upsample by 2 is off by half
#   of the output's size, a nearest one by 1.25 by three quarters; a nearest one by 2 is exact. A Softmax over the
#   channels goes from opset 11 to 13 exactly, in four nodes; back from 13 to 11 it stays one node, which sums over all
#   axes from the channels on: off by all of the output's size. No warning, and the checker passes all of it.
# Versions: onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11.
# For users of polar_deploy: networks that segment have such nodes. INT8 and BF16 raise the opset with this converter:
#   they give each old Resize and Upsample coordinate_transformation_mode "asymmetric" (precision/graph.py). Surgery
#   takes old opsets as they are. After a conversion of your own compare outputs (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

x = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)


def outputs(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


def off(before, after, operator, scale=1.0, **attributes):
    """How far the converted network is from the one given, and what it is made of."""
    size = int(16 * scale)
    scales = numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), "scales")
    resizes = operator != "Softmax"
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "scales"] if resizes else ["x"], ["y"], **attributes)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, size, size])],
        [scales] if resizes else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", before)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    converted = onnx.version_converter.convert_version(model, after)
    onnx.checker.check_model(converted, full_check=True)
    right = outputs(model)
    error = float(np.linalg.norm(outputs(converted) - right) / np.linalg.norm(right))
    what = f"{operator} {attributes}" + (f" by {scale}" if resizes else "")
    print(f"{what}, opset {before} to {after}: off by {error:.2f}; {[node.op_type for node in converted.graph.node]}")
    return error


assert off(9, 10, "Upsample", 2, mode="linear") == 0
assert off(9, 11, "Upsample", 2, mode="linear") > 0.3
assert off(10, 13, "Resize", 2, mode="linear") > 0.3
assert off(9, 18, "Upsample", 1.25, mode="nearest") > 0.5
assert off(9, 18, "Upsample", 2, mode="nearest") == 0
assert off(11, 13, "Softmax", axis=1) < 1e-5
assert off(13, 11, "Softmax", axis=1) > 0.9
PY
