"""Pictures and masks, paired by name: DIR/images and DIR/masks, or these in DIR/train and DIR/val."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from polar_deploy.data import moves
from polar_deploy.data.dataset import Indices, Pixels
from polar_deploy.data.decode import decode, decode_indices, problem, upright_size
from polar_deploy.data.folders import VALIDATION, image_names
from polar_deploy.data.parts import Found, PartedFolder, Sight, with_test
from polar_deploy.data.pictures import DETAIL, resized
from polar_deploy.data.threads import parallel
from polar_deploy.errors import ContentError, UsageError

IGNORED = 255  # a pixel of no class: neither learned from nor judged by
IMAGES, MASKS, CLASS_NAMES = "images", "masks", "classes.txt"
_LAYOUT = "give DIR/images and DIR/masks, or DIR/train/images, DIR/train/masks, DIR/val/images and DIR/val/masks"


class Pair(NamedTuple):
    """A picture and its mask, by their names relative to the root."""

    picture: str
    mask: str


@dataclass(frozen=True)
class PairFolder(PartedFolder[Pair]):
    """A folder of pictures and masks. Masks are in grey or have a palette; `IGNORED` belongs to no class.

    A picture's mask has its name but for the suffix, and the size of the picture as it is seen. `classes.txt` in the
    root names the classes, one a line; without it there are as many as the largest index says.
    """

    layout, held, beside = _LAYOUT, " with a mask", "their masks"
    broken = "such files in all", "files"
    dropped = "pairs", "a pair is left out:"

    @cached_property
    def classes(self) -> int:
        """How many there are."""
        if self.class_names:
            return len(self.class_names)
        present = self._present([pair for pairs in self.parts.values() for pair in pairs])
        classes = int(np.flatnonzero(present).max(initial=-1)) + 1
        if classes < 2:
            found = "class 0 alone" if classes else "no class"
            problem = f"the masks in {self.root} have {found} (and {IGNORED}, which is ignored): two are needed"
            raise ContentError(problem, "number the classes 0, 1, …; what is 255 in a mask of two values is 1 then")
        return classes

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """By index; (): there is no `classes.txt`."""
        path = self.root / CLASS_NAMES
        if not path.is_file():
            return ()
        names = tuple(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"))
        names = tuple(name.strip() for name in names)
        while names and not names[-1]:
            names = names[:-1]
        if not 2 <= len(names) <= IGNORED or "" in names:
            what = f"line {names.index('') + 1} is empty" if "" in names else f"{len(names)} names"
            raise ContentError(f"{path}: {what}", f"name each class once, one a line, from 2 to {IGNORED} of them")
        return names

    def _absent(self) -> list[str]:
        absent = np.flatnonzero(~self._present(self.parts["train"])[: self.classes])
        if not len(absent):
            return []
        return [f"{len(absent)} of {self.classes} classes are in no training mask, first class {absent[0]}"]

    @cached_property
    def _found(self) -> Found[Pair]:
        """As far as names tell."""
        folders = self._folders()
        parts: dict[str, list[Pair]] = {}
        problems: list[ContentError] = []
        unread: list[str] = []
        for name, folder in folders.items():
            pictures, masks = (_by_stem(self.root, folder / kind, problems) for kind in (IMAGES, MASKS))
            for stem in sorted({*pictures} - {*masks}):
                wanted = (folder / MASKS / stem).with_name(PurePosixPath(stem).name + ".png")
                what = f"{self.root / pictures[stem]} has no mask ({wanted})"
                problems.append(ContentError(what, "add the mask, or delete the picture"))
            unread += [masks[stem] for stem in sorted({*masks} - {*pictures})]
            parts[name] = [Pair(pictures[stem], masks[stem]) for stem in sorted({*pictures} & {*masks})]
        notes = [f"{len(unread)} masks have no picture, first {self.root / unread[0]}"] if unread else []
        return with_test(parts), problems, notes

    def _folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise UsageError(f"there is no folder {self.root}", _LAYOUT)
        folders = {"train": self.root}
        if not (self.root / IMAGES).is_dir():
            held = [self.root / name for name in ("test", *VALIDATION) if (self.root / name / IMAGES).is_dir()]
            folders = dict(zip(("test", "validation"), held, strict=False)) | {"train": self.root / "train"}
        for folder in folders.values():
            for kind in (IMAGES, MASKS):
                if not (folder / kind).is_dir():
                    raise ContentError(f"there is no folder {folder / kind}", _LAYOUT)
        return folders

    def _look(self, pair: Pair) -> Sight:
        """At the picture's header and the whole mask."""
        picture, path = self.root / pair.picture, self.root / pair.mask
        if (found := problem(picture, thorough=self.skip_broken)) is not None:
            return Sight(found)
        try:
            (width, height), turned = upright_size(picture)
            mask = decode_indices(path)
        except ContentError as error:
            return Sight(error)
        present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()
        if mask.shape != (height, width):
            upright = ", turned as its EXIF says" if turned else ""
            sizes = (
                f"{picture} has {width} × {height} pixels{upright}, its mask {path} {mask.shape[1]} × {mask.shape[0]}"
            )
            return Sight(ContentError(sizes, "give the mask the size of the picture as it is seen"), turned)
        largest = max((each for each in present if each < IGNORED), default=0)
        if self.class_names and largest >= len(self.class_names):
            what = f"{path} has class {largest}, but {CLASS_NAMES} names classes 0 to {len(self.class_names) - 1}"
            return Sight(ContentError(what, f"correct the mask, or name every class in {CLASS_NAMES}"), turned)
        return Sight(None, turned, present)

    def _present(self, pairs: Sequence[Pair]) -> npt.NDArray[np.bool_]:
        """Which indices occur in the masks of some pairs, [255]."""
        present = np.zeros(256, bool)
        for pair in pairs:
            present[list(self._seen[pair.picture].classes)] = True
        return present[:IGNORED]


