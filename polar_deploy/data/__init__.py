"""Data sets by name, as numpy arrays. Nothing here needs torch.

A new data set is one line in `_TABLE`: what is known of it unread, and the function that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from polar_deploy.data import cifar, digits, folders, own
from polar_deploy.data.dataset import Dataset, DataSpec, LazySource, Split, normalise, split_validation
from polar_deploy.data.folders import image_folders
from polar_deploy.data.names import COCO, PAIRS, folder_of, is_reference, unknown
from polar_deploy.data.pictures import LazyImages
from polar_deploy.data.sound import sound
from polar_deploy.errors import UsageError

__all__ = [
    "DataSpec",
    "Dataset",
    "LazyImages",
    "LazySource",
    "Split",
    "image_folders",
    "listed",
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
        ContentError: a folder holds no classes.
    """
    if (folder := folder_of(name)) is not None:
        with readable():
            return folders.folder_spec((data_dir or Path()) / folder)
    if is_reference(name):
        return own.load(name, data_dir).spec
    for kind, holds, task in ((PAIRS, "masks", "segmentation"), (COCO, "boxes", "detection")):
        if folder_of(name, kind) is not None:
            raise UsageError(f"'{name}' is pictures and {holds}, which classify nothing", f"give --task {task}, too")
    if name not in _TABLE:
        if Path(name).is_dir():
            raise UsageError(f"there is no data set called '{name}', which is a folder", f"give --data folder:{name}")
        raise unknown("data set", name, [*_TABLE, "folder:DIR"])
    return _TABLE[name][0]


def load(
    name: str,
    data_dir: Path | None = None,
    *,
    input_size: int | None = None,
    download: bool = True,
    skip_broken: bool = False,
) -> Dataset:
    """Read the data set `name`, the pictures in "folder:DIR", or what the user's "package.module:function" gives.

    Args:
        name: as `--data` has it.
        data_dir: the folder to look in; None: `data` in the current folder, and for folder:DIR that one itself.
        input_size: pixels a side of the images; None: the data set's own.
        download: whether what is not there, and can be had, is fetched.
        skip_broken: whether files that are no sound pictures are left out.

    Raises:
        UsageError: there is no such data set, or nothing where it should be.
        ContentError: what is there is damaged or not what it should be.
        MachineError: the images do not fit into this machine's memory.
    """
    if is_reference(name):
        return sound(own.resized(own.load(name, data_dir), input_size), skip_broken=skip_broken)
    known = spec(name, data_dir)
    wanted = replace(known, input_size=input_size or known.input_size)
    with readable():
        return sound(_loader(name, download=download)(wanted, data_dir), skip_broken=skip_broken)


def listed(name: str, data_dir: Path | None = None) -> Dataset | None:
    """The pictures of "folder:DIR" by the names of their files, none of them read; None: another data set.

    Raises:
        As `load`.
    """
    if folder_of(name) is None:
        return None
    with readable():
        return _loader(name, download=False)(spec(name, data_dir), data_dir)


@contextmanager
def readable() -> Iterator[None]:
    """Turns the system's refusal to read into ours."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error


def _loader(name: str, *, download: bool) -> Loader:
    if (folder := folder_of(name)) is not None:
        return lambda spec, data_dir: folders.load_folder(spec, (data_dir or Path()) / folder)
    loader = _TABLE[name][1]
    return cifar.load_stored if loader is cifar.load and not download else loader
