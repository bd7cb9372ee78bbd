"""bundle: what the edge team gets, unless parity failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.errors import UsageError
from polar_deploy.stages.artefacts import (
    BUILD,
    BUNDLE,
    COMPRESSED_GRAPH,
    ENGINES,
    FULL_GRAPH,
    FULL_LOG,
    GATED_GRAPH,
    GATED_LOG,
    GATES,
    LATENCY_TABLE,
    PARITY,
    REFERENCE,
    SURGERY,
)
from polar_deploy.stages.stage import ONNXRUNTIME, Stage, fingerprint

if TYPE_CHECKING:
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint

_OF_GATED_RUN = {"budget", "align", "gates", "training"}


def _run(run: RunContext) -> None:
    from polar_deploy.bundle.make import make
    from polar_deploy.documents.parity import Parity

    if Parity.read(run.path(PARITY)).verdict.overall.result == "fail":
        run.progress.note("no bundle: parity failed")
        return
    others = _made_with_other_settings(run)
    for name in {"export", "build"} & others:
        raise UsageError(
            f"stage {name} ran with other settings, or on another machine: the bundle would tell otherwise",
            f"run again with --from {name}, or with the settings of then",
        )
    omit_settings = _OF_GATED_RUN if {"full", "gates"} & others else set()
    make(run.folder, run.path(BUNDLE), run.settings, run.task.name, run.data, omit_settings)


def _made_with_other_settings(run: RunContext) -> set[str]:
    """Stages whose files are there, but not of these settings: the bundle must not tell theirs as its own."""
    from polar_deploy.stages import STAGES

    return {stage.name for stage in STAGES if run.workspace.has_other_settings(stage.name, stage.fingerprint(run))}


def _fingerprint(run: RunContext) -> Fingerprint:
    from polar_deploy.config import LOCAL_PATHS

    return fingerprint(run.basis | run.settings.model_dump(mode="json", exclude=LOCAL_PATHS))


STAGE = Stage(
    "bundle",
    _run,
    _fingerprint,
    reads=(
        *(FULL_GRAPH, COMPRESSED_GRAPH, *ENGINES, BUILD, PARITY, SURGERY, REFERENCE),
        *(GATES, GATED_GRAPH, LATENCY_TABLE),
    ),
    looks_at=(FULL_LOG, GATED_LOG),
    writes=(BUNDLE,),
    packages=ONNXRUNTIME,
    reads_data=True,
)
