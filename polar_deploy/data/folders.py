"""Image folders, `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, decoded when they are asked for.

A picture is read as its owner sees it: the first frame, turned as EXIF says, transparent parts on white, 16-bit grey
scaled to 8 bit.
"""

from __future__ import annotations

import hashlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from polar_deploy.data.checks import check_every_class
from polar_deploy.data.dataset import Dataset, DataSpec, Indices, Labels, Pixels, Split
from polar_deploy.errors import ContentError, UsageError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Folders that file managers and tools leave behind; hidden ones are known by their dot.
_NO_CLASSES = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_BACKGROUND = (255, 255, 255)  # of transparent pictures
_ORIENTATION = 0x0112  # EXIF's tag; what brings each of its values upright:
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What stands at the end of a whole file. WebP needs none, since opening it fails if it is cut short.
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "WEBP": b""}
_TAIL = 64  # bytes in which the mark is looked for
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

    def check(self) -> None:
        """Look at every file's header and last bytes, without decoding; ContentError names those that are no pictures.

        Where the last bytes do not tell (a file that seems cut short; GIF, TIFF, BMP, PPM), it is decoded after all.
        """
        broken = [error for error in self._pool.map(self._problem, self.files) if error]
        if broken:
            more = f" ({len(broken)} files in all are no sound pictures)" if len(broken) > 1 else ""
            raise ContentError(broken[0].what + more, broken[0].todo)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        Image.init()  # else each thread does so when it meets a rarer format, and some take it for unknown meanwhile
        return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode")

    def _problem(self, name: str) -> ContentError | None:
        try:
            with _opened(self.root / name) as stored:
                mark = _END_MARKS.get(stored.format or "")
                if mark is None or mark not in _tail(self.root / name):
                    stored.load()
        except ContentError as error:
            return error
        except Exception as error:  # noqa: BLE001  # each of Pillow's decoders fails in its own way
            return _broken(self.root / name, error)
        return None

    def _decode(self, name: str) -> Pixels:
        try:
            with _opened(self.root / name) as stored:
                image = _upright_rgb(stored)
        except ContentError:
            raise
        except Exception as error:
            raise _broken(self.root / name, error) from error
        width, height = image.size
        if min(width, height) != self.shorter:
            scale = self.shorter / min(width, height)
            width, height = max(int(width * scale), self.shorter), max(int(height * scale), self.shorter)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


def _opened(path: Path) -> Image.Image:
    """The picture in a file, of which only the header is read; ContentError if its values have no known range."""
    image = Image.open(path)
    # Pillow widens 16-bit PNG and PGM to its mode I; in a TIFF that is 32 bits, of which any part may be used.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        image.close()
        kind = "floating-point" if image.mode == "F" else "32-bit"
        problem = f"{path} has {kind} grey values, whose range is not known"
        raise ContentError(problem, "save it with 8 or 16 bits a value")
    return image


def _broken(path: Path, error: Exception) -> ContentError:
    problem = f"{path} cannot be decoded: {type(error).__name__}: {one_line(error)}"
    return ContentError(problem, "replace the file or delete it")


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
        return file.read()


def _upright_rgb(stored: Image.Image) -> Image.Image:
    """A picture in mode RGB, as it is to be seen."""
    stored.load()  # before its orientation is asked for: Pillow turns a TIFF by itself
    turn = _UPRIGHT.get(_orientation(stored))
    image = _rgb(stored)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's value, 1 to 8; 1 (upright) where there is none, or where EXIF is damaged, which harms no pixel."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    """In mode RGB: 16-bit grey divided by 257, so that 65535 becomes 255; transparent parts on `_BACKGROUND`."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        narrow = (wide + 128) // 257
        narrow[wide == image.info.get("transparency", -1)] = _BACKGROUND[0]
        return Image.fromarray(narrow.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*_BACKGROUND, 255)), layer).convert("RGB")


def load_tiny_imagenet(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """Tiny ImageNet as published (`tiny-imagenet-200`), or with one folder a class; not cropped."""
    return image_folders(spec, _root(spec, data_dir, "tiny-imagenet-200"), shorter=spec.input_size)


def load_imagenet(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """ImageNet-1k with one folder a class; at 224 pixels, the shorter side is resized to 256."""
    return image_folders(spec, _root(spec, data_dir, "ILSVRC2012"), shorter=round(spec.input_size * 256 / 224))


def image_folders(spec: DataSpec, root: Path, shorter: int) -> Dataset:
    """The data set in `root`: `train/CLASS/` and `val/CLASS/` (or `test/`); labels count the sorted class names.

    Also a building block for the user's own data. Tiny ImageNet's `CLASS/images/` and `val/val_annotations.txt` are
    understood. `shorter` ≥ `spec.input_size`: pixels of the shorter side before the centre is cut out. Hidden files and
    folders are neither pictures nor classes. Every file's header is looked at.

    Raises:
        UsageError: `train` or `val` is missing.
        ContentError: another number of classes than `spec.classes`, classes that differ between the two, a class
            with fewer than two training images or no other, a file that is no sound picture.
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
    _check_filled(root / "train", train)
    _check_filled(root / ("val" if (root / "val").is_dir() else "test"), test)
    images = [_images(root, files, names, spec.input_size, shorter) for files in (train, test)]
    labels = [_labels(files, names) for files in (train, test)]
    check_every_class(labels[0], spec.classes, str(root / "train"))
    for each in images:
        each.check()
    return Dataset(spec, Split(images[0], labels[0]), Split(images[1], labels[1]), names)


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
    for folder in sorted(entry for entry in split.iterdir() if entry.is_dir() and _is_class(entry.name)):
        inner = folder / "images" if (folder / "images").is_dir() else folder
        relative = inner.relative_to(split.parent)
        files[folder.name] = [f"{relative}/{name}" for name in image_names(inner)]
    return files


def image_names(folder: Path) -> list[str]:
    """Names of the pictures that lie in a folder, sorted; hidden files, such as macOS's `._cat.jpg`, are none."""
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir()]
    return sorted(name for name in found if not name.startswith("."))


def _is_class(folder: str) -> bool:
    return not folder.startswith(".") and folder not in _NO_CLASSES


def _check_filled(split: Path, files: dict[str, list[str]]) -> None:
    """ContentError if one of a split's class folders is empty."""
    empty = sorted(name for name, pictures in files.items() if not pictures)
    if empty:
        more = f" ({len(empty)} such folders)" if len(empty) > 1 else ""
        todo = f"put {', '.join(SUFFIXES)} files right into it, or delete the class in both folders"
        raise ContentError(f"{split / empty[0]} holds no pictures{more}", todo)


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


def _images(root: Path, files: dict[str, list[str]], names: tuple[str, ...], size: int, shorter: int) -> LazyImages:
    ordered = np.array([file for name in names for file in files[name]], dtype=object)
    return LazyImages(root, ordered, shorter, size)


def _labels(files: dict[str, list[str]], names: tuple[str, ...]) -> Labels:
    return np.repeat(np.arange(len(names)), [len(files[name]) for name in names]).astype(np.int64)
