#!/usr/bin/env bash
# The same .tflite file rounds 0.5 to 0 or to 1, depending on who runs it inside LiteRT.
#
# Guessed: QUANTIZE rounds like ONNX's QuantizeLinear, half to even, on every path of one runtime.
# Seen: 0.5, 1.5, 2.5, -0.5, -1.5, -2.5 become 0, 2, 2, 0, -2, -2 by default (XNNPACK), and 1, 2, 3, -1, -2, -3 with
#   the reference kernels: away from zero. A device without XNNPACK (LiteRT Micro) has the latter.
# Versions: ai-edge-litert 2.3.0 on x86-64, Python 3.11.
# For users of polar_deploy: golden outputs made by one INT8 runtime are not bit-equal in another, even of the same
#   name: compare with a tolerance of one quantisation step a layer, and judge by accuracy on the device
#   (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ai-edge-litert==2.3.0 flatbuffers==25.12.19 numpy==2.4.6
here=$(cd "$(dirname "$0")" && pwd)
cd "$work"
PYTHONPATH="$here/support" "$work/venv/bin/python" - <<'PY'
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from int8_tflite import Network

network = Network()
network.save("quantize.tflite", network.quantize(network.floats(6)))
values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)


def run(resolver):
    interpreter = Interpreter("quantize.tflite", experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values[None])
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).ravel().tolist()


default, reference = run(OpResolverType.AUTO), run(OpResolverType.BUILTIN_REF)
print("by default", default, "reference kernels", reference)
assert default == [0, 2, 2, 0, -2, -2]
assert reference == [1, 2, 3, -1, -2, -3]
PY
