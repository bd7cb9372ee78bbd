"""What a data set is to the rest of the package: images, labels, and the few facts that training needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from polar_deploy.config import Triple

Pixels: TypeAlias = npt.NDArray[np.uint8]
Labels: TypeAlias = npt.NDArray[np.int64]
Indices: TypeAlias = npt.NDArray[np.integer]


@runtime_checkable
class LazySource(Protocol):
    """Images that are read when they are asked for.

    They are asked for ahead of the training loop, in a thread of its own, by one caller at a time. One that has a
    method `whole(index)`, too, the chosen images before anything is cropped away, as a list of uint8 [H, W, 3], gives
    random resized crops more to choose from.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, 3]"""
        ...

    def __getitem__(self, index: Indices, /) -> Pixels:
        """The chosen images, uint8 [B, H, W, 3]."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes with the content."""
        ...


Images: TypeAlias = "Pixels | LazySource"


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set: `images` uint8 [N, H, W, 3], RGB; `labels` int64 [N]."""

    images: Images
    labels: Labels


@dataclass(frozen=True)
class DataSpec:
    """What is known of a data set without reading it.

    Args:
        input_size: pixels a side.
        mean, std: normalisation a channel, `(rgb / 255 - mean) / std`.
        flip: whether a mirrored image still belongs to its class.
        crop_padding: pixels that a training image may be shifted by, where it is not cropped at random:
        epochs: length of a training run where the recipe says nothing.
        crop_scale: least share of an image's area that a random resized crop holds, in (0, 1]; 1: no such crops.
        batch_size: images a training step where the recipe says nothing.
    """

    name: str
    classes: int
    input_size: int
    mean: Triple
    std: Triple
    flip: bool
    crop_padding: int
    epochs: int
    crop_scale: float = 1.0
    batch_size: int = 128


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as it was read.

    Attributes:
        class_names: `class_names[label]` names a label.
        validation: indices into `train` of those that validate; None: a share that is drawn by the run's seed.
        notes: what a user should know of it, a sentence each.
    """

    spec: DataSpec
    train: Split
    test: Split
    class_names: tuple[str, ...]
    validation: Indices | None = None
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 of images, labels and class names; folders that are read lazily count by file names and sizes."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for split in (self.train, self.test):
            digest.update(repr(split.images.shape).encode())
            if isinstance(split.images, np.ndarray):
                digest.update(np.ascontiguousarray(split.images).data)
            else:
                digest.update(split.images.fingerprint().encode())
            digest.update(np.ascontiguousarray(split.labels).data)
        if self.validation is not None:
            digest.update(self.validation.astype(np.int64).data)
        return digest.hexdigest()


def stratified(labels: Labels, share: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Indices (kept, taken), disjoint and sorted: `share` of every class is taken, at least one, never all of them."""
    taken = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        taken.append(members[: min(max(round(share * len(members)), 1), len(members) - 1)])
    chosen = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def split_validation(dataset: Dataset, seed: int, share: float = 0.1) -> tuple[Indices, Indices]:
    """Indices (training, validation) into `dataset.train`.

    The data set says which ones validate, or `share` (0–1) of every class does, chosen by `seed`.
    """
    if dataset.validation is not None:
        return np.setdiff1d(np.arange(len(dataset.train.labels)), dataset.validation), dataset.validation
    return stratified(dataset.train.labels, share, np.random.default_rng(seed))


def normalise(images: Pixels, mean: Triple, std: Triple) -> npt.NDArray[np.float32]:
    """`(images / 255 - mean) / std`: uint8 [B, H, W, 3] → float32 [B, 3, H, W], contiguous."""
    scale = 1 / (255 * np.asarray(std))
    shift = -np.asarray(mean) / np.asarray(std)
    batch, height, width, channels = images.shape
    result = np.empty((batch, channels, height, width), np.float32)
    np.multiply(images.transpose(0, 3, 1, 2), scale.astype(np.float32)[:, None, None], out=result)
    result += shift.astype(np.float32)[:, None, None]
    return result
