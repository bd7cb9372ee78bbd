"""Batches: what an engine was not built for is refused, and any number of images is split into what it takes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from polar_deploy.engines.base import infer_all, require_shape
from polar_deploy.errors import ContentError


class Profiled:
    """Takes 4 to 16 images; answers with each one's first pixel."""

    input_shape = (3, 2, 2)

    def __init__(self, least: int = 4, largest: int | None = 16) -> None:
        self.batches = (least, largest)
        self.sizes: list[int] = []

    def infer(self, images: np.ndarray) -> np.ndarray:
        require_shape(images, self, "a.plan")
        self.sizes.append(len(images))
        return images[:, 0, 0, :1]


def images(count: int, side: int = 2) -> np.ndarray:
    values = np.arange(count, dtype=np.float32)
    return np.broadcast_to(values[:, None, None, None], (count, 3, side, side))


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "a.plan was built for batches of 4 to 16, but got 3 images"),
        (17, "a.plan was built for batches of 4 to 16, but got 17 images"),
        (0, "a.plan takes images of batch x 3 x 2 x 2, but got 0 x 3 x 2 x 2"),
    ],
)
def test_batches_outside_of_the_profile_are_refused(count: int, message: str) -> None:
    with pytest.raises(ContentError) as error:
        require_shape(images(count), Profiled(), "a.plan")
    assert error.value.what == message


@pytest.mark.parametrize("count", [4, 16])
def test_the_ends_of_the_profile_are_taken(count: int) -> None:
    require_shape(images(count), Profiled(), "a.plan")


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ContentError, match="but got 4 x 3 x 3 x 3"):
        require_shape(images(4, side=3), Profiled(), "a.plan")
    with pytest.raises(ContentError, match="but got 4"):
        require_shape(np.zeros(4, np.float32), SimpleNamespace(input_shape=(3, 2, 2), batches=(1, None)), "a.plan")


@pytest.mark.parametrize(
    ("least", "largest", "count", "sizes"),
    [(4, 16, 33, [16, 16, 4]), (4, 16, 2, [4]), (1, None, 300, [128, 128, 44]), (256, None, 300, [256, 256])],
)
def test_any_number_of_images_is_answered_in_order(
    least: int, largest: int | None, count: int, sizes: list[int]
) -> None:
    engine = Profiled(least, largest)
    np.testing.assert_array_equal(infer_all(engine, images(count))[:, 0], np.arange(count))
    assert engine.sizes == sizes
