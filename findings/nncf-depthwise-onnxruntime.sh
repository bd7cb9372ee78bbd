#!/usr/bin/env bash
# What NNCF makes of a depthwise convolution loads in ONNX Runtime, and is refused at the first call.
#
# Guessed: nncf.quantize of an ONNX model gives an ONNX model that ONNX Runtime runs: NNCF calibrates by it.
# Seen: in front of a depthwise convolution NNCF gives activations one scale a channel, whatever target_device and
#   preset are. The file is valid. ONNX Runtime's optimiser makes a QLinearConv of it, whose kernel takes a single zero
#   point: the session opens, and run() fails. Without that optimiser (level basic; session.disable_quant_qdq), and in
#   OpenVINO, the network is off by 5 %, as INT8 is. With per_channel=False for activations it runs at every level.
# Versions: nncf 3.4.0, openvino 2026.4.1, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11.
# For users of polar_deploy: every MobileNet has such layers. INT8 here gives an activation one scale. Surgery takes
#   NNCF's file, and proves it without that optimiser; for ONNX Runtime quantise as this script's last call does
#   (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging

import nncf
import numpy as np
import onnx
import onnxruntime
import openvino
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from onnx import TensorProto, helper, numpy_helper

logging.disable(logging.WARNING)
onnxruntime.set_default_logger_severity(4)
random = np.random.default_rng(0)
weights = {
    "first": random.normal(size=(8, 4, 3, 3)) / 6,
    "depthwise": random.normal(size=(8, 1, 3, 3)) / 3,
    "last": random.normal(size=(8, 8, 1, 1)) / 3,
}
graph = helper.make_graph(
    [
        helper.make_node("Conv", ["x", "first"], ["a"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="b"),
        helper.make_node("Conv", ["b", "depthwise"], ["c"], name="c", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Relu", ["c"], ["d"], name="d"),
        helper.make_node("Conv", ["d", "last"], ["y"], name="y"),
    ],
    "separable",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 8, 8])],
    [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
x = random.normal(size=(16, 4, 8, 8)).astype(np.float32)
levels = onnxruntime.GraphOptimizationLevel


def outputs(network, level=levels.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    try:
        return session.run(None, {"x": x})[0]
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
        print("the session opened, and run() says:", str(error)[-90:])
        return None


def quantised(**options):
    dataset = nncf.Dataset([x[i : i + 1] for i in range(16)], lambda sample: {"x": sample})
    network = nncf.quantize(model, dataset, subset_size=16, **options)
    onnx.checker.check_model(network, full_check=True)
    constants = {each.name: numpy_helper.to_array(each) for each in network.graph.initializer}
    scales = {
        node.input[0]: constants[node.input[1]].size
        for node in network.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }
    print("scales of activations:", scales)
    return network, scales["b"]


def off(name, given):
    error = float(np.linalg.norm(given - right) / np.linalg.norm(right))
    print(f"{name}: off by {error:.3f}")
    return error


right = outputs(model)
for options in ({}, {"target_device": nncf.TargetDevice.GPU}, {"preset": nncf.QuantizationPreset.MIXED}):
    network, scales = quantised(**options)
    assert scales == 8
    assert outputs(network) is None
assert off("level basic", outputs(network, levels.ORT_ENABLE_BASIC)) < 0.08
onnx.save(network, "int8.onnx")
compiled = openvino.Core().compile_model("int8.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
assert off("OpenVINO", compiled({"x": x})[0]) < 0.08
one = QuantizationParameters(per_channel=False)
network, scales = quantised(advanced_parameters=AdvancedQuantizationParameters(activations_quantization_params=one))
assert scales == 1
assert off("per_channel=False", outputs(network)) < 0.08
PY
