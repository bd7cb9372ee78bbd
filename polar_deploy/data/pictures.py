"""Picture files that are decoded when they are asked for, and what keeps them from being decoded twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from polar_deploy.data.dataset import Indices, Pixels
from polar_deploy.data.decode import decode, problem
from polar_deploy.data.threads import parallel
from polar_deploy.errors import ContentError

DETAIL = 1.5  # shorter side of a picture that crops are made of, over the pixels a side of the crop


@dataclass(frozen=True, eq=False)
class LazyImages:
    """Images of which only the names are in memory: `images[indices]` decodes, uint8 [B, size, size, 3].

    Args:
        root: folder that `files`, an array of names, belong to.
        shorter: pixels that an image's shorter side is resized to (bilinear), before
        size: pixels a side are cut out of its centre.
    """

    root: Path
    files: npt.NDArray[np.object_]
    shorter: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, size, size, 3]"""
        return (len(self.files), self.size, self.size, 3)

    def __getitem__(self, index: Indices) -> Pixels:
        """Decode the chosen images; ContentError names the file that cannot be decoded."""
        chosen = self.files[index]
        batch = np.empty((len(chosen), self.size, self.size, 3), np.uint8)
        for position, pixels in enumerate(parallel(self._centre, chosen)):
            batch[position] = pixels
        return batch

    @property
    def detail(self) -> int:
        """Pixels that the shorter side of an image has at most where crops are made of it."""
        return round(DETAIL * self.size)

    def whole(self, index: Indices) -> list[Pixels]:
        """The chosen images without a crop, each uint8 [H, W, 3], the shorter side `detail` pixels at most."""
        return parallel(self._whole, self.files[index])

    def fingerprint(self) -> str:
        """SHA-256 of sizes and of every file's name and length in bytes."""
        digest = hashlib.sha256(f"{self.shorter} {self.size}".encode())
        for name in self.files:
            digest.update(f"\n{name} {os.stat(self.root / name).st_size}".encode())
        return digest.hexdigest()

    def problems(self, *, thorough: bool) -> list[ContentError | None]:
        """Why each file is no sound picture, None where it seems to be one; see `decode.problem`."""
        return parallel(lambda name: problem(self.root / name, thorough=thorough), self.files)

    def _centre(self, name: str) -> Pixels:
        image = resized(decode(self.root / name), self.shorter)
        width, height = image.size
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def _whole(self, name: str) -> Pixels:
        image = decode(self.root / name, least=self.detail)
        return np.asarray(resized(image, min(self.detail, *image.size)))


def resized(image: Image.Image, shorter: int) -> Image.Image:
    """With so many pixels on its shorter side, bilinear; itself where it has them already."""
    size = resized_size(image.size, shorter)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def resized_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Both sides, in pixels, where the shorter one gets so many."""
    scale = shorter / min(size)
    return max(int(size[0] * scale), shorter), max(int(size[1] * scale), shorter)


class PictureCache:
    """Pictures that are read once, and kept while they fit into memory; what does not is read each time.

    Args:
        read: gives the pictures of some indices, each uint8 [H, W, 3].
        limit: bytes that may be kept.
    """

    def __init__(self, read: Callable[[Indices], Sequence[Pixels]], limit: int) -> None:
        self._read, self._left = read, limit
        self._kept: dict[int, Pixels] = {}

    def __call__(self, index: Indices) -> list[Pixels]:
        """The pictures of these indices."""
        missing = [each for each in index.tolist() if each not in self._kept]
        fresh = dict(zip(missing, self._read(np.array(missing, np.int64)), strict=True)) if missing else {}
        pictures = [self._kept[each] if each in self._kept else fresh[each] for each in index.tolist()]
        for each, picture in fresh.items():
            if picture.nbytes <= self._left:
                self._left -= picture.nbytes
                self._kept[each] = picture.copy()  # not a view, which would keep its whole batch
        return pictures
