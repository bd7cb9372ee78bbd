"""Pictures of discs and squares with their boxes as COCO lays them out, and a detector that finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.support.shapes import block

SIZE = 32
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]  # labels go by the ids' order: square, disc


def draw(root: Path, count: int = 60, seed: int = 0, name: str = "train", folder: str = "images") -> dict[str, Any]:
    """`count` pictures in `root`/`folder`, and `root`/annotations/instances_`name`.json, which is returned, too.

    Each has a red disc, a blue square, or both; every eighth is stored on its side by EXIF.
    """
    rng = np.random.default_rng(seed)
    (root / folder).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        height, width = rng.integers(34, 44, 2).tolist()
        rows, columns = np.mgrid[:height, :width]
        pixels = rng.integers(40, 80, (height, width, 3))
        images.append({"id": 100 + number, "file_name": f"{number:03}.png", "width": width, "height": height})
        for kind in ((7,), (3,), (7, 3))[number % 3]:
            size, (top, left) = int(rng.integers(9, 15)), rng.integers(0, 15, 2).tolist()
            left += 15 if kind == 3 else 0  # they do not hide each other
            inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
            if kind == 7:
                middle = (size - 1) / 2
                inside = (rows - top - middle) ** 2 + (columns - left - middle) ** 2 <= (size / 2) ** 2
            pixels[inside] = (220, 80, 60) if kind == 7 else (60, 90, 220)
            right, bottom = min(left + size, width), min(top + size, height)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": 100 + number,
                    "category_id": kind,
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": 0,
                }
            )
        picture, exif = Image.fromarray(pixels.astype(np.uint8)), Image.Exif()
        if number % 8 == 1:  # EXIF's 6 says to turn it clockwise by 90°
            exif[0x0112], picture = 6, picture.transpose(Image.Transpose.ROTATE_90)
        picture.save(root / folder / f"{number:03}.png", exif=exif)
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    write(root, document, name)
    return document


def write(root: Path, document: object, name: str = "train") -> None:
    (root / f"annotations/instances_{name}.json").write_text(json.dumps(document))


class Detector(nn.Module):
    """One map of stride 4, and a convolution that gives what torchvision's FCOSHead does."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 32), nn.MaxPool2d(2), block(32, 32))
        self.neck = block(32, 32)
        self.classes, self.boxes, self.centre = (nn.Conv2d(32, many, 1) for many in (classes, 4, 1))
        nn.init.constant_(self.classes.bias, -2.0)
        nn.init.constant_(self.boxes.bias, 1.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = self.neck(self.body(x))
        return {
            "cls_logits": _by_cell(self.classes(seen)),
            "bbox_regression": _by_cell(torch.relu(self.boxes(seen))),
            "bbox_ctrness": _by_cell(self.centre(seen)),
        }


def _by_cell(values: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H · W, C]."""
    return values.flatten(2).transpose(1, 2)


def detector(classes: int) -> nn.Module:
    """For --model tests.support.objects:detector."""
    return Detector(classes)


class Lopsided(Detector):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: value[:, :-1] for name, value in super().forward(x).items()}


def lopsided(classes: int) -> nn.Module:
    """A detector that answers for a cell too few."""
    return Lopsided(classes)
