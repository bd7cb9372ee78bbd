"""Samples of a data set as the networks see them, for comparing and calibrating."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from polar_deploy.data.dataset import Indices, Split, normalise

if TYPE_CHECKING:
    from polar_deploy.config import Normalize


def draw(split: Split, indices: Indices, count: int, seed: int, normalize: Normalize) -> npt.NDArray[np.float32]:
    """Draw images, un-augmented: `count` of those at `indices`, or all if there are fewer, by `seed`.

    Returns:
        float32 [N, 3, H, W], normalised, in the order of the data set.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(indices)[:count])
    return normalise(split.images[chosen], normalize.mean, normalize.std)
