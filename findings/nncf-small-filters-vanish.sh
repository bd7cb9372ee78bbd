#!/usr/bin/env bash
# NNCF gives no filter a scale below a hundredth of the largest: small filters get few bits, or become zero.
#
# Guessed: weights that are quantised with one scale per filter use all of their 8 bits in each filter, however small
#   it is beside the others.
# Seen: of eight filters one is made smaller, and a Mul behind the layer makes up for it. Down to 1/100 its output is
#   off by 3 % at most, like the others'; at 1/1,000 by a tenth, and at 1/10,000 all of its weights become 0: its scale
#   is a hundredth of the largest scale in the tensor. ONNX Runtime's quantiser, with per_channel, stays below 3 %.
# Versions: nncf 3.4.0, onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, Python 3.11; nncf.quantize with its defaults.
# For users of polar_deploy: a BatchNormalization with small factors, folded, leaves such filters. INT8 here has a scale
#   a filter (down to a billionth of the largest), and measures what each layer loses. With NNCF compare each channel
#   of a layer, not the layer: here it is one of eight (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check nncf==3.4.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging

import nncf
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

logging.disable(logging.WARNING)
random = np.random.default_rng(0)
samples = random.normal(size=(16, 1, 4, 8, 8)).astype(np.float32)
weight = random.normal(size=(8, 4, 3, 3)).astype(np.float32) / 6


class Samples(CalibrationDataReader):
    def __init__(self):
        self.left = iter(samples)

    def get_next(self):
        sample = next(self.left, None)
        return None if sample is None else {"x": sample}


def outputs(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"x": sample})[0] for sample in samples])


def off(share):
    """How far the small filter's channel, and all others, are off in each quantiser's network."""
    factor = np.ones((8, 1, 1, 1), np.float32)
    factor[1] = share
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "weight"], ["small"], pads=[1, 1, 1, 1]),
            helper.make_node("Mul", ["small", "back"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 8, 8])],
        [
            numpy_helper.from_array(weight * factor, "weight"),
            numpy_helper.from_array(1 / factor.reshape(1, 8, 1, 1), "back"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    right = outputs(model)
    onnx.save(model, "float.onnx")
    weights = {"op_types_to_quantize": ["Conv"], "extra_options": {"OpTypesToExcludeOutputQuantization": ["Conv"]}}
    quantize_static("float.onnx", "int8.onnx", Samples(), per_channel=True, **weights)  # outputs stay, as NNCF's do
    by_nncf = nncf.quantize(model, nncf.Dataset(list(samples), lambda sample: {"x": sample}), subset_size=16)
    found = {}
    for name, quantised in (("NNCF", by_nncf), ("ONNX Runtime", onnx.load("int8.onnx"))):
        wrong = outputs(quantised) - right
        channels = [float(np.linalg.norm(wrong[:, i]) / np.linalg.norm(right[:, i])) for i in range(8)]
        found[name] = channels[1], max(channels[:1] + channels[2:])
        print(f"{name}, 1/{1 / share:,.0f}: off by {found[name][0]:.3f}, the other channels by {found[name][1]:.3f}")
    return found


for share, low, high in ((1, 0, 0.05), (1e-2, 0, 0.05), (1e-3, 0.06, 0.3), (1e-4, 0.99, 1.01)):
    found = off(share)
    assert low <= found["NNCF"][0] <= high
    assert found["NNCF"][1] < 0.05
    assert max(found["ONNX Runtime"]) < 0.05
PY
