"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009): torchvision's folder, its archive, an `.npz` pair, or a download."""

from __future__ import annotations

import hashlib
import logging
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polar_deploy.data.arrays import read_npz_folder, resize
from polar_deploy.data.checks import as_array, check_every_class, check_images, check_labels
from polar_deploy.data.dataset import Dataset, DataSpec, Split
from polar_deploy.data.pickles import read_pickle
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.workspace import atomic_path

_SERVER = "https://www.cs.toronto.edu/~kriz/"
_TIMEOUT = 10  # seconds without an answer
_NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
_NAMES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layout:
    """Where the published files are; `md5` is the archive's, as torchvision has it."""

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    class_names: tuple[str, ...]


CIFAR10 = DataSpec(
    "cifar10",
    classes=10,
    input_size=32,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    flip=True,
    crop_padding=4,
    epochs=100,
)
CIFAR100 = DataSpec(
    "cifar100",
    classes=100,
    input_size=32,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    flip=True,
    crop_padding=4,
    epochs=100,
)
_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        tuple(f"data_batch_{part}" for part in range(1, 6)),
        ("test_batch",),
        "labels",
        tuple(_NAMES_10.split()),
    ),
    "cifar100": _Layout(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("train",),
        ("test",),
        "fine_labels",
        tuple(_NAMES_100.split()),
    ),
}


def load(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """The data set `spec.name` in `data_dir` (default `data`); where it is not there, it is downloaded to it.

    Raises:
        UsageError: `data_dir` was named but does not exist, or nothing is in it and the download failed.
        ContentError: what is there is damaged, hostile, or another data set.
    """
    found = _stored(spec, data_dir)
    if found is None:
        root = data_dir or Path("data")
        _download(spec, root / _LAYOUTS[spec.name].archive)
        return load(spec, root)
    return found


def load_stored(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """As `load`, but a UsageError where it would have to be downloaded."""
    found = _stored(spec, data_dir)
    if found is None:
        raise UsageError(f"{spec.name} is not in {data_dir or 'data'}", f"put {_expected(spec)} there")
    return found


def _stored(spec: DataSpec, data_dir: Path | None) -> Dataset | None:
    root, layout = data_dir or Path("data"), _LAYOUTS[spec.name]
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"the data folder {data_dir} does not exist", f"create it with {_expected(spec)}")
    for folder in (root / spec.name, root):
        if (folder / layout.folder).is_dir():
            return _read_batches(spec, _from_folder(folder / layout.folder, layout), folder / layout.folder)
        if (folder / layout.archive).is_file():
            return _read_batches(spec, _from_archive(folder / layout.archive, layout), folder / layout.archive)
        if (folder / "train.npz").exists() or (folder / "test.npz").exists():
            return read_npz_folder(spec, folder, layout.class_names)
    return None


def _expected(spec: DataSpec) -> str:
    layout = _LAYOUTS[spec.name]
    return f"{layout.folder}/, {layout.archive} (from {_SERVER}), or train.npz and test.npz in it"


def _from_folder(folder: Path, layout: _Layout) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in layout.train + layout.test if (folder / name).is_file()}


def _from_archive(archive: Path, layout: _Layout) -> dict[str, bytes]:
    wanted = {f"{layout.folder}/{name}": name for name in layout.train + layout.test}
    files = {}
    try:
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                content = members.extractfile(member) if member.name in wanted else None
                if content is not None:
                    files[wanted[member.name]] = content.read()
    except Exception as error:  # tarfile, gzip and zlib each have errors of their own
        problem = f"{archive} cannot be read: {type(error).__name__}: {error}"
        raise ContentError(problem, "delete it, so that it is downloaded again") from error
    return files


def _read_batches(spec: DataSpec, files: Mapping[str, bytes], where: Path) -> Dataset:
    layout = _LAYOUTS[spec.name]
    missing = [name for name in layout.train + layout.test if name not in files]
    if missing:
        raise ContentError(f"{where} lacks {', '.join(missing)}", f"unpack {layout.archive} from {_SERVER} again")
    train, test = (_read_split(spec, names, files, where) for names in (layout.train, layout.test))
    check_every_class(train.labels, spec.classes, str(where))
    return Dataset(spec, train, test, layout.class_names)


def _read_split(spec: DataSpec, names: tuple[str, ...], files: Mapping[str, bytes], where: Path) -> Split:
    images, labels = [], []
    for name in names:
        place, key = f"{where}/{name}", _LAYOUTS[spec.name].labels
        batch = read_pickle(files[name], place)
        pixels = _entry(batch, "data", place)
        if pixels.ndim != 2 or pixels.shape[1] != 3 * 32 * 32:
            problem = f"{place}: data has the shape {list(pixels.shape)}, not [N, 3072]"
            raise ContentError(problem, "get the published file again")
        images.append(check_images(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), f"{place}: data"))
        labels.append(check_labels(_entry(batch, key, place), len(pixels), spec.classes, f"{place}: {key}"))
    return Split(resize(np.ascontiguousarray(np.concatenate(images)), spec.input_size), np.concatenate(labels))


def _entry(batch: dict[str, Any], key: str, where: str) -> npt.NDArray[Any]:
    if key not in batch:
        raise ContentError(f"{where} has no entry '{key}'", "get the published file again")
    return as_array(batch[key], f"{where}: {key}")


def _download(spec: DataSpec, archive: Path) -> None:
    import http.client
    import urllib.request

    layout = _LAYOUTS[spec.name]
    todo = f"put {_expected(spec)}, or name another folder with --data-dir"
    _log.info("downloading %s%s (170 MB) to %s", _SERVER, layout.archive, archive.parent)
    try:
        with urllib.request.urlopen(_SERVER + layout.archive, timeout=_TIMEOUT) as answer:
            content: bytes = answer.read()
    except (OSError, http.client.HTTPException) as error:
        problem = f"{spec.name} is not in {archive.parent.resolve()}, and its download from {_SERVER} failed: {error}"
        raise UsageError(problem, todo) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != layout.md5:
        problem = f"{_SERVER}{layout.archive} came with the MD5 {found}, not {layout.md5}, and was thrown away"
        raise ContentError(problem, todo)
    with atomic_path(archive) as path:
        path.write_bytes(content)
