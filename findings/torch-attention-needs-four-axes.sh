#!/usr/bin/env bash
# torch.onnx.export refuses scaled_dot_product_attention of 3 or 5 axes, which eager PyTorch computes.
#
# Guessed: the documentation says (N, ..., L, E) with any number of leading axes, so the exporter takes them too.
# Seen: 4 axes export; 3 and 5 end in a ConversionError ('only 4D query, key, and value are supported'), with shapes
#   that eager takes without a word.
# Versions: torch 2.15.0, onnx 1.23.2, onnxscript 0.7.2, Python 3.11 (download: about 3 GB).
# For users of polar_deploy: window attention and tokens of several axes (Hiera, NesT) use such calls. export.py
#   reshapes them to 4 axes around the call, so that these networks export as they are.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 onnx==1.23.2 onnxscript==0.7.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import contextlib
import io
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def outcome(*shape):
    x = torch.randn(shape)
    assert Attention()(x).shape == x.shape  # eager
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(Attention().eval(), (x,), dynamo=True)
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return f"refused: {cause}".splitlines()[0]
    return "exported"


found = {len(shape): outcome(*shape) for shape in ((2, 9, 8), (1, 2, 9, 8), (1, 3, 2, 9, 8))}
for axes, text in found.items():
    print(f"{axes} axes: {text}")
assert found[4] == "exported"
assert found[3].startswith("refused")
assert found[5].startswith("refused")
PY
