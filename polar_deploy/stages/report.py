"""report: the figures of the run in one file, and a page for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.stages.artefacts import (
    BUILD,
    FULL_LOG,
    GATED_GRAPH,
    GATED_LOG,
    GATES,
    LATENCY_TABLE,
    MANIFEST,
    PAGE,
    PARITY,
    REPORT,
    SURGERY,
    WORST_SAMPLES,
)
from polar_deploy.stages.stage import Stage, fingerprint

if TYPE_CHECKING:
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint


def _run(run: RunContext) -> None:
    from polar_deploy import report
    from polar_deploy.workspace import write_text

    document = report.build(run.folder, run.settings)
    document.write(run.path(REPORT))
    write_text(run.path(PAGE), report.page(document, report.read_samples(run.path(WORST_SAMPLES))))


def _fingerprint(run: RunContext) -> Fingerprint:
    from polar_deploy.report.outdated import depends_on

    return fingerprint(depends_on(run.settings))


STAGE = Stage(
    "report",
    _run,
    _fingerprint,
    reads=(GATES, GATED_GRAPH, SURGERY, BUILD, PARITY, WORST_SAMPLES, LATENCY_TABLE),
    looks_at=(MANIFEST, FULL_LOG, GATED_LOG),
    writes=(REPORT, PAGE),
)
