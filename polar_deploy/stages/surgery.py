"""surgery: cut what the gates closed out of the ONNX graph, prove that nothing else changed, and keep the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.stages.artefacts import COMPRESSED_GRAPH, FULL_GRAPH, GATED_GRAPH, SURGERY
from polar_deploy.stages.stage import ONNXRUNTIME, Stage, fingerprint

if TYPE_CHECKING:
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint


def _run(run: RunContext) -> None:
    from polar_deploy.surgery import compress_file
    from polar_deploy.surgery.budget import require_kept

    report = run.path(SURGERY)
    counted = compress_file(run.path(GATED_GRAPH), run.path(COMPRESSED_GRAPH), report=report)
    require_kept(run.budget, counted, run.path(FULL_GRAPH), report)


def _fingerprint(run: RunContext) -> Fingerprint:
    return fingerprint(run.budget)


STAGE = Stage(
    "surgery",
    _run,
    _fingerprint,
    reads=(FULL_GRAPH, GATED_GRAPH),
    writes=(COMPRESSED_GRAPH, SURGERY),
    packages=ONNXRUNTIME,
)
