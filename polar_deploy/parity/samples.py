"""The pictures of the worst samples, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.engines import Engine, infer_all
from polar_deploy.workspace import atomic_path

if TYPE_CHECKING:
    from polar_deploy.tasks import Samples, Task


def write_worst(path: Path, worst: Sequence[int], task: Task, test: Samples, engines: Mapping[str, Engine]) -> None:
    """Write how the task draws the `worst` samples: uint8 [N, H, W, 3] as "images", and the names of their "panels".

    Without pictures, there are none of them.

    Args:
        worst: their places in the test set.
        engines: "full" and "compressed".
    """
    images = np.zeros((0, 1, 1, 3), np.uint8)
    if task.show is not None and worst:
        inputs, targets = test.read(np.array(worst, np.int64))
        images = task.show(inputs, targets, {name: infer_all(engine, inputs) for name, engine in engines.items()})
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=images, panels=np.array(task.panels, np.str_))
