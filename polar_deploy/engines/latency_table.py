"""Making a latency table: measured site by site, and held against whole networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy import latency
from polar_deploy.documents.latency_table import MeasuredTable
from polar_deploy.engines import table

if TYPE_CHECKING:
    from polar_deploy.config import Build
    from polar_deploy.latency import LatencyTable
    from polar_deploy.targets import Target

ATTEMPTS = 2


def make(
    gated: Path,
    target: Target,
    batch: int,
    options: Build,
    likely: Callable[[LatencyTable], list[dict[str, int]]],
    on_progress: Callable[[str], None],
) -> MeasuredTable:
    """Measure a table (see `table.measure`), and once more where whole networks do not bear it out.

    Args:
        gated: the network with all gates open, as ONNX.
        target: where it shall run; it has to be here.
        batch: images in one inference.
        options: how engines are built.
        likely: sub-networks that a table would make the solver choose; they are measured whole.
        on_progress: is told how far it is.

    Raises:
        DisturbedError: what was measured contradicts itself, each time.
    """
    measured: MeasuredTable | None = None
    for attempt in range(ATTEMPTS):
        try:
            measured = table.measure(
                gated, target, batch=batch, options=options, likely=likely, on_progress=on_progress
            )
        except latency.DisturbedError as error:
            if measured is None and attempt == ATTEMPTS - 1:
                raise
            on_progress(f"{error.what}: a busy machine?")
            continue
        off = latency.correction(measured.as_json())
        if off <= latency.MOST_CORRECTION:
            break
        on_progress(f"whole networks are {100 * off:.0f} % off what single layers say: a busy machine?")
    assert measured is not None
    return measured
