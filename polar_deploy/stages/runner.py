"""Running stages: each one unless what it wrote is up to date, in a folder that is this run's alone."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from polar_deploy import extras, targets, tasks
from polar_deploy.errors import ContentError, MachineError, PolarDeployError, UsageError
from polar_deploy.stages import STAGES, full, gates, report
from polar_deploy.stages.artefacts import SETTINGS
from polar_deploy.stages.context import RunContext
from polar_deploy.stages.stage import Stage
from polar_deploy.workspace import atomic_folder, write_text

if TYPE_CHECKING:
    from polar_deploy.config import Settings


def require_machine(settings: Settings, stages: Sequence[Stage], *, builds: bool = True) -> None:
    """Ask in milliseconds for what the stages need of this machine, before data is read or anything written.

    Args:
        settings: as given; the target has a name.
        stages: what is to run.
        builds: whether engines are really to be built, and not only planned.

    Raises:
        UsageError: no such target or device; or a latency budget without a table, where none can be measured.
        MachineError: a package is missing, or what the target needs to be built.
    """
    target = targets.parse(settings.target)
    if settings.device is not None:
        from polar_deploy import devices

        devices.load(settings.device)
    names = {stage.name for stage in stages}
    if builds and "build" in names:
        targets.check(target)
    limits_latency = settings.budget is not None and settings.budget.latency is not None
    if "gates" in names and limits_latency and settings.latency_is_measured and settings.latency_table is None:
        _require_measurable(target)
    needed = [package for stage in stages for package in stage.packages]
    if any(stage.reads_data for stage in stages):
        needed += tasks.packages(settings.task)
    for module, extra in dict.fromkeys(needed):
        if find_spec(module) is None:
            raise MachineError(f"{module} is not installed", f"install it, {extras.install(extra)}")


def _require_measurable(target: targets.Target) -> None:
    """A latency budget without a table: the target has to be here, so that one can be made."""
    if lacks := targets.lacks_to_build(target) + targets.lacks_to_run(target):
        raise UsageError(
            f"budget latency= needs a latency table, and {target.name} cannot be measured here: "
            f"{'; '.join(dict.fromkeys(lacks))}",
            "make one where it runs, with `polar-deploy engines table GATED.onnx` on the gated/model.onnx of "
            "any run of this model, and give it with --latency-table",
        )


def run_stages(run: RunContext, stages: Sequence[Stage]) -> None:
    """Run stages in order, in a folder that is locked; those that are up to date are left as they are.

    Raises:
        UsageError: a file is missing, or the budget is out of reach.
        MachineError: memory or disk space ran out.
        ContentError: a file is not what it should be, or a stage failed on it.
    """
    from polar_deploy import recipes
    from polar_deploy.tracking import tracked

    _preflight(run, stages)
    training = run.settings.training
    epochs = {"gates": training.epochs}
    if run.settings.full_weights is None:
        epochs["full"] = training.full_epochs
    run.progress.plan({stage.name: epochs[stage.name] for stage in stages if stage.name in epochs})
    with run.progress:
        if gates.STAGE in stages and run.measures_latency and not is_current(run, gates.STAGE):
            gates.require_reachable(run, measure=True)  # before an epoch is trained
        told = run.settings.model_dump(mode="json")
        _tell_changes(run, told)
        write_text(run.path(SETTINGS), recipes.dump(run.settings))
        with tracked(run.track, run.folder, told, run.progress) as run.trackers:
            ran = [stage for stage in stages if run_stage(run, stage)]
            if ran:
                _tell_left(run, stages)
            if report.STAGE in stages:
                run.trackers.result()


def _tell_left(run: RunContext, stages: Sequence[Stage]) -> None:
    """Tell which files are left of a run before, whose stages come after those that were run now."""
    later = STAGES[STAGES.index(stages[-1]) + 1 :]
    left = [stage.name for stage in later if any(path.is_file() for path in stage.outputs(run))]
    if left:
        run.progress.note(f"{', '.join(left)}: what is there is of the run before; it is made anew without --until")


def _tell_changes(run: RunContext, told: Mapping[str, Any]) -> None:
    """Tell which settings are not those that the folder was last worked with: what depends on them is made anew."""
    from polar_deploy import recipes
    from polar_deploy.tracking import flat

    path = run.path(SETTINGS)
    if not path.is_file():
        return
    try:
        before = dict(flat(recipes.load(path, {}).model_dump(mode="json")))
    except UsageError:  # of another version, whose settings had other names: there is nothing to compare with
        return
    changes = [f"{key} {before[key]} → {value}" for key, value in flat(told) if key in before and before[key] != value]
    if changes:
        run.progress.note(f"other settings than the last time in this folder: {', '.join(changes)}")


def _preflight(run: RunContext, stages: Sequence[Stage]) -> None:
    """Look at model, budget, weights and data before a folder is made or an epoch trained."""
    stages[0].inputs(run)
    builds = [stage for stage in stages if stage.builds_network]
    if builds and not (run.folder.is_dir() and all(run.workspace.has_stamp(stage.name) for stage in builds)):
        run.network()  # before data is downloaded for a model that there is not
    if any(stage.reads_data for stage in stages):
        _ = run.data
    stale = [stage for stage in builds if not is_current(run, stage)]
    if stale:  # else PyTorch is not even imported
        network = run.network()
        if full.STAGE in stages:
            full.load_given(run, network)
    if gates.STAGE in stale:
        gates.require_reachable(run)  # last: it takes an export


def is_current(run: RunContext, stage: Stage) -> bool:
    """Whether what a stage wrote is up to date; False too where a file that it reads is missing."""
    if not run.folder.is_dir():
        return False
    try:
        return run.workspace.is_current(stage.name, stage.fingerprint(run), stage.inputs(run), stage.outputs(run))
    except UsageError:
        return False


def run_stage(run: RunContext, stage: Stage) -> bool:
    """Run a stage unless all that it wrote is up to date, and clear its scratch files away. Returns whether it ran."""
    fingerprint, inputs = stage.fingerprint(run), stage.inputs(run)
    is_due = not run.workspace.is_current(stage.name, fingerprint, inputs, stage.outputs(run))
    if is_due:
        run.progress.stage(stage.name)
        if before := run.workspace.other_program(stage.name, fingerprint):
            run.progress.note(f"{stage.name}: made anew, what is there is by {before} and not {fingerprint.program}")
        keep_before(run, stage)
        run.workspace.invalidate(stage.name)
        with translated(stage.name):
            stage.run(run)
        if stage.cacheable(run):
            run.workspace.stamp(stage.name, fingerprint, inputs, stage.outputs(run))
    else:
        run.progress.up_to_date(stage.name)
    for artefact in stage.scratch:  # of an earlier run, too, that was killed when its stage was finished
        run.path(artefact).unlink(missing_ok=True)
    return is_due


def keep_before(run: RunContext, stage: Stage) -> None:
    """Copy what a stage trained otherwise, to its end or not, into a folder of its own: hours that go otherwise."""
    held = [path for path in map(run.path, (*stage.trained, *stage.scratch)) if path.is_file()]
    if not stage.trained or not held or not _is_trained_otherwise(run, stage):
        return
    names = itertools.chain(("before",), (f"before-{number}" for number in itertools.count(2)))
    place = next(path for path in (run.path(f"{stage.name}.{name}") for name in names) if not path.exists())
    with atomic_folder(place) as folder:
        for path in held:
            shutil.copy2(path, folder / path.name)
    run.progress.note(f"{stage.name}: what was trained before is kept in {place}")


def _is_trained_otherwise(run: RunContext, stage: Stage) -> bool:
    from polar_deploy.training import checkpoint

    fingerprint = stage.fingerprint(run)
    if run.workspace.has_stamp(stage.name):
        return run.workspace.is_of_another(stage.name, fingerprint, stage.inputs(run))
    begun = [path for path in map(run.path, stage.scratch) if path.is_file()]
    return any(not checkpoint.fits(path, str(fingerprint)) for path in begun)


@contextmanager
def translated(stage: str) -> Iterator[None]:
    """Inside, a stage does what it does. The user's own network and data run there: whatever they raise gets a code."""
    try:
        yield
    except (PolarDeployError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            todo = "use a smaller training.batch_size, or training.accumulate=2"
            raise MachineError(f"stage {stage}: {error}", todo) from error
        if "closed by peer" in str(error) or "Connection reset" in str(error):
            what = f"stage {stage}: another process of this run has ended"
            raise MachineError(what, "it has said why; the same command goes on from the last whole epoch") from error
        raise ContentError(
            f"stage {stage} failed: {type(error).__name__}: {error}",
            "see where with --debug; the same command goes on from here",
        ) from error
