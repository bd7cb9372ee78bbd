"""Batches: every augmented image is found again among all that may be made from it, one by one, the slow way."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from polar_deploy.data.dataset import normalise
from polar_deploy.training.batches import EVALUATION_BATCH, ImageBatches
from tests.training.runs import CPU, NORMALIZE, pair, settings

Floats = npt.NDArray[np.float64]
SIZE, COUNT = 6, 64


def _images(count: int = COUNT) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


def _batches(count: int = COUNT, *, seed: int = 0, lazy: bool = False, **training: Any) -> ImageBatches:
    """Every image is its own class, so that a batch tells which images it holds."""
    images: Any = _images(count + 5)
    held = {"batch_size": 16, "flip": False, "crop_padding": 0, "cutout": 0} | training
    if lazy:
        images = _Lazy(images)
    return ImageBatches(images, np.arange(count + 5), np.arange(5, count + 5), settings(training=held, seed=seed), CPU)


class _Lazy:
    """Images that are read when asked for."""

    def __init__(self, images: npt.NDArray[np.uint8]) -> None:
        self._images = images
        self.shape = images.shape

    def __getitem__(self, indices: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        return self._images[indices].copy()


def _normal(image: npt.NDArray[np.uint8]) -> Floats:
    """float [3, H, W] of uint8 [H, W, 3]."""
    mean, std = np.array(NORMALIZE.mean), np.array(NORMALIZE.std)
    return ((image / 255 - mean) / std).transpose(2, 0, 1)


def _moved(image: npt.NDArray[np.uint8], flip: bool, down: int, right: int) -> Floats:
    """The crop that begins `down` rows and `right` columns into the flipped image; 0, the mean, outside of it."""
    normal = _normal(image)[:, :, ::-1] if flip else _normal(image)
    result = np.zeros_like(normal)
    for row, column in itertools.product(range(SIZE), range(SIZE)):
        if 0 <= row + down < SIZE and 0 <= column + right < SIZE:
            result[:, row, column] = normal[:, row + down, column + right]
    return result


def _cut(image: Floats, top: int, left: int, side: int) -> Floats:
    result = image.copy()
    result[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
    return result


def _first_epoch(batches: ImageBatches, number: int = 0) -> tuple[Floats, npt.NDArray[np.int64]]:
    parts = [pair(batch) for batch in batches.epoch(number)]
    return np.concatenate([x.numpy() for x, _ in parts]), np.concatenate([y.numpy() for _, y in parts])


@pytest.mark.parametrize(("flip", "padding"), [(False, 0), (True, 0), (False, 2), (True, 2)])
def test_every_image_is_a_flip_and_a_shifted_crop_of_its_own(flip: bool, padding: int) -> None:
    shifts = range(-padding, padding + 1)
    choices = list(itertools.product([False, True] if flip else [False], shifts, shifts))
    batches, images, seen = _batches(flip=flip, crop_padding=padding), _images(COUNT + 5), set()
    made = np.array([[_moved(image, *choice) for choice in choices] for image in images])
    for number in range(4):
        for given, label in zip(*_first_epoch(batches, number), strict=True):
            (fit,) = np.flatnonzero(np.abs(given - made[label]).max((1, 2, 3)) < 1e-5)
            seen.add(choices[fit])
    assert seen == set(choices)  # 256 draws of at most 50, at a fixed seed


def test_cutout_blanks_a_square_around_any_pixel() -> None:
    side, images, seen = 3, _images(COUNT + 5), set()
    for number in range(3):
        for given, label in zip(*_first_epoch(_batches(cutout=side), number), strict=True):
            corners = list(itertools.product(range(-1, SIZE - 1), repeat=2))  # a centre on each pixel
            made = np.array([_cut(_normal(images[label]), *corner, side) for corner in corners])
            (fit,) = np.flatnonzero(np.abs(given - made).max((1, 2, 3)) < 1e-5)
            seen.add(corners[fit])
    assert {corner[0] for corner in seen} == {corner[1] for corner in seen} == set(range(-1, SIZE - 1))


def test_without_augmentation_an_epoch_holds_every_image_once_in_another_order() -> None:
    images, orders = _images(COUNT + 5), []
    for number in range(2):
        given, labels = _first_epoch(_batches(), number)
        np.testing.assert_allclose(given, normalise(images[labels], NORMALIZE.mean, NORMALIZE.std), atol=1e-5)
        assert sorted(labels) == list(range(5, COUNT + 5))
        orders.append(labels.tolist())
    assert orders[0] != orders[1]


def test_batches_follow_from_the_seed_and_the_epoch_alone() -> None:
    augment = {"flip": True, "crop_padding": 2, "cutout": 2}
    first, labels = _first_epoch(_batches(**augment), 3)
    used = _batches(**augment)
    _first_epoch(used, 2)
    torch.rand(5)
    again, labels_again = _first_epoch(used, 3)
    assert np.array_equal(first, again)
    assert np.array_equal(labels, labels_again)
    for other in (_first_epoch(_batches(**augment), 4), _first_epoch(_batches(seed=1, **augment), 3)):
        assert not np.array_equal(labels, other[1])


def test_lazy_images_give_the_same_batches() -> None:
    for kind in (_first_epoch, lambda batches: pair(next(iter(batches.plain())))):
        held, lazy = (kind(_batches(lazy=lazy, flip=True, crop_padding=1)) for lazy in (False, True))
        assert np.array_equal(held[0], lazy[0])
        assert np.array_equal(held[1], lazy[1])


def test_an_incomplete_batch_is_left_out_unless_it_is_the_only_one() -> None:
    assert (_batches(35).steps, len(_batches(35))) == (2, 35)
    assert [len(labels) for _, labels in map(pair, _batches(35).epoch(0))] == [16, 16]
    assert [len(labels) for _, labels in map(pair, _batches(9).epoch(0))] == [9]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_batches_lie_in_memory_as_the_settings_say(layout: torch.memory_format) -> None:
    batches = _batches(flip=True, crop_padding=1, cutout=2, channels_last=layout == torch.channels_last)
    for images, _ in map(pair, (next(batches.epoch(0)), next(batches.plain()))):
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=layout)


def test_evaluation_sees_all_images_in_order_as_they_are() -> None:
    count = EVALUATION_BATCH + 20
    parts = list(map(pair, _batches(count, flip=True, crop_padding=2, cutout=4).plain()))
    assert [len(labels) for _, labels in parts] == [EVALUATION_BATCH, 20]
    expected = normalise(_images(count + 5)[5:], NORMALIZE.mean, NORMALIZE.std)
    np.testing.assert_allclose(np.concatenate([x.numpy() for x, _ in parts]), expected, atol=1e-5)
    assert np.concatenate([y.numpy() for _, y in parts]).tolist() == list(range(5, count + 5))
