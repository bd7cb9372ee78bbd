#!/usr/bin/env bash
# A narrower INT8 network is slower in ONNX Runtime: 31 channels in every layer take far longer than 32.
#
# Guessed: 31 of 32 channels take as long as 32, whose pack they fill; 23, with half of the multiplications, are faster.
# Seen: on an x86 CPU with AVX-512 and VNNI 31 take 1.6 times as long as 32, and 23 take 1.3 times as long: half of the
#   multiplications are gone, and the network is slower than before. 24 channels take 0.8 times as long.
# Versions: numpy 2.4.6, onnx 1.23.2, onnxruntime 1.32.0, Python 3.11.
# For users of polar_deploy: ort-int8 keeps widths that are multiples of 16 by default, and a latency budget by a
#   device's file counts what others cost. With half of the MACs a ResNet-20 is 1.7 to 1.9 times as fast so, and 0.8
#   times with any width (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

logging.disable(logging.WARNING)  # that the graph was not prepared: it has nothing to fold
SHAPE = (1, 16, 28, 28)
LAYERS = 8
samples = np.random.default_rng(1).normal(size=(8, *SHAPE)).astype(np.float32)


class Samples(CalibrationDataReader):
    def __init__(self):
        self.left = iter(samples)

    def get_next(self):
        sample = next(self.left, None)
        return None if sample is None else {"x": sample}


def files(channels):
    """As many channels in all layers but the last, in FP32 and in INT8."""
    random, nodes, weights, given = np.random.default_rng(0), [], [], SHAPE[1]
    for index in range(LAYERS):
        made = SHAPE[1] if index == LAYERS - 1 else channels
        weight = random.normal(size=(made, given, 3, 3)) / (3 * given**0.5)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"weight_{index}"))
        nodes.append(helper.make_node("Conv", [f"y_{index}", f"weight_{index}"], [f"sum_{index}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"sum_{index}"], [f"y_{index + 1}"]))
        given = made
    nodes[0].input[0], nodes[-1].output[0] = "x", "y"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, f"{channels}.onnx")
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(f"{channels}.onnx", f"{channels}.int8.onnx", Samples(), per_channel=True, **kinds)
    return f"{channels}.onnx", f"{channels}.int8.onnx"


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(run, times=5):
    """Processor time, which other programs disturb less than the clock on the wall."""
    run.run(None, {"x": samples[0]})
    begin = time.process_time()
    for _ in range(times):
        run.run(None, {"x": samples[0]})
    return time.process_time() - begin


paths = {channels: files(channels) for channels in (23, 24, 31, 32)}
ratios = {}
for index, precision in enumerate(("FP32", "INT8")):
    for channels in (23, 24, 31):
        found = []
        for _ in range(5):  # loaded anew: where the memory lies makes a difference
            one, whole = session(paths[channels][index]), session(paths[32][index])
            found += [seconds(one) / seconds(whole) for _ in range(15)]
        ratios[precision, channels] = statistics.median(found)
        print(f"{precision}: {channels} channels take {ratios[precision, channels]:.2f} times as long as 32")
assert ratios["INT8", 31] > 1.25
assert ratios["INT8", 23] > 1.1
assert ratios["INT8", 24] < 1
PY
