"""Random resized crops: parts of a picture that training sees, each at the network's size."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from polar_deploy.data.dataset import Pixels

# Uniform numbers in [0, 1) that a crop takes: share of the area and aspect ratio, tried ten times, and place.
DRAWS = 22
_ASPECT = (3 / 4, 4 / 3)

Draws = npt.NDArray[np.float32]


def resized_crop(picture: Pixels, size: int, least: float, draws: Draws) -> Pixels:
    """The part of a picture that `crop_box` draws, uint8 [size, size, 3], resized by an antialiased bilinear filter."""
    box = crop_box(picture.shape[1], picture.shape[0], least, draws)
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box=box))


def crop_box(width: int, height: int, least: float, draws: Draws) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a part of a picture of `width` × `height` pixels.

    The part has `least` to 1 of the area, uniformly, and an aspect ratio of 3/4 to 4/3, log-uniformly (Szegedy et al.,
    arXiv 1409.4842, section 6). Where ten tries do not fit, it is the largest part around the centre with such a
    ratio, as torchvision's RandomResizedCrop has it.

    Args:
        width, height: of the picture, in pixels.
        least: smallest share of the area, in (0, 1].
        draws: [DRAWS] uniform numbers in [0, 1).
    """
    low, high = (math.log(ratio) for ratio in _ASPECT)
    *tries, across_at, down_at = draws.tolist()
    for share, shape in zip(tries[::2], tries[1::2], strict=True):
        area, aspect = width * height * (least + (1 - least) * share), math.exp(low + (high - low) * shape)
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(across_at * (width - across + 1)), int(down_at * (height - down + 1))
            return left, top, left + across, top + down
    aspect = min(max(width / height, _ASPECT[0]), _ASPECT[1])
    across, down = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
