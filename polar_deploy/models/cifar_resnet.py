"""The ResNets for CIFAR of He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2.

Parameter names are those of the public weights of akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


class Shortcut(nn.ConstantPad3d):
    """Option A: every second pixel, and zeros for the channels that the input does not have. No parameters."""

    def __init__(self, extra: int) -> None:
        super().__init__((0, 0, 0, 0, extra // 2, extra - extra // 2), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C + extra, ⌈H / 2⌉, ⌈W / 2⌉]"""
        return super().forward(x[:, :, ::2, ::2])


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut. Each ReLU is a module of its own: gates are named after them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = Shortcut(width - inputs) if stride == 2 else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → [B, width, ⌈H / stride⌉, ⌈W / stride⌉]"""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(branch + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """Three stages of (depth − 2) / 6 blocks, 16, 32 and 64 channels wide; the input may have any size."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] → logits [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))  # type: ignore[no-any-return]


def _stage(inputs: int, width: int, blocks: int) -> nn.Sequential:
    first = Block(inputs, width, stride=1 if inputs == width else 2)
    return nn.Sequential(first, *(Block(width, width, stride=1) for _ in range(blocks - 1)))
