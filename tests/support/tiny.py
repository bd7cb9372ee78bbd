"""A network small enough to train in a test: a stem, three residual blocks, a linear head; and its costs by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

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
    """MACs at 16 x 16 pixels, in order of execution, are in `layer_macs`; what can go is in `SITES` and `BLOCKS`."""

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
    """For --model tests.support.tiny:net."""
    return Tiny(classes)


# What can go: channels by the layer that writes them first, and branches by the module that ends them. "stem.0" is the
# sum that the stem begins and block1 adds to, "block2.conv2" the one that block2 begins and block3 adds to.
SITES = {"stem.0": 12, "block1.conv1": 16, "block2.conv1": 16, "block2.conv2": 24, "block3.conv1": 16}
STREAMS = ("stem.0", "block2.conv2")
BLOCKS = ("block1.bn2:out", "block2.bn2:out", "block2.shortcut:out", "block3.bn2:out")


def layer_macs(
    inner: tuple[int, int, int] = (16, 16, 16),
    blocks: tuple[bool, bool, bool] = (True, True, True),
    classes: int = 10,
    *,
    streams: tuple[int, int] = (12, 24),
    shortcut: bool = True,
) -> int:
    """MACs at 16 x 16 pixels for widths and blocks kept, written out by hand from the definition above.

    streams: channels of the sums: of the stem and block1, of block2 and block3.
    """
    first, second = streams
    total = 64 * 9 * 3 * first  # the stem, 8 x 8 positions
    total += blocks[0] * 64 * 9 * inner[0] * (first + first)
    total += blocks[1] * 16 * 9 * inner[1] * (first + second)
    total += shortcut * 16 * first * second
    total += blocks[2] * 16 * 9 * inner[2] * (second + second)
    return total + second * classes


def layer_params(
    inner: tuple[int, int, int] = (16, 16, 16),
    blocks: tuple[bool, bool, bool] = (True, True, True),
    classes: int = 10,
    *,
    streams: tuple[int, int] = (12, 24),
    shortcut: bool = True,
) -> int:
    """Weights and biases after BatchNorm is folded into the layer before it, written out by hand as well."""
    first, second = streams
    total = 9 * 3 * first + first
    total += blocks[0] * (9 * inner[0] * (first + first) + inner[0] + first)
    total += blocks[1] * (9 * inner[1] * (first + second) + inner[1] + second)
    total += shortcut * first * second  # no norm, no bias
    total += blocks[2] * (9 * inner[2] * (second + second) + inner[2] + second)
    return total + second * classes + classes


def costs(opened: Mapping[str, int], classes: int = 10) -> dict[str, int]:
    """Both costs, counted by hand, for how many gates are open of each of `SITES` and `BLOCKS`."""
    inner = (opened["block1.conv1"], opened["block2.conv1"], opened["block3.conv1"])
    first, second, shortcut, third = (bool(opened[name]) for name in BLOCKS)
    how = {"streams": (opened["stem.0"], opened["block2.conv2"]), "shortcut": shortcut}
    kept = (first, second, third)
    return {
        "macs": layer_macs(inner, kept, classes, **how),  # type: ignore[arg-type]
        "params": layer_params(inner, kept, classes, **how),  # type: ignore[arg-type]
    }


def reachable(align: int) -> Iterator[dict[str, int]]:
    """Every choice there is, as open gates by site and block: at least a quarter of each width, in steps of `align`.

    A layer narrower than twice the alignment has the largest step of 16, 8 and 1 that is at most half its width. One
    of the two sides of block2's sum stays; widths inside a closed block make no difference and are left at their least.
    """
    allowed = {}
    for name, width in SITES.items():
        step = align if width >= 2 * align else next(each for each in (16, 8, 1) if each <= width // 2)
        allowed[name] = [n for n in range(1, width + 1) if n == width or (n % step == 0 and 4 * n >= width)]
    inside = {"block1.conv1": "block1.bn2:out", "block2.conv1": "block2.bn2:out", "block3.conv1": "block3.bn2:out"}
    for kept in itertools.product((0, 1), repeat=len(BLOCKS)):
        blocks = dict(zip(BLOCKS, kept, strict=True))
        if not blocks["block2.bn2:out"] and not blocks["block2.shortcut:out"]:
            continue
        closed = {name for name, block in inside.items() if not blocks[block]}
        choices = [widths[:1] if name in closed else widths for name, widths in allowed.items()]
        for widths in itertools.product(*choices):
            yield dict(zip(SITES, widths, strict=True)) | blocks
