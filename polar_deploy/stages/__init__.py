"""The stages of a run, in order. Nothing heavy is imported before a stage runs.

A stage reads files of the run's folder and writes files there; it can be run alone on its predecessors' files.
"""

from __future__ import annotations

from collections.abc import Sequence

from polar_deploy.stages import build, bundle, export, full, gates, parity, report, surgery
from polar_deploy.stages.stage import Stage

STAGES = (full.STAGE, gates.STAGE, export.STAGE, surgery.STAGE, build.STAGE, parity.STAGE, bundle.STAGE, report.STAGE)
NAMES = tuple(stage.name for stage in STAGES)


def between(first: str, last: str) -> Sequence[Stage]:
    """The stages from `first` to `last`, both included; none where `last` comes before."""
    return STAGES[NAMES.index(first) : NAMES.index(last) + 1]
