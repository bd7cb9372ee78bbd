"""Random resized crops, held against torchvision's where nothing is left to chance, and against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from polar_deploy.data.crops import DRAWS, crop_box, resized_crop


def boxes(width: int, height: int, least: float, count: int = 400) -> np.ndarray:
    """Left, top, width, height of many crops, [N, 4]."""
    draws = np.random.default_rng(0).random((count, DRAWS), np.float32)
    found = np.array([crop_box(width, height, least, each) for each in draws])
    return np.stack([found[:, 0], found[:, 1], found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]], 1)


@pytest.mark.parametrize(("width", "height", "least"), [(640, 480, 0.08), (480, 640, 0.35), (500, 500, 0.6)])
def test_crops_lie_inside_and_have_the_area_and_the_ratio_that_are_asked(width: int, height: int, least: float) -> None:
    left, top, across, down = boxes(width, height, least).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + across <= width).all()
    assert (top + down <= height).all()
    share, ratio = across * down / (width * height), across / down
    assert share.min() > least * 0.98  # rounded to pixels
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35


def test_crops_of_a_square_have_every_share_ratio_and_place() -> None:
    """As they do not depend on each other but for what fits: shares up to 0.75 fit with every ratio."""
    left, top, across, down = boxes(1000, 1000, 0.08, 4000).T
    share = across * down / 1e6
    small = share < 0.75
    for values, low, high in (
        (share[small], 0.08, 0.75),
        (np.log(across / down)[small], math.log(3 / 4), math.log(4 / 3)),
        (left[small] / (1000 - across[small]), 0, 1),
        (top[small] / (1000 - down[small]), 0, 1),
    ):
        assert values.min() > low - 0.005  # rounded to pixels
        assert values.max() < high + 0.005
        bins, _ = np.histogram(values.clip(low, high), 8, (low, high))
        assert bins.min() > 0.8 * small.sum() / 8
        assert bins.max() < 1.2 * small.sum() / 8


@pytest.mark.parametrize(("width", "height"), [(900, 100), (100, 900), (301, 200), (64, 90), (1, 50), (7, 3)])
def test_where_no_try_fits_it_is_torchvisions_crop_of_the_centre(width: int, height: int) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    whole = v2.RandomResizedCrop(16, scale=(1.0, 1.0))  # the whole area, which fits with no such ratio
    made = whole.make_params([torch.from_numpy(picture).permute(2, 0, 1)])
    left, top, across, down = boxes(width, height, 1.0, 1)[0]
    assert (left, top, across, down) == (made["left"], made["top"], made["width"], made["height"])


def test_the_part_is_resized_and_nothing_else() -> None:
    picture = np.random.default_rng(2).integers(0, 256, (90, 120, 3), np.uint8)
    draws = np.random.default_rng(3).random(DRAWS, np.float32)
    left, top, right, bottom = crop_box(120, 90, 0.2, draws)
    cut = Image.fromarray(picture).crop((left, top, right, bottom)).resize((16, 16), Image.Resampling.BILINEAR)
    given = resized_crop(picture, 16, 0.2, draws).astype(int)
    assert given.shape == (16, 16, 3)
    # A filter near the border reaches pixels beyond it, which a crop before the resize has thrown away.
    assert np.abs(given - np.asarray(cut).astype(int))[2:-2, 2:-2].max() <= 1


def test_one_pixel_is_a_picture() -> None:
    picture = np.full((1, 1, 3), 9, np.uint8)
    assert (resized_crop(picture, 8, 0.1, np.zeros(DRAWS, np.float32)) == 9).all()
