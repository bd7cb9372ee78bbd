from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from polar_deploy.data.arrays import read_npz, read_npz_folder, resize
from polar_deploy.data.dataset import DataSpec
from polar_deploy.errors import ContentError, MachineError, UsageError

SPEC = DataSpec("toy", 3, 8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), flip=True, crop_padding=1, epochs=1)
NAMES = ("a", "b", "c")
Arrays = dict[str, np.ndarray]


def arrays(count: int = 12, size: int = 8) -> Arrays:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return {"images": images, "labels": np.arange(count) % 3}


def write(folder: Path, **changes: np.ndarray) -> Path:
    np.savez(folder / "train.npz", **(arrays() | changes))
    np.savez(folder / "test.npz", **arrays(6))
    return folder


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    dataset = read_npz_folder(SPEC, write(tmp_path, labels=(np.arange(12) % 3).astype(np.uint8)), NAMES)
    np.testing.assert_array_equal(dataset.train.images, arrays()["images"])
    np.testing.assert_array_equal(dataset.train.labels, arrays()["labels"])
    assert dataset.train.labels.dtype == np.int64
    assert dataset.test.images.shape == (6, 8, 8, 3)


BAD: dict[str, tuple[Arrays, str]] = {
    "float images": ({"images": arrays()["images"] / 255}, r"train.npz: images is float64, not uint8"),
    "no channels": ({"images": arrays()["images"][..., 0]}, r"images has the shape \[12, 8, 8\]"),
    "channels first": ({"images": np.zeros((12, 3, 8, 8), np.uint8)}, r"shape \[12, 3, 8, 8\], not \[N, H, W, 3\]"),
    "no images": ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, r"shape \[0, 8, 8, 3\]"),
    "not square": ({"images": np.zeros((12, 8, 9, 3), np.uint8)}, "pictures of 8 × 9 pixels"),
    "float labels": ({"labels": np.zeros(12)}, "labels is float64, not an integer type"),
    "too few labels": ({"labels": np.arange(11) % 3}, r"labels has the shape \[11\], but there are 12 images"),
    "one-hot labels": ({"labels": np.eye(12, 3, dtype=int)}, r"labels has the shape \[12, 3\]"),
    "label too large": ({"labels": np.arange(12) % 4}, r"labels\[3\] is 3, outside 0 to 2 \(3 such labels\)"),
    "label negative": ({"labels": np.arange(12) % 3 - 1}, r"labels\[0\] is -1, outside 0 to 2 \(4 such"),
    "label huge": ({"labels": np.full(12, 2**63, np.uint64)}, r"labels\[0\] is 9223372036854775808"),
    "class missing": ({"labels": np.arange(12) % 2}, "class 2 has 0 training images, and 1 classes have < 2"),
    "class with one": ({"labels": np.array([2] + [0, 1] * 5 + [0])}, "class 2 has 1 training images"),
    "pickled": ({"labels": np.array([None] * 12)}, "cannot be read as .npz: ValueError"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_named(tmp_path: Path, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ContentError, match=message) as error:
        read_npz_folder(SPEC, write(tmp_path, **changes), NAMES)
    assert str(tmp_path / "train.npz") in error.value.what
    assert error.value.todo


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pictures=np.zeros(3))
    with pytest.raises(ContentError, match=r"x\.npz has no array 'images', only pictures"):
        read_npz(tmp_path / "x.npz", "images", "labels")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-10],
    "text": lambda content: b"<html>404</html>",
    "flipped": lambda content: content[:600] + bytes([content[600] ^ 255]) + content[601:],
    "one array": lambda content: b"\x93NUMPY" + content,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path) / "train.npz"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ContentError, match=re.escape(f"{path} cannot be read as .npz")):
        read_npz(path, "images", "labels")


def test_a_single_array_is_no_npz(tmp_path: Path) -> None:
    with (tmp_path / "train.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ContentError, match=r"cannot be read as \.npz"):
        read_npz(tmp_path / "train.npz", "images")


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    (write(tmp_path) / "test.npz").unlink()
    with pytest.raises(UsageError, match=r"test\.npz does not exist"):
        read_npz_folder(SPEC, tmp_path, NAMES)


def test_resize_keeps_flat_pictures_and_interpolates_others() -> None:
    flat = np.full((2, 8, 8, 3), (10, 20, 30), np.uint8)
    np.testing.assert_array_equal(resize(flat, 16), np.full((2, 16, 16, 3), (10, 20, 30), np.uint8))
    assert resize(flat, 8) is flat
    ramp = np.zeros((1, 2, 2, 3), np.uint8)
    ramp[:, :, 1] = 200
    # Bilinear, pixel centres at (i + 0.5) / 2 − 0.5: a quarter and three quarters of the way between the two columns.
    assert resize(ramp, 4)[0, 0, :, 0].tolist() == [0, 50, 150, 200]


def test_resize_refuses_what_memory_cannot_hold() -> None:
    images = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10**9, 32, 32, 3), (0, 0, 0, 0))
    with pytest.raises(MachineError, match="1000000000 images at 224 pixels need 150528"):
        resize(images, 224)
