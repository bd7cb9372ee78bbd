"""parity: both engines on the same test set and on the same clock, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.stages.artefacts import (
    BUNDLE,
    COMPRESSED_GRAPH,
    ENGINE_FOLDER,
    ENGINES,
    FULL_GRAPH,
    GATED_GRAPH,
    PARITY,
    REFERENCE,
    WORST_SAMPLES,
)
from polar_deploy.stages.stage import ONNXRUNTIME, Stage, fingerprint

if TYPE_CHECKING:
    from polar_deploy.documents.parity import Compared
    from polar_deploy.engines import Engine
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint

_GRAPHS = (FULL_GRAPH, COMPRESSED_GRAPH, GATED_GRAPH)


def _run(run: RunContext) -> None:
    from polar_deploy.documents.parity import Parity
    from polar_deploy.parity.samples import write_worst
    from polar_deploy.workspace import remove_folder

    result, built = _compared(run)
    worst = [each.index for each in result.worst_samples or ()]
    write_worst(run.path(WORST_SAMPLES), worst, run.task, run.data.test, built)
    Parity(**result.entries(), files=_judged_files(run), class_names=list(run.data.class_names)).write(run.path(PARITY))
    if result.verdict.overall.result == "fail":
        remove_folder(run.path(BUNDLE))  # of an earlier verdict


def _compared(run: RunContext) -> tuple[Compared, dict[str, Engine]]:
    """What parity.json holds, and the engines that it is about, where these run here."""
    from polar_deploy import engines, parity, targets

    settings = run.settings
    test, metric = run.data.test, run.task.metric
    full, compressed, gated = (engines.reference_engine(run.path(graph)) for graph in _GRAPHS)
    graphs = parity.Graphs(full, compressed, gated, run.path(REFERENCE))
    if lacks := targets.lacks_to_run(run.target):
        return parity.not_run("; ".join(lacks), test, metric, settings.accept, graphs), {}
    folder, batches = run.path(ENGINE_FOLDER), settings.build.batches
    built = {name: engines.load(folder, name, run.target) for name in ("full", "compressed")}
    both = built["full"], built["compressed"]
    return parity.compare(*both, test, metric, settings.accept, graphs=graphs, batches=batches), built


def _judged_files(run: RunContext) -> dict[str, str]:
    """Hashes of the graphs and engines that the verdict is about, so that whoever hands them on can tell them again."""
    from polar_deploy import onnx_files
    from polar_deploy.workspace import sha256

    judged = [each for each in (*_GRAPHS, *ENGINES) if each.expected(run) and not each.name.endswith(".json")]
    files = onnx_files.with_data(map(run.path, judged))
    return {path.relative_to(run.folder).as_posix(): sha256(path) for path in files}


def _fingerprint(run: RunContext) -> Fingerprint:
    from polar_deploy import targets
    from polar_deploy.engines import machine

    settings = run.settings.model_dump(mode="json", include={"target", "build", "accept", "normalize"})
    # What was measured on one machine, or could not run on it, says nothing about another.
    machine_here, lacks = machine.describe().as_json(), targets.lacks_to_run(run.target)
    here = {"machine": machine_here, **targets.identity(run.target), "lacks": lacks}
    return fingerprint(settings | {"data": run.data.fingerprint(), "here": here})


def _decided(run: RunContext) -> bool:
    """Whether the same would come out again: a noisy machine may be quieter the next time, a test set stays."""
    from polar_deploy.documents.parity import Parity

    parity = Parity.read(run.path(PARITY))
    verdict = parity.verdict
    return parity.not_run is not None or "undecided" not in (verdict.overall.result, verdict.latency.result)


STAGE = Stage(
    "parity",
    _run,
    _fingerprint,
    # Not build.json: it tells how long the build took, too, and a verdict follows from the engines alone.
    reads=(*ENGINES, *_GRAPHS, REFERENCE),
    writes=(PARITY, WORST_SAMPLES),
    packages=ONNXRUNTIME,
    reads_data=True,
    cacheable=_decided,
)
