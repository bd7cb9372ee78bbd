"""Batches of samples, shuffled by seed and epoch; images are augmented and normalised on the training device.

Arrays of images lie on the device from the start. What comes from files is read ahead of the training loop, by a thread
that has many pictures decoded at once, and is kept as uint8 while it fits into memory. All random numbers of a batch
are drawn before it is read, so that an epoch is the same whatever was kept and whoever was faster.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from polar_deploy.data import dali
from polar_deploy.data.crops import DRAWS, resized_crop
from polar_deploy.data.dataset import Indices, Pixels
from polar_deploy.data.pictures import LazyImages, PictureCache
from polar_deploy.data.threads import parallel
from polar_deploy.gating import processes
from polar_deploy.limits import available_memory
from polar_deploy.resolved import ResolvedSettings
from polar_deploy.tasks import Arrays, Batch, Samples
from polar_deploy.tasks.classification import INPUT, TARGET

EVALUATION_BATCH = 500
_AHEAD = 2  # batches that are read before they are asked for
_KEPT = 0.25  # of the available memory: what pictures may take that are kept
_reading = threading.Lock()  # a user's source is asked by one thread at a time

P = TypeVar("P")
R = TypeVar("R")


@dataclass(frozen=True)
class _Plan:
    """What a batch is made of, drawn before it is read.

    Attributes:
        chosen: which images of the part, [B].
        crops: random numbers of the random resized crops, [B, DRAWS]; None: no such crops.
        shift: rows and columns that the images are shifted by, [B, 2, 1].
        flip: which of them are mirrored, [B, 1].
        square: what cutout blanks, [B, H, W]; None: nothing.
    """

    chosen: Tensor
    crops: Tensor | None = None
    shift: Tensor | None = None
    flip: Tensor | None = None
    square: Tensor | None = None

    def part(self, rank: int, count: int) -> _Plan:
        """What one of so many processes reads of it: every so many-th image."""
        drawn = (self.chosen, self.crops, self.shift, self.flip, self.square)
        return _Plan(*(each if each is None else each[rank::count] for each in drawn))  # type: ignore[arg-type]


class Batches(ABC):
    """Part of a data set, ready for training or evaluation; of several processes each has its share of every batch.

    Args:
        indices: which samples of it belong to this part.
        settings: (batch size, seed; further ones of subclasses).
        device: where batches are wanted.

    Attributes:
        reads: whether samples have to be read, since they do not lie on the device.
        waited: seconds that loops over batches have waited for that.
    """

    reads = True
    evaluation_batch = EVALUATION_BATCH

    def __init__(self, indices: Indices, settings: ResolvedSettings, device: torch.device) -> None:
        self.indices, self.settings, self.device = indices, settings, device
        self.rank, self.processes = processes.rank(), processes.count()
        self.waited = 0.0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.indices)

    @property
    def steps(self) -> int:
        """Full batches in an epoch; the rest of each epoch's order is left out, as BatchNorm needs full batches."""
        return max(1, len(self) // self.settings.training.batch_size)

    @property
    def batch_size(self) -> int:
        """Samples in one step, over all processes."""
        return min(self.settings.training.batch_size, len(self))

    @property
    def samples_an_epoch(self) -> int:
        """How many samples `epoch` gives, over all processes."""
        return self.steps * self.batch_size

    def epoch(self, number: int) -> Iterator[Batch]:
        """Augmented batches of epoch `number`, the same for the same seed.

        Together the processes have what one alone would have: all of them draw all, and read their own.
        """
        draw = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        order = torch.randperm(len(self), generator=draw)
        size = self.batch_size
        parts = (order[step * size : (step + 1) * size] for step in range(self.steps))
        return self._training(parts, draw)

    def plain(self, size: int | None = None, most: int | None = None) -> Iterator[Batch]:
        """The first `most` samples or all, in order, not augmented, `size` at once.

        Of several processes each has every so many-th.
        """
        own = torch.arange(self.rank, min(len(self), most or len(self)), self.processes)
        return self._plain(torch.split(own, size or self.evaluation_batch) if len(own) else ())

    @abstractmethod
    def _training(self, parts: Iterable[Tensor], draw: torch.Generator) -> Iterator[Batch]:
        """This process's share of each part, int64 [B] into `indices`; `draw` has the random numbers, in order."""

    @abstractmethod
    def _plain(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        """All of each part, not augmented."""


class SampleBatches(Batches):
    """Batches of any samples, read ahead of the training loop; each process augments its own.

    Args:
        samples: the part of a data set that `indices` choose from.
        indices, settings, device: as for `Batches`.
    """

    def __init__(self, samples: Samples, indices: Indices, settings: ResolvedSettings, device: torch.device) -> None:
        super().__init__(indices, settings, device)
        self._samples, self.evaluation_batch = samples, settings.training.batch_size

    def _training(self, parts: Iterable[Tensor], draw: torch.Generator) -> Iterator[Batch]:
        drawn = ((part, int(torch.randint(2**62, (), generator=draw))) for part in parts)
        own = ((part[self.rank :: self.processes], (seed, self.rank)) for part, seed in drawn)
        return self._read(own)

    def _plain(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        return self._read((part, None) for part in parts)

    def _read(self, parts: Iterable[tuple[Tensor, tuple[int, int] | None]]) -> Iterator[Batch]:
        started = time.monotonic()
        for _, (inputs, targets) in ahead(parts, self._arrays):
            self.waited += time.monotonic() - started
            yield Batch(self._tensors(inputs), self._tensors(targets))
            started = time.monotonic()

    def _arrays(self, part: tuple[Tensor, tuple[int, int] | None]) -> tuple[Arrays, Arrays]:
        rows, seed = part
        with _reading:
            return self._samples.read(self.indices[rows.numpy()], None if seed is None else np.random.default_rng(seed))

    def _tensors(self, arrays: Arrays) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(values)).to(self.device) for name, values in arrays.items()}


class ImageBatches(Batches):
    """Batches of a classifier's images, augmented and normalised on the device.

    Args:
        images: uint8 [N, H, W, 3]; an array (then held on `device`) or a `LazySource`.
        labels: int64 [N].
        indices, settings, device: as for `Batches`; normalisation and augmentation are the settings', too.
    """

    def __init__(
        self, images: Any, labels: np.ndarray, indices: Indices, settings: ResolvedSettings, device: torch.device
    ) -> None:
        super().__init__(indices, settings, device)
        assert settings.normalize is not None
        self._images = images
        self._crop_scale = settings.training.crop_scale
        self.reads = self._crop_scale < 1 or not isinstance(images, np.ndarray)
        is_crops_of_files = self._crop_scale < 1 and isinstance(images, LazyImages)
        self._by_dali = is_crops_of_files and dali.is_wanted(settings.training.decoder, device)
        self._held = None if self.reads else torch.from_numpy(images[indices]).to(device)
        self._labels = torch.from_numpy(labels[indices]).to(device)
        self._mean = torch.tensor(settings.normalize.mean, device=device) * 255
        self._std = torch.tensor(settings.normalize.std, device=device) * 255

    def _training(self, parts: Iterable[Tensor], draw: torch.Generator) -> Iterator[Batch]:
        plans = (self._plan(part, draw) for part in parts)
        for plan, images in self._read(plan.part(self.rank, self.processes) for plan in plans):
            yield self._batch(self._augment(images, plan), plan)

    def _plain(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        for plan, images in self._read(_Plan(part) for part in parts):
            yield self._batch(self._normal(images), plan)

    def _batch(self, images: Tensor, plan: _Plan) -> Batch:
        """float [B, H, W, 3] to [B, 3, H, W], in memory as it lies or with the channels first, as the settings say."""
        images = images.permute(0, 3, 1, 2)
        if not self.settings.training.channels_last:
            images = images.contiguous()
        return Batch({INPUT: images}, {TARGET: self._labels[plan.chosen.to(self.device)]})

    def _read(self, plans: Iterable[_Plan]) -> Iterator[tuple[_Plan, Tensor]]:
        """Each plan with its images on the device, uint8 [B, H, W, 3]."""
        if self._held is not None:
            for plan in plans:
                yield plan, self._held[plan.chosen.to(self.device)]
            return
        started = time.monotonic()
        for plan, pixels in ahead(plans, self._pixels):
            self.waited += time.monotonic() - started
            yield plan, torch.from_numpy(pixels).to(self.device)
            started = time.monotonic()

    def _pixels(self, plan: _Plan) -> Pixels:
        rows = self.indices[plan.chosen.numpy()]
        with _reading:
            if plan.crops is None:
                return np.stack(self._centres(rows))
            assert plan.flip is not None
            size, least = self._images.shape[1], self._crop_scale
            parts = zip(self._whole(rows), plan.crops.numpy(), strict=True)
            crops = parallel(lambda part: resized_crop(part[0], size, least, part[1]), parts)
            flips = plan.flip[:, 0].tolist()
            return np.stack([crop[:, ::-1] if flip else crop for crop, flip in zip(crops, flips, strict=True)])

    @cached_property
    def _centres(self) -> Callable[[Indices], list[Pixels]]:
        """Gives images as evaluation sees them."""
        images = self._images
        if isinstance(images, np.ndarray):
            return lambda rows: list(images[rows])
        return PictureCache(lambda rows: list(images[rows]), int(_KEPT * available_memory()))

    @cached_property
    def _whole(self) -> Callable[[Indices], list[Pixels]]:
        """Gives images as crops are made of them: whole, where the source tells those from what evaluation sees."""
        whole = dali.DaliReader(self._images, self.device) if self._by_dali else getattr(self._images, "whole", None)
        return self._centres if whole is None else PictureCache(whole, int(_KEPT * available_memory()))

    def _plan(self, chosen: Tensor, draw: torch.Generator) -> _Plan:
        """Draw what becomes of a training batch."""
        training, batch = self.settings.training, len(chosen)
        height, width = self._images.shape[1:3]
        crops = torch.rand(batch, DRAWS, generator=draw) if self._crop_scale < 1 else None
        padding = 0 if crops is not None else training.crop_padding or 0
        return _Plan(
            chosen,
            crops,
            shift=torch.randint(-padding, padding + 1, (batch, 2, 1), generator=draw),
            flip=(torch.rand(batch, 1, generator=draw) < 0.5) & bool(training.flip),
            square=_square(batch, height, width, training.cutout, draw) if training.cutout else None,
        )

    def _augment(self, images: Tensor, plan: _Plan) -> Tensor:
        """Flip, shifted crop and cutout in one gather; what lies outside becomes the mean colour.

        uint8 [B, H, W, 3] to float [B, H, W, 3]. Random resized crops come flipped already.
        """
        if plan.crops is not None:
            normal = self._normal(images)
            if plan.square is not None:
                normal *= ~plan.square.to(self.device).unsqueeze(3)
            return normal
        assert plan.shift is not None
        assert plan.flip is not None
        (batch, height, width, _), device = images.shape, self.device
        shift, flip = plan.shift.to(device), plan.flip.to(device)
        rows = torch.arange(height, device=device) + shift[:, 0]
        columns = torch.arange(width, device=device) + shift[:, 1]
        columns = torch.where(flip, width - 1 - columns, columns)
        inside = _inside(rows, height).unsqueeze(2) & _inside(columns, width).unsqueeze(1)
        if plan.square is not None:
            inside &= ~plan.square.to(device)
        index = torch.arange(batch, device=device)[:, None, None]
        picked = images[index, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)]
        return self._normal(picked) * inside.unsqueeze(3)

    def _normal(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] to float [B, H, W, 3]."""
        return (images - self._mean).div_(self._std)


def ahead(plans: Iterable[P], read: Callable[[P], R]) -> Iterator[tuple[P, R]]:
    """Each plan and what `read` makes of it, in order; a thread is up to `_AHEAD` of them ahead of the caller."""
    waiting: deque[tuple[P, Future[R]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        try:
            for plan in plans:
                waiting.append((plan, reader.submit(read, plan)))
                if len(waiting) > _AHEAD:
                    first, found = waiting.popleft()
                    yield first, found.result()
            while waiting:
                first, found = waiting.popleft()
                yield first, found.result()
        finally:
            for _, unwanted in waiting:
                unwanted.cancel()


def _inside(positions: Tensor, length: int) -> Tensor:
    return (positions >= 0) & (positions < length)


def _square(batch: int, height: int, width: int, side: int, draw: torch.Generator) -> Tensor:
    """A square of `side` pixels at a random centre, cut at the border (DeVries & Taylor, arXiv 1708.04552)."""
    top = torch.randint(0, height, (batch, 1), generator=draw) - side // 2
    left = torch.randint(0, width, (batch, 1), generator=draw) - side // 2
    rows, columns = torch.arange(height), torch.arange(width)
    return ((rows >= top) & (rows < top + side)).unsqueeze(2) & ((columns >= left) & (columns < left + side)).unsqueeze(
        1
    )
