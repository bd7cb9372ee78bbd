"""Pictures of samples and of what networks say of them, side by side, for the page of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from polar_deploy.config import Normalize
from polar_deploy.data.dataset import Pixels
from polar_deploy.tasks.boxes import Detections

Colours = npt.NDArray[np.uint8]

# Told apart by people who see colours in any way (Okabe and Ito, 2008); more classes have them again.
_PALETTE = np.array(
    [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66)],
    np.uint8,
)
_BETWEEN = 4  # white pixels
_LEAST_SIZE = 96  # pixels a side of a panel on which boxes are drawn, so that their lines are thin
_SURE = 0.3  # score of a box that is drawn


def pictures(inputs: npt.NDArray[np.float32], normal: Normalize) -> Pixels:
    """What was seen, uint8 [N, H, W, 3], of normalised inputs [N, 3, H, W]."""
    shares = inputs.transpose(0, 2, 3, 1) * np.array(normal.std) + np.array(normal.mean)
    colours: Pixels = np.clip(np.rint(255 * shares), 0, 255).astype(np.uint8)
    return colours


def masks(classes: npt.NDArray[np.integer], count: int) -> Pixels:
    """Classes [N, H, W] as colours, uint8 [N, H, W, 3]; black where there is none of the `count`."""
    colours: Pixels = np.append(_PALETTE[np.arange(count) % len(_PALETTE)], np.zeros((1, 3), np.uint8), axis=0)[
        np.where((classes >= 0) & (classes < count), classes, count)
    ]
    return colours


def with_boxes(picture: Pixels, found: Detections) -> Pixels:
    """A picture uint8 [H, W, 3] with boxes in their classes' colours, but for those that are not sure.

    It is enlarged where it has fewer than 96 pixels a side.
    """
    scale = -(-_LEAST_SIZE // min(picture.shape[:2]))
    height, width = (scale * side for side in picture.shape[:2])
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for box, score, label in zip(*found, strict=True):
        if score >= _SURE:
            colour = tuple(_PALETTE[label % len(_PALETTE)].tolist())
            corners = [
                min(max(0, round(scale * side)), most - 1) for side, most in zip(box, (width, height) * 2, strict=True)
            ]
            draw.rectangle(corners, outline=colour, width=2)
    return np.asarray(image)


def side_by_side(panels: Sequence[Pixels]) -> Pixels:
    """Pictures [N, H, W, 3] of one size from left to right, uint8 [N, H, W', 3]."""
    between = np.full((*panels[0].shape[:2], _BETWEEN, 3), 255, np.uint8)
    parts = [part for panel in panels for part in (between, panel)][1:]
    return np.concatenate(parts, axis=2)
