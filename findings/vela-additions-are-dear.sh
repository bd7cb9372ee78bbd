#!/usr/bin/env bash
# On an Ethos-U55 an Add costs 28 % of the convolution in front of it, by vela's estimate.
#
# Guessed: an Add of two 16 x 16 x 64 tensors has no MACs beside the 9.4 million of a 3 x 3 convolution: below 5 %
#   of its cycles.
# Seen: 88,900 cycles for the convolution, 113,380 for convolution and Add: 24,480 more, 28 %.
# Versions: ethos-u-vela 5.2.0 (accelerator ethos-u55-128, its default system), ai-edge-litert 2.3.0 (writes and
#   checks the file), Python 3.11. Cycles are vela's estimate, not measured on a device.
# For users of polar_deploy: a budget in MACs counts an Add as nothing. Removing a whole residual block saves its
#   Add as well, which closing channels inside it does not: on this device leave --set gates.blocks=true (the
#   default) on, and judge by vela's cycles (polar_deploy/devices/ethos-u55-128.json has the Add's cost).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ethos-u-vela==5.2.0 ai-edge-litert==2.3.0 flatbuffers==25.12.19 numpy==2.4.6
here=$(cd "$(dirname "$0")" && pwd)
cd "$work"
PYTHONPATH="$here/support" "$work/venv/bin/python" - <<'PY'
from int8_tflite import Network, cycles

plain = Network()
x = plain.input(16, 64)
plain.save("plain.tflite", plain.conv(x, 64))
residual = Network()
x = residual.input(16, 64)
residual.save("residual.tflite", residual.add(x, residual.conv(x, 64)))

conv, both = cycles("plain.tflite", "ethos-u55-128"), cycles("residual.tflite", "ethos-u55-128")
print(f"convolution {conv:.0f} cycles, convolution and Add {both:.0f}: the Add is {both / conv - 1:.0%} of it")
assert 0.15 < both / conv - 1 < 0.5
PY
