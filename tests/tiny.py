"""A network small enough to train in a test: a stem, an inner chain, two residual blocks, a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, before: int, inner: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = (
            nn.Identity() if before == after and stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(branch + self.shortcut(x))


class Tiny(nn.Module):
    """MACs at 16 x 16 pixels, in order of execution, are in `layer_macs`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.block1 = Block(12, 16, 12)
        self.block2 = Block(12, 16, 24, stride=2)
        self.block3 = Block(24, 16, 24)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.linear(torch.flatten(self.pool(x), 1))


def net(classes: int) -> nn.Module:
    """For --model tests.tiny:net."""
    return Tiny(classes)


def layer_macs(
    inner: tuple[int, int, int] = (16, 16, 16), blocks: tuple[bool, bool, bool] = (True, True, True), classes: int = 10
) -> int:
    """MACs at 16 x 16 pixels for inner widths and blocks kept, written out by hand from the definition above."""
    total = 64 * 9 * 3 * 12  # the stem, 8 x 8 positions
    total += blocks[0] * 64 * 9 * inner[0] * (12 + 12)
    total += blocks[1] * 16 * 9 * inner[1] * (12 + 24)
    total += 16 * 12 * 24  # block2's shortcut stays
    total += blocks[2] * 16 * 9 * inner[2] * (24 + 24)
    return total + 24 * classes
