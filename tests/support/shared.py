"""What tests take from `../shared`, where a checkout has it beside itself; the product never looks there."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared is not beside this checkout")
_STRIP = 500  # images in each WebP picture


def cifar_folder(tmp_path: Path, name: str, train_limit: int | None = None, test_limit: int | None = None) -> Path:
    """Write `train.npz` and `test.npz` of "cifar10" or "cifar100" to `tmp_path` / `name`, and return that folder.

    A limit takes so many images, the first ones of each class, spread evenly over the classes.
    """
    folder = tmp_path / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, limit in (("train", train_limit), ("test", test_limit)):
        images, labels = cifar_split(name, split, limit)
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return folder


def cifar_split(name: str, split: str, limit: int | None = None) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images uint8 [N, 32, 32, 3] and labels [N] of one split, in class order; only the strips needed are decoded."""
    images, labels, parts = [], [], sorted((SHARED / "data" / name).glob(f"{split}*.npz"))
    for part in parts:
        with np.load(part) as stored:
            blob, offsets, classes = stored["webp"].tobytes(), stored["offsets"], stored["labels"].astype(np.int64)
        chosen = _first_of_each_class(classes, limit, 10 if name == "cifar10" else 100)
        for strip in np.unique(chosen // _STRIP):
            picture = Image.open(io.BytesIO(blob[offsets[strip] : offsets[strip + 1]])).convert("RGB")
            inside = chosen[chosen // _STRIP == strip] - strip * _STRIP
            images.append(np.asarray(picture).reshape(-1, 32, 32, 3)[inside])
        labels.append(classes[chosen])
    return np.concatenate(images), np.concatenate(labels)


def _first_of_each_class(labels: npt.NDArray[np.int64], limit: int | None, classes: int) -> npt.NDArray[np.intp]:
    """Indices, sorted; a class lies in one part, so that parts can be chosen from one by one."""
    if limit is None:
        return np.arange(len(labels))
    share, rest = divmod(limit, classes)
    chosen = [np.flatnonzero(labels == label)[: share + (label < rest)] for label in np.unique(labels)]
    return np.concatenate(chosen)
