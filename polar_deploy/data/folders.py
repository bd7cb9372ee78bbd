"""Data sets that are folders of pictures: one folder a class, in `train` and `val`, or in one place."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from polar_deploy.data.checks import check_every_class
from polar_deploy.data.dataset import Dataset, DataSpec, Split
from polar_deploy.data.pictures import LazyImages
from polar_deploy.errors import ContentError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Folders that file managers and tools leave behind; hidden ones are known by their dot.
_NO_CLASSES = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
VALIDATION = ("val", "valid", "validation")
_TEST_SHARE = 0.2  # of every class of a folder that has no `val` and no `test`
_SPLIT_SEED = "polar_deploy"  # of that share: the same pictures in every run, whatever the run's seed
_STEPS = 4  # of an epoch at least, however small the folder
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

TINY_IMAGENET = DataSpec("tiny-imagenet", 200, 64, IMAGENET_MEAN, IMAGENET_STD, flip=True, crop_padding=8, epochs=100)
IMAGENET = DataSpec(
    "imagenet", 1000, 224, IMAGENET_MEAN, IMAGENET_STD, flip=True, crop_padding=28, epochs=90, crop_scale=0.08
)
# Of a user's folder. Crops hold more than ImageNet's do: few pictures and short runs are common.
_FOLDER = replace(IMAGENET, name="folder", epochs=100, crop_scale=0.35)

FilesByClass: TypeAlias = dict[str, list[str]]  # names relative to the root of the data set


@dataclass(frozen=True)
class _Part:
    """One part of a data set, and the folder that holds its class folders."""

    folder: Path
    files: FilesByClass


def load_tiny_imagenet(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """Tiny ImageNet as published (`tiny-imagenet-200`), or with one folder a class; not cropped."""
    return image_folders(spec, _root(spec, data_dir, "tiny-imagenet-200"), shorter=spec.input_size)


def load_imagenet(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """ImageNet-1k with one folder a class; at 224 pixels, the shorter side is resized to 256."""
    return image_folders(spec, _root(spec, data_dir, "ILSVRC2012"), shorter=_shorter(spec))


def folder_spec(root: Path) -> DataSpec:
    """What is known of the user's own folder from the names in it: as many classes as there are folders for them.

    Raises:
        UsageError: there is no such folder.
        ContentError: there are no two class folders in it.
    """
    classes = _class_folders(_parts(root)["train"])
    return replace(_FOLDER, classes=len(classes), batch_size=_batch_size(classes))


def load_folder(spec: DataSpec, root: Path) -> Dataset:
    """The user's own folder; at 224 pixels, the shorter side is resized to 256.

    `root` holds one folder a class, of which a fifth of each class is the test set; or `train`, and beside it `val`,
    `test`, or both, with one folder a class each. The test set is `test`, else `val`; where there are both, `val`
    validates. Pictures may lie deeper in a class's folder.

    Raises:
        As `folder_spec` and `image_folders`.
    """
    parts = {name: _part(folder, root) for name, folder in _parts(root).items()}
    if "test" not in parts:
        parts["train"], parts["test"] = _split(parts["train"])
    return _dataset(spec, root, parts, _shorter(spec))


def image_folders(spec: DataSpec, root: Path, shorter: int) -> Dataset:
    """The data set in `root`: `train/CLASS/` and `val/CLASS/` (or `test/`); labels count the sorted class names.

    Also a building block for the user's own data. Tiny ImageNet's `val/val_annotations.txt` is understood. `shorter` ≥
    `spec.input_size`: pixels of the shorter side before the centre is cut out. Hidden files and folders are neither
    pictures nor classes.

    Raises:
        UsageError: `train` or `val` is missing.
        ContentError: another number of classes than `spec.classes`, classes that differ between the two, a class
            with fewer than two training images or no other.
    """
    if not (root / "train").is_dir():
        raise UsageError(f"{root} has no folder 'train'", "give it train/CLASS/*.jpg and val/CLASS/*.jpg")
    return _dataset(spec, root, {"train": _part(root / "train", root), "test": _test_part(root)}, shorter)


def image_names(folder: Path) -> list[str]:
    """The pictures in a folder and the folders in it, by their names in it, sorted; hidden ones are left out."""
    found, seen = [], set()  # links may lead in circles
    for path, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(path))
        folders[:] = [name for name in folders if _is_class(name) and os.path.realpath(f"{path}/{name}") not in seen]
        inner = Path(path).relative_to(folder).as_posix()
        before = "" if inner == "." else f"{inner}/"
        found += [before + name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def _shorter(spec: DataSpec) -> int:
    """What the shorter side is resized to before the centre is cut out, as it is usual for ImageNet."""
    return round(spec.input_size * 256 / 224)


def _root(spec: DataSpec, data_dir: Path | None, published: str) -> Path:
    parent = data_dir or Path("data")
    folders = [parent / spec.name, parent / published, parent]
    for folder in folders:
        if (folder / "train").is_dir():
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    todo = "put train/CLASS/*.jpg and val/CLASS/*.jpg there, or name their folder with --data-dir"
    raise UsageError(f"{spec.name} is not there: no folder 'train' in {looked}", todo)


def _parts(root: Path) -> dict[str, Path]:
    """Where the parts of a user's folder lie: "train", and as far as they are there "validation" and "test"."""
    todo = "give one folder a class, DIR/CLASS/*.jpg, or DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg"
    if not root.is_dir():
        raise UsageError(f"there is no folder {root}", todo)
    names = {folder.name for folder in _class_folders(root)}
    if "train" not in names or not names <= {"train", "test", *VALIDATION}:  # a class may be called "train"
        parts = {"train": root}
    else:
        held = {name: root / name for name in ("test", *VALIDATION) if name in names and _class_folders(root / name)}
        missing = sorted(names - {"train", *held})
        if missing and not held:
            raise ContentError(f"{root / missing[0]} holds no class folders", todo)
        parts = dict(zip(("test", "validation"), held.values(), strict=False)) | {"train": root / "train"}
    if len(_class_folders(parts["train"])) < 2:
        problem = f"{parts['train']} has {len(_class_folders(parts['train']))} class folders, a network tells two apart"
        raise ContentError(problem, todo)
    return parts


