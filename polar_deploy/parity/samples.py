"""The pictures behind the worst samples, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.workspace import atomic_path

if TYPE_CHECKING:
    from polar_deploy.data import Split


def write_worst(path: Path, worst: Sequence[dict[str, Any]], test: Split | None) -> None:
    """Write the images of `worst`, which have an "index" into the test set each: uint8 [N, H, W, 3] as "images".

    Without pictures, there are none of them.
    """
    indices = np.array([each["index"] for each in worst], np.int64)
    images = np.zeros((0, 1, 1, 3), np.uint8) if test is None else np.asarray(test.images[indices])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=images)
