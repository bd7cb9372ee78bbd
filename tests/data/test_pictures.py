"""Pictures that are decoded when they are asked for: whole ones for crops, and what is kept of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polar_deploy.data.decode import decode
from polar_deploy.data.pictures import LazyImages, PictureCache


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without edges, uint8 [H, W, 3], that any good filter makes smaller to the same values."""
    down, across = np.mgrid[0:height, 0:width]
    waves = (np.sin(down / height * 5), np.cos(across / width * 4), np.sin(down / height + across / width))
    return np.stack([127 + 100 * wave for wave in waves], 2).astype(np.uint8)


def lazy(path: Path, size: int) -> LazyImages:
    return LazyImages(path.parent, np.array([path.name], dtype=object), size, size)


@pytest.mark.parametrize(("mode", "suffix"), [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png")])
@pytest.mark.parametrize(("height", "width"), [(800, 600), (333, 1000), (90, 120)])
def test_a_whole_picture_is_the_picture_made_smaller(
    tmp_path: Path, mode: str, suffix: str, height: int, width: int
) -> None:
    image = Image.fromarray(smooth(height, width)).convert(mode)
    image.save(tmp_path / f"x.{suffix}", quality=98, **({"subsampling": 0} if suffix == "jpg" else {}))
    (given,) = lazy(tmp_path / f"x.{suffix}", 64).whole(np.array([0]))
    scale = min(1.0, 96 / min(height, width))  # never made larger
    expected = np.asarray(image.convert("RGB").resize((int(width * scale), int(height * scale)), Image.BOX))
    assert abs(given.shape[0] - expected.shape[0]) <= 1
    assert abs(given.shape[1] - expected.shape[1]) <= 1
    assert min(given.shape[:2]) == min(96, height, width)
    rows, columns = (min(a, b) for a, b in zip(given.shape, expected.shape[:2], strict=False))
    assert np.abs(given[:rows, :columns].astype(int) - expected[:rows, :columns]).max() <= 12
    assert np.abs(given[:rows, :columns].astype(int) - expected[:rows, :columns]).mean() <= 3


def test_a_jpeg_that_is_much_larger_is_decoded_smaller(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(smooth(1600, 1200)).save(path)
    assert decode(path).size == (1200, 1600)
    assert decode(path, least=250).size == (300, 400)
    assert decode(path, least=300).size == (300, 400)
    assert decode(path, least=301).size == (600, 800)
    assert decode(path, least=1300).size == (1200, 1600)


def test_a_jpeg_on_its_side_is_decoded_smaller_and_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    stored = np.zeros((400, 800, 3), np.uint8)
    stored[:, :400] = 250  # its left half, which is the upper one
    Image.fromarray(stored).save(tmp_path / "x.jpg", exif=exif, quality=95)
    (given,) = lazy(tmp_path / "x.jpg", 64).whole(np.array([0]))
    assert given.shape == (192, 96, 3)
    assert given[:90].min() > 240
    assert given[102:].max() < 10


def test_evaluation_sees_the_fully_decoded_picture(tmp_path: Path) -> None:
    """A device decodes as its library does: nothing but the resize that the manifest tells lies in between."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg", quality=95)
    expected = Image.open(tmp_path / "x.jpg").convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(lazy(tmp_path / "x.jpg", 32)[np.array([0])][0], np.asarray(expected))


def test_the_cache_reads_each_picture_once_while_there_is_room() -> None:
    asked: list[list[int]] = []

    def read(index: np.ndarray) -> list[np.ndarray]:
        asked.append(index.tolist())
        return [np.full((2, 5, 3), each, np.uint8) for each in index]

    cache = PictureCache(read, limit=3 * 30)
    assert [int(each[0, 0, 0]) for each in cache(np.array([4, 1]))] == [4, 1]
    assert [int(each[0, 0, 0]) for each in cache(np.array([1, 2, 4, 7, 1]))] == [1, 2, 4, 7, 1]
    assert [int(each[0, 0, 0]) for each in cache(np.array([7, 2]))] == [7, 2]
    assert asked == [[4, 1], [2, 7], [7]]  # three were kept, the fourth is read again


def test_what_is_kept_is_no_view_of_a_batch() -> None:
    batch = np.zeros((2, 4, 4, 3), np.uint8)
    cache = PictureCache(lambda index: list(batch), limit=10**6)
    cache(np.array([0, 1]))
    batch[:] = 1
    assert not any(each.any() for each in cache(np.array([0, 1])))
