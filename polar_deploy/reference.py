"""Reference samples: what PyTorch gives for them, which every graph and engine later is held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from polar_deploy.export import evaluating
from polar_deploy.tensors import Arrays
from polar_deploy.workspace import atomic_path

if TYPE_CHECKING:
    from torch import nn

    from polar_deploy.tasks.task import Task


@torch.no_grad()
def outputs(task: Task, network: nn.Module, inputs: Arrays) -> dict[str, np.ndarray]:
    """What `network` gives on the CPU in evaluation mode, by name, in the order in which its forward returns it."""
    with evaluating(network):
        found = task.forward(network, {name: torch.from_numpy(np.asarray(values)) for name, values in inputs.items()})
        return {name: value.numpy() for name, value in found.items()}


def write(path: Path, inputs: Arrays, outputs: Mapping[str, Arrays]) -> None:
    """Write `inputs/NAME`, and `full/NAME` and `gated/NAME` for the outputs of both networks, as .npz, atomically."""
    arrays = {
        f"{part}/{name}": values
        for part, each in {"inputs": inputs, **outputs}.items()
        for name, values in each.items()
    }
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
