"""The pictures behind the worst samples, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.workspace import atomic_path

if TYPE_CHECKING:
    from polar_deploy.data import Split


def write_worst(path: Path, worst: Sequence[dict[str, Any]], test: Split) -> None:
    """Write the images of `worst`, which have an "index" into the test set each: uint8 [N, H, W, 3] as "images"."""
    indices = np.array([each["index"] for each in worst], np.int64)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=np.asarray(test.images[indices]))
