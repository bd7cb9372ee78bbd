#!/usr/bin/env bash
# torch.onnx.export merges parameters that happen to have equal values, and keeps the name of the first.
#
# Guessed: every parameter becomes an initializer of its own name; only parameters that are shared in the module are
#   shared in the file.
# Seen: four linear layers with biases of one: 4 weights, but a single bias, called 'layers.0.bias', which all four
#   read. With other values in each there are four. So the structure of the file depends on values.
# Versions: torch 2.15.0, onnx 1.23.2, onnxscript 0.7.2, Python 3.11 (download: about 3 GB).
# For users of polar_deploy: a fresh or gated network is full of equal vectors (zeros, ones, masks): never map a
#   layer to its parameter by the initializer's name, and copy one that several nodes read before changing it.
#   Surgery and export do both (by node metadata, surgery/graph.py).

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


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def biases(network):
    with contextlib.redirect_stdout(io.StringIO()):
        graph = torch.onnx.export(network.eval(), (torch.randn(1, 8),), dynamo=True).model_proto.graph
    assert sum(node.op_type in ("Gemm", "Add") for node in graph.node) == 4
    return [initializer.name for initializer in graph.initializer if "bias" in initializer.name]


trained, fresh = Network(), Network()
for layer in fresh.layers:
    nn.init.ones_(layer.bias)
print("different values:", biases(trained), "equal values:", biases(fresh))
assert len(biases(trained)) == 4
assert biases(fresh) == ["layers.0.bias"]
PY
