"""build: the target's types in both graphs, and an engine of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.stages.artefacts import BUILD, COMPRESSED_GRAPH, ENGINE_FOLDER, ENGINES, FULL_GRAPH
from polar_deploy.stages.stage import ONNXRUNTIME, Stage, fingerprint

if TYPE_CHECKING:
    from polar_deploy.engines import Array
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint


def _run(run: RunContext) -> None:
    from polar_deploy import engines

    sources = run.path(FULL_GRAPH), run.path(COMPRESSED_GRAPH)
    calibration = _calibration(run) if _reads_samples(run) else None
    built = engines.build_all(*sources, run.path(ENGINE_FOLDER), run.target, run.settings.build, calibration)
    built.write(run.path(BUILD))


def _reads_samples(run: RunContext) -> bool:
    """Whether types are proven on samples: of INT8 always, and where noise would be no input."""
    return run.target.precision == "int8" or any(spec.dtype != "float32" for spec in run.task.inputs.values())


def _calibration(run: RunContext) -> dict[str, Array]:
    """Inputs of training samples, un-augmented, none of those that choices were validated on."""
    from polar_deploy.tasks import draw_inputs

    count = run.settings.build.calibration.images
    return draw_inputs(run.data.train, run.split[0], count, run.settings.seed)


def _fingerprint(run: RunContext) -> Fingerprint:
    from polar_deploy import targets

    settings = run.settings.model_dump(mode="json", include={"target", "build"})
    depends_on = settings | {"here": targets.identity(run.target)}
    if _reads_samples(run):
        depends_on |= run.basis | {"train_on_validation": run.settings.training.train_on_validation}
    return fingerprint(depends_on)


STAGE = Stage(
    "build",
    _run,
    _fingerprint,
    reads=(FULL_GRAPH, COMPRESSED_GRAPH),
    writes=(*ENGINES, BUILD),
    packages=ONNXRUNTIME,
)
