"""Two classifiers that answer as often right and wrong as is said."""

from __future__ import annotations

import numpy as np

from polar_deploy.parity import Paired
from polar_deploy.tasks.accuracy import Accuracy

CLASSES = 10


def answered(
    samples: int,
    *,
    lost: int = 0,
    gained: int = 0,
    right: int = 0,
    labels: np.ndarray | None = None,
    broken: tuple[int, int] = (0, 0),
) -> Paired:
    """Statistics of both.

    Args:
        lost, gained: samples that only the full network, or only the compressed one, is right on.
        right: those that both are right on; all else both get wrong.
        labels: of the samples; None: `CLASSES` in turn.
        broken: samples with NaN in an output of the full, and of the compressed network.
    """
    assert lost + gained + right <= samples
    labels = np.arange(samples) % CLASSES if labels is None else labels
    classes = int(labels.max()) + 1
    both, full_alone = np.arange(samples) < right, np.zeros(samples, bool)
    full_alone[right : right + lost] = True
    other_alone = np.zeros(samples, bool)
    other_alone[right + lost : right + lost + gained] = True
    statistics = [
        Accuracy().statistics({"logits": np.eye(classes + 1)[np.where(good, labels, classes)]}, {"label": labels})
        for good in (both | full_alone, both | other_alone)
    ]
    return Paired(Accuracy(), *statistics, nonfinite=dict(zip(("full", "compressed"), broken, strict=True)))
