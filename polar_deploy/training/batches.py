"""Batches: images kept as uint8, shuffled by seed and epoch, augmented and normalised on the training device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polar_deploy.config import ResolvedSettings

EVALUATION_BATCH = 500


class Batches:
    """Part of a data set, ready for training or evaluation.

    Args:
        images: uint8 [N, H, W, 3]; an array (then held on `device`) or anything that answers `images[indices]`.
        labels: int64 [N].
        indices: which of the N belong to this part.
        settings: (normalisation, augmentation, batch size, seed).
        device: where batches are wanted.
    """

    def __init__(
        self, images: Any, labels: np.ndarray, indices: np.ndarray, settings: ResolvedSettings, device: torch.device
    ) -> None:
        self.settings, self.device = settings, device
        self._lazy = None if isinstance(images, np.ndarray) else (images, indices)
        self._images = torch.from_numpy(images[indices]).to(device) if self._lazy is None else None
        self._labels = torch.from_numpy(labels[indices]).to(device)
        self._mean = torch.tensor(settings.normalize.mean, device=device) * 255
        self._std = torch.tensor(settings.normalize.std, device=device) * 255

    def __len__(self) -> int:
        """Number of images."""
        return len(self._labels)

    @property
    def steps(self) -> int:
        """Full batches in an epoch; the rest of each epoch's order is left out, as BatchNorm needs full batches."""
        return max(1, len(self) // self.settings.training.batch_size)

    @property
    def images_an_epoch(self) -> int:
        """How many images `epoch` gives."""
        return self.steps * min(self.settings.training.batch_size, len(self))

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches (float [B, 3, H, W], int64 [B]) of epoch `number`, the same for the same seed."""
        training = self.settings.training
        draw = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        order = torch.randperm(len(self), generator=draw)
        size = min(training.batch_size, len(self))
        for step in range(self.steps):
            chosen = order[step * size : (step + 1) * size]
            yield self._augment(self._take(chosen), draw), self._labels[chosen.to(self.device)]

    def plain(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, normalised, not augmented."""
        for start in range(0, len(self), EVALUATION_BATCH):
            chosen = torch.arange(start, min(start + EVALUATION_BATCH, len(self)))
            images = (self._take(chosen).float() - self._mean) / self._std
            yield images.permute(0, 3, 1, 2), self._labels[chosen.to(self.device)]

    def _take(self, chosen: Tensor) -> Tensor:
        if self._images is not None:
            return self._images[chosen.to(self.device)]
        assert self._lazy is not None
        images, indices = self._lazy
        return torch.from_numpy(images[indices[chosen.numpy()]]).to(self.device)

    def _augment(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Flip, shifted crop and cutout in one gather; what lies outside becomes the mean colour.

        uint8 [B, H, W, 3] to float [B, 3, H, W] in channels_last memory.
        """
        training = self.settings.training
        (batch, height, width, _), device = images.shape, self.device
        padding = training.crop_padding or 0
        shift = torch.randint(-padding, padding + 1, (batch, 2, 1), generator=draw).to(device)
        flip = (torch.rand(batch, 1, generator=draw) < 0.5).to(device) & bool(training.flip)
        rows = torch.arange(height, device=device) + shift[:, 0]
        columns = torch.arange(width, device=device) + shift[:, 1]
        columns = torch.where(flip, width - 1 - columns, columns)
        inside = _inside(rows, height).unsqueeze(2) & _inside(columns, width).unsqueeze(1)
        if training.cutout:
            inside &= ~_square(batch, height, width, training.cutout, draw).to(device)
        index = torch.arange(batch, device=device)[:, None, None]
        picked = images[index, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)]
        normal = (picked.float() - self._mean) / self._std
        return (normal * inside.unsqueeze(3)).permute(0, 3, 1, 2)


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