def _batch_size(classes: list[Path]) -> int:
    """A power of two from 8 to 128, with which an epoch has four steps at least: few pictures shall not mean few steps.

    Of a folder with very many pictures not all are counted.
    """
    pictures, enough = 0, 2 * _STEPS * _FOLDER.batch_size
    for folder in classes:
        pictures += len(image_names(folder))
        if pictures >= enough:
            break
    steps = pictures * (1 - _TEST_SHARE) * 0.9 / _STEPS  # a tenth validates
    return max(8, min(_FOLDER.batch_size, 1 << int(math.log2(max(1, steps)))))


def _class_folders(split: Path) -> list[Path]:
    return sorted(entry for entry in split.iterdir() if entry.is_dir() and _is_class(entry.name))


def _is_class(folder: str) -> bool:
    return not folder.startswith(".") and folder not in _NO_CLASSES


def _part(folder: Path, root: Path) -> _Part:
    files = {
        each.name: [f"{each.relative_to(root).as_posix()}/{name}" for name in image_names(each)]
        for each in _class_folders(folder)
    }
    return _Part(folder, files)


def _split(whole: _Part) -> tuple[_Part, _Part]:
    """Training and test set."""
    train, test = {}, {}
    for name, files in whole.files.items():
        if len(files) < 3:
            problem = f"{whole.folder / name} holds {len(files)} pictures: two to train on and one to test are needed"
            raise ContentError(problem, f"put {', '.join(SUFFIXES)} files into it, or take the folder away")
        chosen = drawn_for_test(files)
        train[name], test[name] = sorted({*files} - chosen), sorted(chosen)
    return _Part(whole.folder, train), _Part(whole.folder, test)


def drawn_for_test(files: Sequence[str]) -> set[str]:
    """A fifth of some files. A file's name decides, so that more files leave nearly all others where they are."""

    def drawn(name: str) -> bytes:
        return hashlib.sha256(f"{_SPLIT_SEED}/{name}".encode()).digest()

    return {*sorted(files, key=drawn)[: max(1, round(_TEST_SHARE * len(files)))]}


def _test_part(root: Path) -> _Part:
    for split in (root / "val", root / "test"):
        if (split / "val_annotations.txt").is_file():
            return _Part(split, _annotated(split))
        if split.is_dir():
            return _part(split, root)
    raise UsageError(f"{root} has neither 'val' nor 'test'", "give it val/CLASS/*.jpg")


def _annotated(split: Path) -> FilesByClass:
    """Tiny ImageNet's validation files: one a line, its name, its class, and a box, with tabs in between."""
    annotations, present = split / "val_annotations.txt", set(image_names(split / "images"))
    files: FilesByClass = {}
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        name, _, rest = line.partition("\t")
        if name not in present or not rest:
            problem = f"{annotations}, line {number}: '{line[:60]}' is not an image of images/ and its class"
            raise ContentError(problem, "unpack the published archive again")
        files.setdefault(rest.split("\t")[0], []).append(f"{split.name}/images/{name}")
    return files


def _dataset(spec: DataSpec, root: Path, parts: dict[str, _Part], shorter: int) -> Dataset:
    """Of the parts "train", "test" and, where it is there, "validation", which is among the training images."""
    folder, files = parts["train"].folder, parts["train"].files
    names = tuple(sorted(files))
    if len(names) != spec.classes:
        problem = f"{folder} has {len(names)} class folders, {spec.name} has {spec.classes} classes"
        raise ContentError(problem, "name the folder with --data-dir that holds the whole data set")
    for kind, part in parts.items():
        different = sorted({*names} ^ {*part.files})
        if different:
            problem = f"in {root}, training and {kind} classes differ in {len(different)}, first in '{different[0]}'"
            raise ContentError(problem, "give both the same class folders")
        _check_filled(part)
    validation = parts["validation"].files if "validation" in parts else {name: [] for name in names}
    learned = {name: files[name] + validation[name] for name in names}
    held = [number >= len(files[name]) for name in names for number in range(len(learned[name]))]
    train, test = (_lazy(root, each, names, spec.input_size, shorter) for each in (learned, parts["test"].files))
    check_every_class(train.labels, spec.classes, str(folder))
    return Dataset(spec, train, test, names, validation=np.flatnonzero(held) if any(held) else None)


def _check_filled(part: _Part) -> None:
    """ContentError if one of a part's class folders is empty."""
    empty = sorted(name for name, pictures in part.files.items() if not pictures)
    if empty:
        more = f" ({len(empty)} such folders)" if len(empty) > 1 else ""
        todo = f"put {', '.join(SUFFIXES)} files into it, or delete the class in all parts"
        raise ContentError(f"{part.folder / empty[0]} holds no pictures{more}", todo)


def _lazy(root: Path, files: FilesByClass, names: tuple[str, ...], size: int, shorter: int) -> Split:
    ordered = np.array([file for name in names for file in files[name]], dtype=object)
    labels = np.repeat(np.arange(len(names)), [len(files[name]) for name in names]).astype(np.int64)
    return Split(LazyImages(root, ordered, shorter, size), labels)
