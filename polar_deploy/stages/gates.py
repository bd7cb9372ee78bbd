"""gates: one training run in which gates learn which channels and blocks stay, under the budget."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from polar_deploy.errors import UsageError
from polar_deploy.stages.artefacts import (
    FULL_WEIGHTS,
    GATED_CHECKPOINT,
    GATED_LOG,
    GATED_WEIGHTS,
    GATES,
    LATENCY_TABLE,
)
from polar_deploy.stages.stage import TORCH, Stage, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from polar_deploy.devices import Chosen
    from polar_deploy.documents.latency_table import MeasuredTable
    from polar_deploy.gating.choice import Limits, Measured
    from polar_deploy.gating.gates import Gates
    from polar_deploy.latency import LatencyTable
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint


def _run(run: RunContext) -> None:
    from polar_deploy import models
    from polar_deploy.gating.document import document

    settings = run.settings
    network, gates, share = train(run)
    models.save_weights(network, run.path(GATED_WEIGHTS))
    shapes = {name: list(spec.shape) for name, spec in run.task.inputs.items()}
    document(settings.model, shapes, settings.align, run.device, gates, share).write(run.path(GATES))


def train(run: RunContext) -> tuple[nn.Module, Gates, list[float]]:
    """The trained network, its gates, and the share of samples that opened each; every process of a run does this."""
    from polar_deploy.gating.processes import share_network
    from polar_deploy.stages.training import training_job
    from polar_deploy.training.gated import train_gated
    from polar_deploy.training.loop import prepare

    settings = run.settings
    network = run.full_network() if settings.training.init_from == "full" else run.network()
    fit = training_job(run, "gates", "gated", network, settings.training.epochs, _fingerprint(run))
    gates = gates_on(run, fit.network, fit.epochs * fit.train.steps)
    teaches = settings.training.distill and run.task.distill is not None
    teacher = share_network(prepare(run.full_network(), settings, fit.device)) if teaches else None
    state = train_gated(fit, gates, teacher, run.progress)
    assert state.freeze is not None  # training ends with gates that are fixed
    return network, gates, state.freeze.share


def gates_on(run: RunContext, network: nn.Module, steps: int) -> Gates:
    """Gates on `network`, for a run of so many steps."""
    from polar_deploy.gating.gates import Gates

    settings = run.settings
    return Gates(
        network,
        run.example(),
        run.budget,
        steps,
        align=settings.align,
        device=run.device,
        min_width=settings.gates.min_width,
        mode=settings.gates.mode,
        close_from=settings.gates.close_from,
        freeze_at=settings.gates.freeze_at,
        latency_table=latency_table(run) if run.measures_latency else None,
        measured=_measured(run) if run.measures_latency and settings.latency_table is None else None,
        rehearse=0,
        analysis=run.analysis,
    )


def limits(run: RunContext) -> Limits:
    """The widths that layers may take."""
    from polar_deploy.gating.choice import Limits

    offers = run.device.offers if run.device else None
    return Limits.of(run.analysis.choices, run.settings.align, run.settings.gates.min_width, offers)


def require_reachable(run: RunContext, *, measure: bool = False) -> None:
    """Raise UsageError where no sub-network is within the budgets; of the default ones, half of the MACs comes last.

    Args:
        run: to `measure`, its folder has to be locked.
        measure: whether a latency table is measured if need be; else latency counts only where it is known.
    """
    from polar_deploy.gating import budgets
    from polar_deploy.resolved import HALF

    latency = latency_table(run) if measure else known_latency(run)
    try:
        budgets.require_reachable(run.analysis.choices, limits(run), run.budget, latency)
    except UsageError as error:
        if not run.default_budget or run.settings.budget == HALF:
            raise
        run.settings = run.settings.model_copy(update={"budget": HALF})
        run.progress.note(f"gates: half of the MACs is the budget: the default {error.what}")
        require_reachable(run)


def known_latency(run: RunContext) -> LatencyTable | Chosen | None:
    """What tells latency without a measurement: the table that was given, or else the device's file."""
    from polar_deploy import latency

    given = run.settings.latency_table
    return run.device if given is None else latency.read(given, run.target.name, run.settings.accept.batch)


