"""Image folders, `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, decoded when they are asked for."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from polar_deploy.data.checks import check_every_class
from polar_deploy.data.dataset import Dataset, DataSpec, Indices, Pixels, Split
from polar_deploy.errors import ContentError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

TINY_IMAGENET = DataSpec("tiny-imagenet", 200, 64, _IMAGENET_MEAN, _IMAGENET_STD, flip=True, crop_padding=8, epochs=100)
IMAGENET = DataSpec("imagenet", 1000, 224, _IMAGENET_MEAN, _IMAGENET_STD, flip=True, crop_padding=28, epochs=90)


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Images of which only the names are in memory: `images[indices]` decodes, uint8 [B, size, size, 3].

    Args:
        root: folder that `files`, an array of names, belong to.
        shorter: pixels that an image's shorter side is resized to (bilinear), before
        size: pixels a side are cut out of its centre.
    """

    root: Path
    files: np.ndarray[tuple[int], np.dtype[np.object_]]
    shorter: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, size, size, 3]"""
        return (len(self.files), self.size, self.size, 3)

    def __getitem__(self, index: Indices) -> Pixels:
        """Decode the chosen images on a few threads; ContentError names the file that cannot be decoded."""
        chosen = self.files[index]
        batch = np.empty((len(chosen), self.size, self.size, 3), np.uint8)
        for position, pixels in enumerate(self._pool.map(self._decode, chosen)):
            batch[position] = pixels
        return batch

    def fingerprint(self) -> str:
        """SHA-256 of sizes and of every file's name and length in bytes."""
        digest = hashlib.sha256(f"{self.shorter} {self.size}".encode())
        for name in self.files:
            digest.update(f"\n{name} {os.stat(self.root / name).st_size}".encode())
        return digest.hexdigest()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def _decode(self, name: str) -> Pixels:
        try:
            with Image.open(self.root / name) as stored:
                image = stored.convert("RGB")
        except Exception as error:  # each of Pillow's decoders fails in its own way
            problem = f"{self.root / name} cannot be decoded: {type(error).__name__}: {error}"
            raise ContentError(problem, "replace the file or delete it") from error
        width, height = image.size
        if min(width, height) != self.shorter:
            scale = self.shorter / min(width, height)
            width, height = max(int(width * scale), self.shorter), max(int(height * scale), self.shorter)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


def load_tiny_imagenet(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """Tiny ImageNet as published (`tiny-imagenet-200`), or with one folder a class; not cropped."""
    return image_folders(spec, _root(spec, data_dir, "tiny-imagenet-200"), shorter=spec.input_size)


def load_imagenet(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """ImageNet-1k with one folder a class; at 224 pixels, the shorter side is resized to 256."""
    return image_folders(spec, _root(spec, data_dir, "ILSVRC2012"), shorter=round(spec.input_size * 256 / 224))


def image_folders(spec: DataSpec, root: Path, shorter: int) -> Dataset:
    """The data set in `root`: `train/CLASS/` and `val/CLASS/` (or `test/`); labels count the sorted class names.

    Also a building block for the user's own data. Tiny ImageNet's `CLASS/images/` and `val/val_annotations.txt` are
    understood. `shorter` ≥ `spec.input_size`: pixels of the shorter side before the centre is cut out.

    Raises:
        UsageError: `train` or `val` is missing.
        ContentError: another number of classes than `spec.classes`, classes that differ between the two, a class
            with fewer than two training images.
    """
    if not (root / "train").is_dir():
        raise UsageError(f"{root} has no folder 'train'", "give it train/CLASS/*.jpg and val/CLASS/*.jpg")
    train, test = _files_by_class(root / "train"), _test_files(root)
    if len(train) != spec.classes:
        problem = f"{root / 'train'} has {len(train)} class folders, {spec.name} has {spec.classes} classes"
        raise ContentError(problem, "name the folder with --data-dir that holds the whole data set")
    different = sorted(set(train) ^ set(test))
    if different:
        problem = f"in {root}, training and test classes differ in {len(different)}, first in '{different[0]}'"
        raise ContentError(problem, "give both the same class folders")
    names = tuple(sorted(train))
    splits = [_split(root, files, names, spec.input_size, shorter) for files in (train, test)]
    check_every_class(splits[0].labels, spec.classes, str(root / "train"))
    return Dataset(spec, splits[0], splits[1], names)


def _root(spec: DataSpec, data_dir: Path | None, published: str) -> Path:
    parent = data_dir or Path("data")
    folders = [parent / spec.name, parent / published, parent]
    for folder in folders:
        if (folder / "train").is_dir():
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    todo = "put train/CLASS/*.jpg and val/CLASS/*.jpg there, or name their folder with --data-dir"
    raise UsageError(f"{spec.name} is not there: no folder 'train' in {looked}", todo)


def _files_by_class(split: Path) -> dict[str, list[str]]:
    files = {}
    for folder in sorted(entry for entry in split.iterdir() if entry.is_dir()):
        inner = folder / "images" if (folder / "images").is_dir() else folder
        relative = inner.relative_to(split.parent)
        files[folder.name] = [f"{relative}/{name}" for name in image_names(inner)]
    return files


def image_names(folder: Path) -> list[str]:
    """Names of the pictures that lie in a folder, sorted."""
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES))


def _test_files(root: Path) -> dict[str, list[str]]:
    for split in (root / "val", root / "test"):
        if (split / "val_annotations.txt").is_file():
            return _annotated(split)
        if split.is_dir():
            return _files_by_class(split)
    raise UsageError(f"{root} has neither 'val' nor 'test'", "give it val/CLASS/*.jpg")


def _annotated(split: Path) -> dict[str, list[str]]:
    """Tiny ImageNet's validation files: one a line, its name, its class, and a box, with tabs in between."""
    annotations, present = split / "val_annotations.txt", set(image_names(split / "images"))
    files: dict[str, list[str]] = {}
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        if name not in present or not rest:
            problem = f"{annotations}, line {number}: '{line[:60]}' is not an image of images/ and its class"
            raise ContentError(problem, "unpack the published archive again")
        files.setdefault(rest.split("\t")[0], []).append(f"{split.name}/images/{name}")
    return files


def _split(root: Path, files: dict[str, list[str]], names: tuple[str, ...], size: int, shorter: int) -> Split:
    ordered = np.array([file for name in names for file in files[name]], dtype=object)
    labels = np.repeat(np.arange(len(names)), [len(files[name]) for name in names])
    return Split(LazyImages(root, ordered, shorter, size), labels.astype(np.int64))
