"""Two tasks that are no pictures: tones in 1-D audio, and a network of two inputs and two outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polar_deploy.tasks import Arrays, Batch, Data, InMemory, Metric, Statistics, Task, Tensors, TensorSpec, losses
from polar_deploy.tasks.accuracy import Accuracy
from polar_deploy.tasks.metric import Floats

LENGTH, TONES = 256, 3


def sounds(samples: int, seed: int) -> InMemory:
    """One of three tones in noise, float32 [N, 1, 256]."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, TONES, samples)
    phase, time = rng.uniform(0, 2 * np.pi, (samples, 1)), np.arange(LENGTH)
    wave = np.sin(2 * np.pi * (4 + 6 * label[:, None]) * time / LENGTH + phase)
    noisy = wave + rng.normal(0, 0.5, (samples, LENGTH))
    return InMemory({"sound": noisy[:, None].astype(np.float32)}, {"tone": label})


def tones(data_dir: Path | None = None) -> Task:
    """Which tone it is."""
    return Task(
        name="tones",
        inputs={"sound": TensorSpec((1, LENGTH))},
        outputs={"scores": TensorSpec((TONES,))},
        data=lambda: Data(sounds(256, 0), sounds(200, 1), class_names=("low", "middle", "high")),
        loss=lambda outputs, batch: losses.cross_entropy(outputs["scores"], batch.targets["tone"]),
        metric=Accuracy("scores", "tone"),
        distill=lambda outputs, teacher: losses.divergence(outputs["scores"], teacher["scores"], 2.0),
        classes=TONES,
        epochs=4,
    )


class Listener(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 16, 9, stride=2, padding=4),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 32, 9, stride=2, padding=4),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 32, 9, stride=2, padding=4),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, classes)

    def forward(self, sound: Tensor) -> Tensor:
        return self.head(self.body(sound).amax(-1))


def listener(classes: int) -> nn.Module:
    return Listener(classes)


# --------------------------------------------------------------------------- two inputs, two outputs


class Correlation(Metric):
    """Share of the targets' variance that is explained: a function of sums."""

    name, unit = "R2", ""

    def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
        found, wanted = outputs["height"][:, 0].astype(np.float64), targets["height"].astype(np.float64)
        return np.stack([np.ones(len(wanted)), wanted, wanted**2, (found - wanted) ** 2], axis=1)

    def score(self, totals: Floats) -> Floats:
        count, first, second, residual = totals.T
        return 1 - residual / (second - first**2 / count)


def scenes(samples: int, seed: int) -> InMemory:
    """A signal [2, 12, 12], and which of four sensors it is from, int64; the height it shows depends on both."""
    rng = np.random.default_rng(seed)
    sensor = rng.integers(0, 4, samples)
    height = rng.uniform(-1, 1, samples)
    signal = rng.normal(0, 0.3, (samples, 2, 12, 12)) + (height * (1 + sensor))[:, None, None, None]
    return InMemory(
        {"signal": signal.astype(np.float32), "sensor": sensor}, {"height": height.astype(np.float32), "sensor": sensor}
    )


def height_loss(outputs: Tensors, batch: Batch) -> Tensor:
    guess = F.cross_entropy(outputs["guess"].float(), batch.targets["sensor"])
    return F.mse_loss(outputs["height"][:, 0].float(), batch.targets["height"]) + 0.1 * guess


def heights(data_dir: Path | None = None) -> Task:
    """Two inputs of unlike types, two outputs."""
    return Task(
        name="heights",
        inputs={"signal": TensorSpec((2, 12, 12)), "sensor": TensorSpec((), "int64")},
        outputs={"height": TensorSpec((1,)), "guess": TensorSpec((4,))},
        data=lambda: Data(scenes(320, 0), scenes(200, 1), preprocessing={"signal": "volts"}),
        loss=height_loss,
        metric=Correlation(),
        distill=losses.scaled_mse,
        epochs=6,
    )


def unjudged(data_dir: Path | None = None) -> Task:
    """The same without a metric or a teacher."""
    whole = heights(data_dir)
    return Task("unjudged", whole.inputs, whole.outputs, whole.data, height_loss, metric=None, epochs=2)


class Surveyor(nn.Module):
    """Gives a dictionary, in another order than the task has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.gain = nn.Embedding(4, 16)
        self.hidden = nn.Linear(16, 24)
        self.height, self.guess = nn.Linear(24, 1), nn.Linear(24, 4)

    def forward(self, signal: Tensor, sensor: Tensor) -> dict[str, Tensor]:
        seen = torch.relu(self.second(torch.relu(self.first(signal)))).mean((2, 3))
        hidden = torch.relu(self.hidden(seen * self.gain(sensor)))
        return {"guess": self.guess(hidden), "height": self.height(hidden)}


def surveyor() -> nn.Module:
    return Surveyor()
