"""Four torchvision networks, less deep, as PyTorch exports them, half of the channels closed behind every activation.

The same code as `benchmarks.bar_surgery_exact`, which does it with eighteen as torchvision has them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("torch", reason="networks are exported from PyTorch")
pytest.importorskip("torchvision", reason="networks are torchvision's")

import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, ResNet

from benchmarks.bar_surgery_exact import judge
from benchmarks.surgery_models import exported, randomised

SIDE = 64  # pixels


def squeezenet() -> nn.Module:
    """With two of its eight blocks."""
    whole = models.SqueezeNet("1_1", num_classes=10)
    features = [module for place, module in enumerate(whole.features) if place < 5]
    whole.features = nn.Sequential(*features)
    whole.classifier[1] = nn.Conv2d(128, 10, 1)
    return whole


def mnasnet() -> nn.Module:
    """With the first two of its six stacks of blocks."""
    whole = models.MNASNet(0.5, num_classes=10)
    layers = list(whole.layers)
    whole.layers = nn.Sequential(*layers[:10], nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    whole.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10))
    return whole


NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {  # with the share of their MACs that is left
    "squeezenet": (squeezenet, 0.317),  # Concat
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), 0.358),  # residual streams
    "mnasnet": (mnasnet, 0.267),  # depthwise
    # LayerNormalization, MatMul, channels on the last axis
    "convnext": (lambda: ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 1)], num_classes=10), 0.638),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_independent_gates_behind_every_activation(name: str) -> None:
    torch.manual_seed(0)
    build, left = NETWORKS[name]
    row = judge(name, exported(randomised(build(), SIDE), torch.zeros(2, 3, SIDE, SIDE)))
    assert row["exact"], row["difference"]
    assert not row["faults"]
    assert row["macs"][1] / row["macs"][0] == pytest.approx(left, abs=1e-3)
