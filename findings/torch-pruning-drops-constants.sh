#!/usr/bin/env bash
# Torch-Pruning changes the output by a third when it removes channels that were closed, if a BatchNorm's shift is left behind.
#
# Guessed: removing channels whose filters and BatchNorm scale and shift are all zero leaves the output as it is:
#   that is what 'dead' means.
# Seen: 3 of 16 channels of a convolution are exactly zero behind their ReLU6. The depthwise convolution after it
#   reads zero and its own BatchNorm adds a shift, so these channels are constant, not zero, further on.
#   Torch-Pruning takes them away together with what they added: the output moves by 33 % of its largest value.
# Versions: torch 2.15.0, torch-pruning 1.6.1, Python 3.11 (download: about 3 GB).
# For users of polar_deploy: check a cut against the masked network, not against accuracy alone. Surgery moves such
#   a constant into the next bias and compares both graphs before it writes anything (README, Graph surgery alone).

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torch-pruning==1.6.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import copy

import torch
import torch_pruning
from torch import nn

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU6(),
    nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU6(),
    nn.Conv2d(16, 8, 1),
).eval()
dead, x = [1, 5, 9], torch.randn(1, 3, 8, 8)
with torch.no_grad():
    network[4].bias.uniform_(0.2, 1)
    for tensor in (network[0].weight, network[1].weight, network[1].bias):
        tensor[dead] = 0
    assert not network[:3](x)[:, dead].any()  # closed: zero everywhere
cut = copy.deepcopy(network)
graph = torch_pruning.DependencyGraph().build_dependency(cut, x)
graph.get_pruning_group(cut[0], torch_pruning.prune_conv_out_channels, dead).prune()
before, after = network(x), cut(x)
error = ((after - before).abs().max() / before.abs().max()).item()
print(f"{cut[0].out_channels} of 16 channels left, the output moves by {error:.0%} of its largest value")
assert cut[0].out_channels == 13
assert error > 0.05
PY
