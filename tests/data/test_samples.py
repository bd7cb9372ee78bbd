"""Samples that are drawn from a data set."""

from __future__ import annotations

import numpy as np

from polar_deploy.config import Normalize
from polar_deploy.data import Split
from polar_deploy.data.samples import draw

NORMALIZE = Normalize(mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25))
# Image n is n everywhere, so that it can be told again.
SPLIT = Split(np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8), np.zeros(20))


def drawn(count: int, seed: int = 0) -> list[int]:
    images = draw(SPLIT, np.arange(5, 15), count, seed, NORMALIZE)
    assert images.shape == (min(count, 10), 3, 4, 6)
    numbers = images[:, 1] * 255  # the channel of mean 0 and deviation 1
    np.testing.assert_allclose(images[:, 0], (images[:, 1] - 0.5) / 0.5, atol=1e-6)
    np.testing.assert_allclose(images[:, 2], (images[:, 1] - 0.25) / 0.25, atol=1e-6)
    np.testing.assert_allclose(numbers, numbers[:, :1, :1] * np.ones((1, 4, 6)), atol=1e-4)
    return [round(float(each)) for each in numbers[:, 0, 0]]


def test_they_are_of_the_indices_in_the_order_of_the_data_set() -> None:
    found = drawn(4)
    assert found == sorted(set(found))
    assert set(found) <= set(range(5, 15))
    assert drawn(4) == found


def test_another_seed_draws_others() -> None:
    assert len({tuple(drawn(4, seed)) for seed in range(5)}) > 1


def test_there_are_never_more_than_there_are() -> None:
    assert drawn(100) == list(range(5, 15))