def _by_stem(root: Path, folder: Path, problems: list[ContentError]) -> dict[str, str]:
    """The pictures in a folder, by their names without suffixes."""
    found: dict[str, str] = {}
    for name in image_names(folder):
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in found:
            what = f"{root / found[stem]} and {folder / name} have one name"
            problems.append(ContentError(what, "keep one of them"))
        else:
            found[stem] = f"{folder.relative_to(root).as_posix()}/{name}"
    return found


# --------------------------------------------------------------------------- pixels: RGB and index, uint8 [H, W, 4]


@dataclass(frozen=True, eq=False)
class LazyPairs:
    """Pictures with their masks, decoded when they are asked for: uint8 [H, W, 4], red, green, blue and class.

    Args:
        root: the folder that the pairs belong to.
        size: pixels a side, which pictures and masks are stretched to.
    """

    root: Path
    pairs: Sequence[Pair]
    size: int

    def plain(self, index: Indices) -> list[Pixels]:
        """The chosen ones, [size, size, 4] each."""
        return parallel(lambda each: stretched(self._decoded(self.pairs[each]), self.size), index.tolist())

    def whole(self, index: Indices) -> list[Pixels]:
        """The chosen ones as they are, but for a shorter side of 1.5 · size pixels at most."""
        return parallel(lambda each: self._decoded(self.pairs[each], round(DETAIL * self.size)), index.tolist())

    def fingerprint(self) -> str:
        """SHA-256 of the size, and of every file's name and length in bytes."""
        digest = hashlib.sha256(f"{self.size}".encode())
        for name in (name for pair in self.pairs for name in pair):
            digest.update(f"\n{name} {os.stat(self.root / name).st_size}".encode())
        return digest.hexdigest()

    def _decoded(self, pair: Pair, shorter: int | None = None) -> Pixels:
        picture, mask = decode(self.root / pair.picture, least=shorter), decode_indices(self.root / pair.mask)
        if shorter is not None:
            picture = resized(picture, min(shorter, *picture.size))
        return np.dstack([np.asarray(picture), _nearest(mask, picture.size)])


def stretched(pair: Pixels, size: int, box: tuple[int, int, int, int] | None = None) -> Pixels:
    """A picture with its mask, or the part in a box of it (left, top, right, bottom), as uint8 [size, size, 4].

    Colours go through an antialiased bilinear filter, classes are those of the nearest pixel.
    """
    colours = moves.stretched(pair[..., :3], size, box)
    return np.dstack([colours, _nearest(pair[..., 3], (size, size), box)])


def _nearest(mask: Pixels, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(mask))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST, box=box))
