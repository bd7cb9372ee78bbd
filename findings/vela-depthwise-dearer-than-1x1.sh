#!/usr/bin/env bash
# On an Ethos-U55 a depthwise 3 x 3 convolution costs more than the 1 x 1 convolution behind it, which has 7 times its MACs.
#
# Guessed: cycles follow MACs: the depthwise half of a separable convolution (64 channels, 16 x 16) is an eighth of
#   the whole.
# Seen: 14,208 cycles for the depthwise convolution (147 thousand MACs), 11,904 for the 1 x 1 convolution 64 to 64
#   (1,049 thousand), 88,900 for a full 3 x 3 one (9,437 thousand).
# Versions: ethos-u-vela 5.2.0 (accelerator ethos-u55-128, its default system), ai-edge-litert 2.3.0 (writes and
#   checks the file), Python 3.11. Cycles are vela's estimate, not measured on a device.
# For users of polar_deploy: in a MobileNet half of the cycles lie where hardly any MACs are, so macs=0.5 promises
#   too much there: the device file has a separate cost for depthwise layers
#   (polar_deploy/devices/ethos-u55-128.json), and narrowing the channels that pass THROUGH depthwise layers pays
#   more than MACs say.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ethos-u-vela==5.2.0 ai-edge-litert==2.3.0 flatbuffers==25.12.19 numpy==2.4.6
here=$(cd "$(dirname "$0")" && pwd)
cd "$work"
PYTHONPATH="$here/support" "$work/venv/bin/python" - <<'PY'
from int8_tflite import Network, cycles


def cost(build):
    network = Network()
    network.save("layer.tflite", build(network, network.input(16, 64)))
    return cycles("layer.tflite", "ethos-u55-128")


depthwise = cost(lambda network, x: network.depthwise(x))
pointwise = cost(lambda network, x: network.conv(x, 64, kernel=1))
full = cost(lambda network, x: network.conv(x, 64))
print(f"cycles: depthwise 3 x 3 {depthwise:.0f}, 1 x 1 {pointwise:.0f}, full 3 x 3 {full:.0f}")
assert pointwise < depthwise < full
PY