def latency_table(run: RunContext) -> LatencyTable:
    """The table of a latency budget, which then lies in the run's folder: the one given, or else made here.

    One that was made here before, of the same network and settings, on the same machine and by the same program, is
    used again. So is any by which a half-trained network was chosen: it shall go on under the budget it began with.
    """
    from polar_deploy import latency
    from polar_deploy.training import checkpoint
    from polar_deploy.workspace import read_json, write_json

    path, target, batch = run.path(LATENCY_TABLE), run.target.name, run.settings.accept.batch
    if not run.leads:
        return latency.read(path, target, batch)  # the first process's
    if run.settings.latency_table is not None:
        write_json(path, read_json(run.settings.latency_table))
        return latency.read(path, target, batch)
    key = str(_table_fingerprint(run))
    known = latency.key(path) if path.is_file() else None
    begun = known is not None and checkpoint.fits(run.path(GATED_CHECKPOINT), str(_fingerprint(run)))
    if known != key and not begun:
        _measured_table(run).model_copy(update={"key": key}).write(path)
    return latency.read(path, target, batch)


def _measured_table(run: RunContext) -> MeasuredTable:
    """A latency table of the network."""
    from polar_deploy.engines import latency_table
    from polar_deploy.gating import budgets

    def likely(table: LatencyTable) -> list[dict[str, int]]:
        return budgets.likely(run.analysis.choices, limits(run), run.budget, table)

    run.progress.stage("latency table")
    with _open_graph(run) as gated:
        batch, options = run.settings.accept.batch, run.settings.build
        return latency_table.make(gated, run.target, batch, options, likely, run.progress.detail)


def _measured(run: RunContext) -> Measured:
    """Measures a sub-network here, as whole as it will run; a table that was given may be of another machine."""
    from polar_deploy.engines.table import Bench

    def share(opened: Mapping[str, int]) -> float:
        with _open_graph(run) as gated:
            bench = Bench(gated, gated.parent, run.target, run.settings.accept.batch, run.settings.build)
            left = 1 - bench.saved(opened)
        run.progress.note(
            f"gates: what was chosen takes {left:.2f} of the latency, {run.budget['latency']:.2f} is asked"
        )
        return left

    return share


@contextmanager
def _open_graph(run: RunContext) -> Iterator[Path]:
    """The network with all gates open, in a folder that goes with it; untrained: weights do not matter to latency."""
    from polar_deploy.gating.deploy import write_open

    with TemporaryDirectory(prefix="polar_deploy-") as folder:
        gated = Path(folder, "gated.onnx")
        write_open(run.network(), run.analysis, gated)
        yield gated


def _fingerprint(run: RunContext) -> Fingerprint:
    depends_on = run.settings.model_dump(mode="json", include={"budget", "align", "gates", "training"})
    del depends_on["training"]["full_epochs"]
    if run.device:
        depends_on["widths"] = run.device.device.model_dump(mode="json")
    if "latency" in run.budget:
        build = run.settings.build.model_dump(mode="json")
        depends_on |= {"target": run.target.name, "batch": run.settings.accept.batch, "build": build}
    return fingerprint(run.basis | depends_on, trained=True)


def _table_fingerprint(run: RunContext) -> Fingerprint:
    from polar_deploy import targets
    from polar_deploy.engines import machine

    settings = run.settings.model_dump(mode="json", include={"model", "input_size", "target", "build"})
    settings |= {"blocks": run.settings.gates.blocks, "heads": run.settings.gates.heads}
    settings["shapes"] = [
        {name: spec.shape for name, spec in ends.items()} for ends in (run.task.inputs, run.task.outputs)
    ]
    here = {"machine": machine.describe().as_json(), "target": targets.identity(run.target)}
    return fingerprint({**settings, "batch": run.settings.accept.batch, "here": here})


def _given(run: RunContext) -> list[Path]:
    table = run.settings.latency_table
    return [table] if table is not None and "latency" in run.budget else []


STAGE = Stage(
    "gates",
    _run,
    _fingerprint,
    reads=(FULL_WEIGHTS,),
    given=_given,
    writes=(GATED_WEIGHTS, GATES, GATED_LOG, LATENCY_TABLE),
    trained=(GATED_WEIGHTS, GATES, GATED_LOG),
    scratch=(GATED_CHECKPOINT,),
    packages=TORCH,
    builds_network=True,
    reads_data=True,
)
