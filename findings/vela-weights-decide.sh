#!/usr/bin/env bash
# vela's cycle estimate of a fully connected layer depends on the VALUES of its weights, not on its shape alone.
#
# Guessed: the estimate comes from shapes, so random weights do for a quick look at a network before it is trained.
# Seen: 1024 to 1024 fully connected: 1,058,960 cycles with uniform random int8 weights, 900,160 with normally
#   distributed ones, 662,832 with half of the uniform ones zero, 141,376 with all zero. Weights are compressed and
#   the layer waits for them; a convolution of the same device that computes all the time hardly changes.
# Versions: ethos-u-vela 5.2.0 (accelerator ethos-u55-128, its default system), ai-edge-litert 2.3.0 (writes and
#   checks the file), Python 3.11. Cycles are vela's estimate, not measured on a device.
# For users of polar_deploy: estimate with trained weights, or with normally distributed ones (as all figures in
#   polar_deploy/devices do). Zeros that cannot be removed still pay in fully connected layers of this device
#   (docs/devices.md).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ethos-u-vela==5.2.0 ai-edge-litert==2.3.0 flatbuffers==25.12.19 numpy==2.4.6
here=$(cd "$(dirname "$0")" && pwd)
cd "$work"
PYTHONPATH="$here/support" "$work/venv/bin/python" - <<'PY'
import numpy as np
from int8_tflite import Network, cycles

random = np.random.default_rng(0)
uniform = random.integers(-127, 128, (1024, 1024)).astype(np.int8)
weights = {
    "uniform": uniform,
    "normal": np.clip(25 * random.normal(size=uniform.shape), -127, 127).astype(np.int8),
    "uniform, half of them zero": uniform * (random.random(uniform.shape) < 0.5).astype(np.int8),
    "zero": np.zeros_like(uniform),
}
found = {}
for name, values in weights.items():
    network = Network()
    network.save("dense.tflite", network.dense(network.vector(1024), values))
    found[name] = cycles("dense.tflite", "ethos-u55-128")
    print(f"{name}: {found[name]:.0f} cycles")
order = [found[name] for name in weights]
assert order == sorted(order, reverse=True)
assert order[0] > 1.1 * order[1] > 1.2 * order[2] > 2 * order[3]
PY
