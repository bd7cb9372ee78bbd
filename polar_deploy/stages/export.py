"""export: both networks as ONNX graphs, all layers at full size; in the gated one each gate is a Mul by 0 or 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.stages.artefacts import (
    FULL_GRAPH,
    FULL_WEIGHTS,
    GATED_GRAPH,
    GATED_WEIGHTS,
    GATES,
    REFERENCE,
)
from polar_deploy.stages.stage import ONNXRUNTIME, TORCH, Stage, fingerprint

if TYPE_CHECKING:
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint

REFERENCE_SAMPLES = 32


def _run(run: RunContext) -> None:
    from polar_deploy import export, models, reference
    from polar_deploy.gating import deploy
    from polar_deploy.gating.document import read_open
    from polar_deploy.tasks import draw_inputs

    full, network = run.full_network(), run.network()
    models.load_weights(network, run.path(GATED_WEIGHTS))
    opened = read_open(run.analysis.choices, run.path(GATES))
    unseen = run.split[1] if len(run.split[1]) else run.split[0]  # that no network was trained on, if there are any
    task = run.task
    inputs = draw_inputs(run.data.train, unseen, REFERENCE_SAMPLES, run.settings.seed)
    outputs = {"full": reference.outputs(task, full, inputs)}
    names = {"inputs": tuple(task.inputs), "outputs": tuple(outputs["full"])}
    export.save(export.with_weights(run.analysis.structure, full), run.path(FULL_GRAPH), **names)
    with deploy.masked(network, run.analysis, opened):
        deploy.export(network, run.analysis, run.path(GATED_GRAPH), **names)
        outputs["gated"] = reference.outputs(task, network, inputs)
    for graph, expected in zip((FULL_GRAPH, GATED_GRAPH), outputs.values(), strict=True):
        export.check(run.path(graph), inputs, expected)
    reference.write(run.path(REFERENCE), inputs, outputs)


def _fingerprint(run: RunContext) -> Fingerprint:
    return fingerprint(run.basis)


STAGE = Stage(
    "export",
    _run,
    _fingerprint,
    reads=(FULL_WEIGHTS, GATED_WEIGHTS, GATES),
    writes=(FULL_GRAPH, GATED_GRAPH, REFERENCE),
    packages=(*TORCH, ("onnxscript", "train"), *ONNXRUNTIME),
    builds_network=True,
    reads_data=True,
)
