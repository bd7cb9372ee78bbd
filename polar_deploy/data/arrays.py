"""Arrays in `.npz` files, and pictures in memory that change their size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from polar_deploy.data.checks import check_every_class, check_images, check_labels
from polar_deploy.data.dataset import Dataset, DataSpec, Pixels, Split
from polar_deploy.errors import ContentError, MachineError, UsageError


def read_npz(path: Path, *names: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays called `names` (all of them where none is given) of an `.npz` file.

    Raises:
        UsageError: there is no such file.
        ContentError: it is damaged, no `.npz`, holds pickled objects, or lacks one of `names`.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file", "check the path")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            missing = [name for name in names if name not in stored]
            found = list(stored)
            arrays = {} if missing else {name: stored[name] for name in names or found}
    except Exception as error:  # a damaged file fails in zipfile, zlib, numpy's header parser and more
        problem = f"{path} cannot be read as .npz: {type(error).__name__}: {error}"
        raise ContentError(problem, "write it again with numpy.savez; a copy may have been cut short") from error
    if missing:
        problem = f"{path} has no array '{missing[0]}', only {', '.join(found) or 'nothing'}"
        raise ContentError(problem, f"save {' and '.join(names)} in it with numpy.savez")
    return arrays


def read_npz_folder(spec: DataSpec, folder: Path, class_names: tuple[str, ...]) -> Dataset:
    """The data set in `folder`: `train.npz` and `test.npz`, each `images` uint8 [N, H, H, 3] and `labels` int [N]."""
    train, test = (_read_split(spec, folder / f"{part}.npz") for part in ("train", "test"))
    check_every_class(train.labels, spec.classes, str(folder / "train.npz"))
    return Dataset(spec, train, test, class_names)


def _read_split(spec: DataSpec, path: Path) -> Split:
    arrays = read_npz(path, "images", "labels")
    images = check_images(arrays["images"], f"{path}: images")
    labels = check_labels(arrays["labels"], len(images), spec.classes, f"{path}: labels")
    return Split(resize(images, spec.input_size), labels)


def resize(images: Pixels, size: int) -> Pixels:
    """`images` uint8 [N, H, H, 3] at `size` pixels a side, bilinear; itself where it has that size already.

    Raises:
        MachineError: the result would fill more than half of this machine's memory.
    """
    count, height = images.shape[:2]
    if height == size:
        return images
    needed, memory = count * size * size * 3, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory / 2:
        problem = f"{count} images at {size} pixels need {needed / 1e9:.1f} GB of this machine's {memory / 1e9:.1f} GB"
        raise MachineError(problem, f"choose a smaller --set input_size=…, at most {int((memory / 6 / count) ** 0.5)}")
    result = np.empty((count, size, size, 3), np.uint8)
    for index, image in enumerate(images):
        result[index] = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    return result
