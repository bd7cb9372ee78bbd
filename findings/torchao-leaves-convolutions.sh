#!/usr/bin/env bash
# torchao's quantize_ leaves the convolutions of a CNN in FP32, without a word.
#
# Guessed: quantize_(network, Int8WeightOnlyConfig()) quantises every layer with weights, or says which ones it does
#   not.
# Seen: of two convolutions and a linear layer only the linear layer's weight is quantised, by Int8WeightOnlyConfig
#   and by Int8DynamicActivationInt8WeightConfig; no warning, no error. In a ResNet-50 that is 8 % of the weights.
# Versions: torch 2.15.0, torchao 0.18.0, Python 3.11 (download: about 3 GB).
# For users of polar_deploy: a CNN 'quantised' like this is FP32 on the device. INT8 is written into the ONNX graph
#   here (--target ort-int8, trt-int8), and build.json lists every layer that stays wider.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchao==0.18.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import warnings

from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

for config in (Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig):
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(network, config())
    kinds = [type(layer.weight.data).__name__ for layer in network if hasattr(layer, "weight")]
    words = [str(each.message) for each in caught if "conv" in str(each.message).lower()]
    print(f"{config.__name__}: the weights are {kinds}; warnings about convolutions: {words}")
    assert kinds[:2] == ["Tensor", "Tensor"]
    assert kinds[2] != "Tensor"
    assert words == []
PY
