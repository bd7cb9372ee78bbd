"""Data sets by name, as numpy arrays. Nothing here needs torch.

A new data set is one line in `_TABLE`: what is known of it unread, and the function that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from polar_deploy.data import cifar, digits, folders, own
from polar_deploy.data.dataset import Dataset, DataSpec, LazySource, Split, normalise, split_validation
from polar_deploy.data.folders import LazyImages, image_folders
from polar_deploy.data.names import is_reference, unknown
from polar_deploy.errors import UsageError

__all__ = [
    "DataSpec",
    "Dataset",
    "LazyImages",
    "LazySource",
    "Split",
    "image_folders",
    "load",
    "normalise",
    "spec",
    "split_validation",
]

Loader: TypeAlias = Callable[[DataSpec, Path | None], Dataset]

_TABLE: dict[str, tuple[DataSpec, Loader]] = {
    "digits": (digits.SPEC, digits.load),
    "cifar10": (cifar.CIFAR10, cifar.load),
    "cifar100": (cifar.CIFAR100, cifar.load),
    "tiny-imagenet": (folders.TINY_IMAGENET, folders.load_tiny_imagenet),
    "imagenet": (folders.IMAGENET, folders.load_imagenet),
}


def spec(name: str, data_dir: Path | None = None) -> DataSpec:
    """What is known of the data set `name` without reading it; only the user's own function has to be called.

    Raises:
        UsageError: there is no such data set.
    """
    if is_reference(name):
        return own.load(name, data_dir).spec
    if name not in _TABLE:
        raise unknown("data set", name, _TABLE)
    return _TABLE[name][0]


def load(name: str, data_dir: Path | None = None, *, input_size: int | None = None, download: bool = True) -> Dataset:
    """Read the data set `name`, or call the user's "package.module:function" for it.

    Args:
        data_dir: the folder to look in; None: `data` in the current folder.
        input_size: pixels a side of the images; None: the data set's own.
        download: whether what is not there, and can be had, is fetched.

    Raises:
        UsageError: there is no such data set, or nothing where it should be.
        ContentError: what is there is damaged or not what it should be.
        MachineError: the images do not fit into this machine's memory.
    """
    if is_reference(name):
        return own.resized(own.load(name, data_dir), input_size)
    known = spec(name)
    loader = _TABLE[name][1]
    if loader is cifar.load and not download:
        loader = cifar.load_stored
    try:
        return loader(replace(known, input_size=input_size or known.input_size), data_dir)
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error
