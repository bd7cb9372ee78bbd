#!/usr/bin/env bash
# In MNN 3 x 3 convolutions take longer on 6 x 6 pixels than on 8 x 8, and several times as long as on 5 x 5.
#
# Guessed: fewer pixels never take longer; 6 x 6 need half of the time of 8 x 8, and 1.4 times that of 5 x 5.
# Seen: 256 to 256 channels, one thread of an x86 CPU with AVX-512: 6 x 6 take 1.5 to 1.8 times as long as 8 x 8, and
#   3.5 to 5.5 times as long as 5 x 5. 1 x 1 convolutions take time by the pixel. For each size MNN takes another
#   Winograd tile, and small maps are mostly the transformed weights, of which a larger tile has several times as many.
# Versions: MNN 3.6.1, numpy 2.4.6, onnx 1.23.2, Python 3.11.
# For users of polar_deploy: the file of MNN counts a weight as more than a hundred multiplications, so that a latency
#   budget takes channels of the last stage first (docs/devices.md). Ask before choosing a smaller picture: in a ResNet
#   one of 192 pixels a side ends in maps of 6 x 6.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check MNN==3.6.1 numpy==2.4.6 onnx==1.23.2
cd "$work"
"$work/venv/bin/python" - <<'PY'
import itertools
import statistics
import subprocess
import time

import MNN
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 256
PIXELS = (5, 6, 8)


def two_layers(kernel, pixels):
    shape = [1, CHANNELS, pixels, pixels]
    weight = np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS, kernel, kernel)) / (kernel * CHANNELS**0.5)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    ends = (("x", "between"), ("between", "y"))
    nodes = [helper.make_node("Conv", [a, f"to_{b}"], [b], pads=[kernel // 2] * 4) for a, b in ends]
    tensors = [numpy_helper.from_array(weight.astype(np.float32), f"to_{b}") for _, b in ends]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "conv.onnx")
    command = ["venv/bin/mnnconvert", "-f", "ONNX", "--modelFile", "conv.onnx", "--MNNModel", "conv.mnn", "--bizCode", "x"]
    subprocess.run(command, check=True, capture_output=True)
    interpreter = MNN.Interpreter("conv.mnn")
    session = interpreter.createSession({"numThread": 1, "backend": "CPU", "precision": "normal"})
    interpreter.resizeTensor(interpreter.getSessionInput(session), tuple(shape))
    interpreter.resizeSession(session)
    return lambda: interpreter.runSession(session)


def milliseconds(run, times=20):
    """Processor time, which other programs disturb less than the clock on the wall."""
    run()
    begin = time.process_time()
    for _ in range(times):
        run()
    return 1e3 * (time.process_time() - begin) / times


found = {}
for kernel, pixels in itertools.product((3, 1), PIXELS):
    loads = [two_layers(kernel, pixels) for _ in range(5)]  # where the memory lies makes a difference
    found[kernel, pixels] = statistics.median(milliseconds(run) for run in loads for _ in range(5))
    print(f"{kernel} x {kernel} on {pixels} x {pixels} pixels: {found[kernel, pixels]:.3f} ms")
assert found[3, 6] > 1.2 * found[3, 8]
assert found[3, 6] > 2 * found[3, 5]
assert found[1, 5] < found[1, 6] < found[1, 8]
PY
