"""What every image and label array must be, whoever made it. `where` in the messages names the file and the array."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polar_deploy.data.dataset import Labels, Pixels
from polar_deploy.errors import ContentError

_REWRITE = "write the file again with images uint8 [N, H, W, 3] and labels int [N]"


def as_array(values: object, where: str) -> npt.NDArray[Any]:
    """`values` as an array; ContentError where they are lists of unequal lengths."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ContentError(f"{where} is no array: {error}", _REWRITE) from error


def check_images(images: npt.NDArray[Any], where: str) -> Pixels:
    """`images` itself, if it is uint8 [N, H, H, 3] with N ≥ 1; else ContentError."""
    shape = list(images.shape)
    if images.dtype != np.uint8:
        raise ContentError(f"{where} is {images.dtype}, not uint8 (0 to 255)", _REWRITE)
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ContentError(f"{where} has the shape {shape}, not [N, H, W, 3]", _REWRITE)
    if shape[1] != shape[2]:
        raise ContentError(f"{where} has pictures of {shape[1]} × {shape[2]} pixels", "crop or pad them to squares")
    return images


def check_labels(labels: npt.NDArray[Any], count: int, classes: int, where: str) -> Labels:
    """`labels` as int64 [count] with values 0 to classes − 1; else ContentError with the first bad one."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ContentError(f"{where} is {labels.dtype}, not an integer type", _REWRITE)
    if labels.shape != (count,):
        raise ContentError(f"{where} has the shape {list(labels.shape)}, but there are {count} images", _REWRITE)
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        problem = f"{where}[{bad[0]}] is {labels[bad[0]]}, outside 0 to {classes - 1} ({len(bad)} such labels)"
        raise ContentError(problem, "correct the labels, or name the data set that these files belong to")
    return labels.astype(np.int64)


def check_every_class(labels: Labels, classes: int, where: str, least: int = 2) -> None:
    """ContentError unless each class has `least` images; in a training set two, one to train on, one to validate."""
    counts = np.bincount(labels, minlength=classes)
    short = np.flatnonzero(counts < least)
    if len(short):
        kind = "training images" if least > 1 else "images"
        problem = f"{where}: class {short[0]} has {counts[short[0]]} {kind}, and {len(short)} classes have < {least}"
        raise ContentError(problem, "give each class more images, or name the data set that the files belong to")
