"""Pictures of discs and squares with their masks, and a U-Net that tells them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIZE = 32


def paint(root: Path, count: int = 60, seed: int = 0) -> Path:
    """`count` pictures in `root`/images, some on their side by EXIF, and in `root`/masks 0, 1 (disc), 2 (square)."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number in range(count):
        height, width = rng.integers(30, 44, 2).tolist()
        rows, columns = np.mgrid[:height, :width]
        mask = np.zeros((height, width), np.uint8)
        y, x = rng.integers(6, 12, 2)
        mask[(rows - y) ** 2 + (columns - x) ** 2 < 30] = 1
        y, x = rng.integers(18, 22, 2)
        mask[y : y + 9, x : x + 9] = 2
        colours = np.array([(60, 60, 60), (220, 80, 60), (60, 90, 220)])[mask]
        pixels = (colours + rng.integers(-20, 21, colours.shape)).clip(0, 255).astype(np.uint8)
        mask[0] = 255
        exif = Image.Exif()
        if number % 4 == 1:  # stored on its side: EXIF's 6 says to turn it clockwise by 90°
            exif[0x0112], pixels = 6, np.ascontiguousarray(np.rot90(pixels))
        Image.fromarray(pixels).save(root / f"images/{number:03}.png", exif=exif)
        image = Image.fromarray(mask)
        if number % 2:
            image = image.convert("P")
            image.putdata(mask.ravel().tolist())
        image.save(root / f"masks/{number:03}.png")
    (root / "images/._000.png").write_bytes(b"macOS")
    (root / "masks/.ipynb_checkpoints").mkdir()
    (root / "masks/Thumbs.db").write_bytes(b"Windows")
    return root


class UNet(nn.Module):
    """Two levels, skips that are concatenated, and an auxiliary head, as torchvision's networks have one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.second = block(3, 12), block(12, 24)
        self.deep, self.up = block(24, 24), block(48, 16)
        self.last = block(28, 12)
        self.head, self.aux = nn.Conv2d(12, classes, 1), nn.Conv2d(24, classes, 1)
        self.pool, self.widen = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        second = self.second(self.pool(first))
        deep = self.deep(self.pool(second))
        up = self.up(torch.cat([self.widen(deep), second], 1))
        last = self.last(torch.cat([self.widen(up), first], 1))
        return {"out": self.head(last), "aux": self.widen(self.widen(self.aux(deep)))}


def block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def unet(classes: int) -> nn.Module:
    """For --model tests.support.shapes:unet."""
    return UNet(classes)
