#!/usr/bin/env bash
# In a network whose tensors lie in memory with their channels last, torch.onnx.export writes the pooling to one pixel
# as a Gather of computed positions.
#
# Guessed: memory layout is no part of a graph: `network.to(memory_format=torch.channels_last)`, which is what people
#   train in, exports the same nodes as before.
# Seen: AdaptiveAvgPool2d(1) alone is 1 ReduceMean, and with channels last 11 nodes: its result is made flat and picked
#   out of again by positions that are computed from shapes. Outputs are the same; but nothing that reads the graph
#   sees channels behind it any more, neither a pruner nor a quantiser. A permuted tensor does the same, without any
#   memory_format (ConvNeXt's way around its norms).
# Versions: torch 2.15.0, onnx 1.23.2, onnxscript 0.7.2, Python 3.11 (download: about 3 GB).
# For users of polar_deploy: its own export pools by a mean. Before surgery on a graph that you export yourself, give
#   the network back its usual layout: `network.to(memory_format=torch.contiguous_format)`.

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


class Permuted(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def pooled(*layers):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.AdaptiveAvgPool2d(1)).eval()


def operators(network):
    with contextlib.redirect_stdout(io.StringIO()):
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(network, (torch.randn(2, 3, 8, 8),), dynamo=True, dynamic_shapes=shapes)
    return [node.op_type for node in program.model_proto.graph.node]


usual = operators(pooled())
last = operators(pooled().to(memory_format=torch.channels_last))
permuted = operators(pooled(Permuted()))
print("usual:", usual, "channels last:", last, "permuted:", permuted, sep="\n  ")
assert usual == ["Conv", "ReduceMean"]
assert "Gather" in last and len(last) > 8
assert "Gather" in permuted
PY
