#!/usr/bin/env bash
# The INT8 plan of a narrow network is larger than its FP32 plan in TensorRT for RTX.
#
# Guessed: INT8 weights are a quarter of the bytes, so the plan shrinks towards a quarter, and is at least smaller
#   than FP16's.
# Seen: 20 convolutions of 16 channels: FP32 475,508 bytes, FP16 383,332, INT8 502,300. With 8 convolutions of 64
#   channels the order is the expected one (1,465,724, 864,916, 726,284), but nowhere near a quarter: a plan is
#   mostly kernels and tables.
# Versions: TensorRT for RTX 1.7.1.116, onnx 1.23.2, Python 3.11; no GPU is needed to parse and build (download:
#   about 250 MB).
# For users of polar_deploy: the size of a plan says nothing about what compression or precision saved: the file
#   size in the report is that of the ONNX file, and docs/devices.md says why.

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

logger = trt.Logger(trt.Logger.ERROR)


def chain(channels, layers, kind):
    """Convolutions and ReLUs; INT8 by Q/DQ pairs around each convolution."""
    random = np.random.default_rng(0)
    nodes, constants, last = [], {}, "x"
    for layer in range(layers):
        weight = random.normal(size=(channels, channels, 3, 3)) / channels
        if kind == "int8":
            scale = np.abs(weight).max((1, 2, 3)) / 127
            rounded = np.round(weight / scale[:, None, None, None]).astype(np.int8)
            constants |= {f"scale{layer}": np.float32(0.05), f"zero{layer}": np.int8(0)}
            constants |= {f"scales{layer}": scale.astype(np.float32), f"zeros{layer}": np.zeros(channels, np.int8)}
            constants[f"weight{layer}"] = rounded
            pair = [f"scale{layer}", f"zero{layer}"]
            nodes += [
                helper.make_node("QuantizeLinear", [last, *pair], [f"q{layer}"]),
                helper.make_node("DequantizeLinear", [f"q{layer}", *pair], [f"dq{layer}"]),
                helper.make_node(
                    "DequantizeLinear",
                    [f"weight{layer}", f"scales{layer}", f"zeros{layer}"],
                    [f"float_weight{layer}"],
                    axis=0,
                ),
                helper.make_node("Conv", [f"dq{layer}", f"float_weight{layer}"], [f"conv{layer}"], pads=[1] * 4),
            ]
        else:
            constants[f"weight{layer}"] = weight.astype(np.float16 if kind == "fp16" else np.float32)
            nodes.append(helper.make_node("Conv", [last, f"weight{layer}"], [f"conv{layer}"], pads=[1] * 4))
        last = f"relu{layer}"
        nodes.append(helper.make_node("Relu", [f"conv{layer}"], [last]))
    edge = TensorProto.FLOAT16 if kind == "fp16" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", edge, [1, channels, 32, 32])],
        [helper.make_tensor_value_info(last, edge, [1, channels, 32, 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def plan_bytes(channels, layers, kind):
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(chain(channels, layers, kind))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return builder.build_serialized_network(network, config).nbytes


narrow = {kind: plan_bytes(16, 20, kind) for kind in ("fp32", "fp16", "int8")}
wide = {kind: plan_bytes(64, 8, kind) for kind in ("fp32", "fp16", "int8")}
print("20 convolutions of 16 channels", narrow, "8 of 64", wide)
assert narrow["int8"] > narrow["fp32"] > narrow["fp16"]
assert wide["int8"] < wide["fp16"]
PY
