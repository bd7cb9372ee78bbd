#!/usr/bin/env bash
# TensorRT for RTX builds a double-precision ONNX graph as FP32, inputs and outputs included, without a word.
#
# Guessed: a graph in DOUBLE, which no GPU engine computes in, is refused with a message.
# Seen: parse() returns True with no error and no warning; the network's input and output are FLOAT, although the
#   network is strongly typed.
# Versions: TensorRT for RTX 1.7.1.116, onnx 1.23.2, Python 3.11; no GPU is needed to parse and build (download:
#   about 250 MB).
# For users of polar_deploy: an application that passes float64 buffers, as the ONNX file says, hands over twice the
#   bytes that the engine reads. the build refuses a graph with a DOUBLE tensor and names it (precision/graph.py).
#   With another builder, ask the engine for its types, not the ONNX file (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorrt-rtx-cu13==1.7.1.116 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

weight = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "weight"], ["y"])],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 4, 8, 8])],
    [helper.make_tensor_value_info("y", TensorProto.DOUBLE, [1, 8, 6, 6])],
    [numpy_helper.from_array(weight, "weight")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)


class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []

    def log(self, severity, message):
        if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.lines.append(message)


logger = Logger()
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
parsed = parser.parse(model.SerializeToString())
types = network.get_input(0).dtype, network.get_output(0).dtype
print(f"parsed: {parsed}, errors: {parser.num_errors}, warnings: {logger.lines}, types: {types}")
assert parsed
assert parser.num_errors == 0
assert types == (trt.float32, trt.float32)
assert not any("double" in line.lower() for line in logger.lines)
PY
