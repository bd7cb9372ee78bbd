"""Miniature training runs on made-up images, and a way to break them off."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from polar_deploy.config import Budget, Normalize
from polar_deploy.documents.training_log import Epoch
from polar_deploy.export import Example
from polar_deploy.gating.analysis import Analysis, analyse
from polar_deploy.gating.gates import Gates
from polar_deploy.progress import Progress
from polar_deploy.resolved import ResolvedGates, ResolvedSettings, ResolvedTraining
from polar_deploy.tasks import Batch
from polar_deploy.tasks.classification import classifier
from polar_deploy.training.batches import ImageBatches
from polar_deploy.training.checkpoint import State
from polar_deploy.training.full import train_full
from polar_deploy.training.gated import train_gated
from polar_deploy.training.loop import TrainingJob, prepare
from polar_deploy.training.mixed import MixedPrecision
from tests.support.tiny import Tiny

CPU = torch.device("cpu")
CLASSES, SIZE, TRAIN, VALIDATION = 4, 16, 128, 32
NORMALIZE = Normalize(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


class Broken(Exception):
    """A run was broken off."""


class BreakIn(Progress):
    """Breaks a run off in the middle of epoch `epoch`, counted from 1."""

    def __init__(self, epoch: int) -> None:
        super().__init__(quiet=True)
        self.left = epoch - 1

    def epoch(self, **facts: Any) -> None:
        self.left -= 1

    def step(self, fraction: float) -> None:
        if self.left == 0 and fraction >= 0.5:
            raise Broken


def settings(
    *, training: dict[str, Any] | None = None, gates: dict[str, Any] | None = None, **other: Any
) -> ResolvedSettings:
    """Settings of a miniature run."""
    trained = {"epochs": 1, "full_epochs": 1, "batch_size": 32, "lr": 0.05, "gated_lr": 0.05, "amp": "fp32"}
    augmented = {"flip": True, "crop_padding": 1, "crop_scale": 1.0, "cutout": 3}
    held = {"budget": Budget(macs=0.5), "align": 1, "seed": 7, "input_size": SIZE} | other
    return ResolvedSettings(
        model="tiny",
        data="made up",
        normalize=NORMALIZE,
        training=ResolvedTraining(**{**trained, **augmented, **(training or {})}),
        gates=ResolvedGates(**{"close_from": 0.05, "freeze_at": 0.5} | (gates or {})),
        **held,
    )


def data() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, S, S, 3] with a bright band of rows that tells the class, labels [N]."""
    draw = np.random.default_rng(0)
    labels = np.arange(TRAIN + VALIDATION) % CLASSES
    images = draw.integers(0, 160, (len(labels), SIZE, SIZE, 3))
    for image, label in zip(images, labels, strict=True):
        height = SIZE // CLASSES
        image[height * label : height * (label + 1)] += 90
    return images.astype(np.uint8), labels


def pair(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a classifier's batch."""
    return batch.inputs["input"], batch.targets["label"]


class Dropping(Tiny):
    """The tiny network with dropout, whose draws a resumed run must repeat."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.1))


def network(*, seed: int = 7) -> nn.Module:
    """A fresh network."""
    torch.manual_seed(seed)
    return Dropping(CLASSES)


@cache
def analysis() -> Analysis:
    """What can go from the network, which is the same for all of them."""
    return analyse(network(), Example.of(torch.zeros(2, 3, SIZE, SIZE)))


def gates(run: TrainingJob) -> Gates:
    """Gates on the network of a run."""
    wanted = run.settings.gates
    return Gates(
        run.network,
        torch.zeros(2, 3, SIZE, SIZE),
        run.settings.budget.asked(),
        run.epochs * run.train.steps,
        align=run.settings.align,
        min_width=wanted.min_width,
        mode=wanted.mode,
        close_from=wanted.close_from,
        freeze_at=wanted.freeze_at,
        rehearse=0,
        analysis=analysis(),
    )


def fit(run_settings: ResolvedSettings, folder: Path, *, gated: bool, epochs: int, key: str = "a key") -> TrainingJob:
    """What a run needs; with `final` all images are for training."""
    images, labels = data()
    final = run_settings.training.train_on_validation
    held = np.arange(TRAIN, TRAIN + VALIDATION)
    chosen = np.arange(TRAIN + VALIDATION if final else TRAIN)
    return TrainingJob(
        stage="gates" if gated else "full",
        task=classifier(CLASSES, SIZE, run_settings.training),
        network=prepare(network(), run_settings, CPU),
        train=ImageBatches(images, labels, chosen, run_settings, CPU),
        validation=None if final else ImageBatches(images, labels, held, run_settings, CPU),
        settings=run_settings,
        epochs=epochs,
        folder=folder,
        key=key,
        device=CPU,
        mixed=MixedPrecision(run_settings.training.amp, CPU),
        fresh=lambda: prepare(network(), run_settings, CPU),
    )


def train(
    run: TrainingJob, on: Gates | None = None, *, teacher: nn.Module | None = None, progress: Progress | None = None
) -> State:
    """Train to the end or until `progress` breaks it off, with the gates `on` its network or without any."""
    progress = progress or Progress(quiet=True)
    return train_full(run, progress) if on is None else train_gated(run, on, teacher, progress)


def without_seconds(records: Sequence[Epoch]) -> list[dict[str, Any]]:
    """What must be the same in a resumed run."""
    timed = {"seconds", "data_seconds"}
    return [record.model_dump(exclude=timed, exclude_unset=True) for record in records]
