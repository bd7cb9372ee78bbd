"""What a task trains on and is judged by: samples of any inputs and targets, by index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError
from polar_deploy.tensors import Arrays, count, take

Indices: TypeAlias = npt.NDArray[np.integer]

VALIDATION = 0.1  # of the training samples, where the data does not say which ones validate


@runtime_checkable
class Samples(Protocol):
    """One part of a data set, read ahead of the training loop in a thread of its own, by one caller at a time."""

    def __len__(self) -> int:
        """How many samples."""
        ...

    def read(self, rows: Indices, draw: np.random.Generator | None = None) -> tuple[Arrays, Arrays]:
        """Inputs and targets of the chosen samples, [B, …] each, by name; inputs as the network takes them.

        Args:
            rows: indices, which may repeat.
            draw: random numbers to augment a training batch by; None: as evaluation, calibration and devices see it.
        """
        ...

    def fingerprint(self) -> str:
        """A text that changes with the content."""
        ...


class InMemory:
    """Samples that are arrays, never augmented.

    Args:
        inputs, targets: name -> [N, …], the same N for all.
    """

    def __init__(self, inputs: Arrays, targets: Arrays) -> None:
        self.inputs, self.targets = dict(inputs), dict(targets)
        lengths = {name: len(values) for name, values in {**self.inputs, **self.targets}.items()}
        if not self.inputs or len(set(lengths.values())) > 1:
            found = ", ".join(f"{name}: {length}" for name, length in lengths.items()) or "none"
            raise ContentError(f"inputs and targets have different numbers of samples ({found})", "give each as many")

    def __len__(self) -> int:
        return count(self.inputs)

    def read(self, rows: Indices, draw: np.random.Generator | None = None) -> tuple[Arrays, Arrays]:
        """The chosen rows of every array."""
        return take(self.inputs, rows), take(self.targets, rows)

    def fingerprint(self) -> str:
        """SHA-256 of all arrays."""
        digest = hashlib.sha256()
        for name, values in {**self.inputs, **self.targets}.items():
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes:
        train: what networks learn from; choices are validated on a part of it.
        test: what parity judges by, and nothing else looks at.
        validation: indices into `train` of those that validate; None: a tenth, drawn by the run's seed.
        notes: what a user should know of it, a sentence each.
        class_names: `class_names[index]` names a class; (): there are none.
        preprocessing: how a device makes inputs of what it sees, as JSON, for the bundle's manifest.
    """

    train: Samples
    test: Samples
    validation: Indices | None = None
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def split(self, seed: int) -> tuple[Indices, Indices]:
        """Indices (training, validation) into `train`, disjoint and sorted."""
        everything, validation = np.arange(len(self.train)), self.validation
        if validation is None:
            taken = min(max(1, round(VALIDATION * len(everything))), len(everything) - 1)
            validation = np.sort(np.random.default_rng(seed).permutation(everything)[:taken])
        return np.setdiff1d(everything, validation), validation

    def fingerprint(self) -> str:
        """SHA-256 of all that networks learn from and are judged by."""
        digest = hashlib.sha256(f"{self.train.fingerprint()} {self.test.fingerprint()}".encode())
        if self.validation is not None:
            digest.update(np.asarray(self.validation, np.int64).tobytes())
        return digest.hexdigest()


def draw_inputs(samples: Samples, indices: Indices, most: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Inputs of `most` of the samples at `indices`, un-augmented, or of all if there are fewer; in the data's order."""
    chosen = np.sort(np.random.default_rng(seed).permutation(indices)[:most])
    return dict(samples.read(chosen)[0])
