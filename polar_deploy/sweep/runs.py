"""Runs of a sweep on Ray: what they train side by side, and what has to have the machine to itself.

Ray starts what can be trained, here or on a cluster: a full network as soon as there is room, and networks with gates
as soon as their full network is there. What two runs share is trained once: the full networks of all budgets of a seed
are the same, and where widths do not depend on the target so are the gated ones. Latency is measured in the process
that was started, one run after the other: tables of latency budgets before anything is trained, engines when all is.
So no run disturbs the clock of another.

There is nothing to remember: runs are folders, whose finished stages are up to date, and the same command goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy.errors import MachineError, PolarDeployError, first_line
from polar_deploy.stages import between, full, gates
from polar_deploy.stages.artefacts import LATENCY_TABLE, Artefact
from polar_deploy.stages.context import RunContext
from polar_deploy.stages.runner import is_current, keep_before, run_stages

if TYPE_CHECKING:
    from polar_deploy.progress import Progress
    from polar_deploy.resolved import ResolvedSettings
    from polar_deploy.stages.stage import Stage
    from polar_deploy.sweep.plan import Planned

TRAINED = between("full", "surgery")  # what is done side by side
LOG = Artefact("run.log")  # what the run said while it was trained
_PATIENCE = 60.0  # seconds that a process of a sweep that was killed may take to end


@dataclass(frozen=True)
class Ended:
    """How a run, or a part of it, ended: its exit code, and the error where there was one."""

    code: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Room:
    """Where runs are trained.

    Attributes:
        address: of a Ray cluster, "auto" for the one that this machine belongs to; None: this machine alone.
        workers: how many runs are trained at once on this machine.
        cpus, gpus: what Ray sets aside for each; None: a GPU where there are any.
        track: services that are told of each run, see `polar_deploy.tracking`.
    """

    address: str | None
    workers: int
    cpus: int
    gpus: float | None
    track: Sequence[str] = ()


def run_all(planned: Sequence[Planned], room: Room, progress: Progress) -> dict[str, Ended]:
    """Bring all runs to their end; how each ended, by its name. One that fails leaves the others alone."""
    runs = {each.name: RunContext(each.settings, each.folder, progress, track=room.track) for each in planned}
    data = next(iter(runs.values())).data  # of all of them
    for run in runs.values():
        vars(run)["data"] = data
    ended = {name: _caught(lambda run=run: _measure(run)) for name, run in runs.items()}  # type: ignore[misc]
    for name in ended:
        runs[name] = _with_table(runs[name])
    waiting = {name: run for name, run in runs.items() if not ended[name].error and not _is_trained(run)}
    if waiting:
        ended |= _train_all(waiting, room, progress)
    for name, run in runs.items():
        if not ended[name].error:
            ended[name] = _caught(lambda run=run: _time(run, runs.values()))  # type: ignore[misc]
        if error := ended[name].error:
            progress.note(f"{name}: {error.splitlines()[0]}")
    return ended


def _measure(run: RunContext) -> int:
    """The latency table of a budget that needs one, while nothing else runs."""
    if run.measures_latency and not is_current(_with_table(run), gates.STAGE):
        with run.workspace.locked(_PATIENCE):
            gates.require_reachable(run, measure=True)
    return 0


def _with_table(run: RunContext) -> RunContext:
    """The run with its latency table as given: no worker, on another machine perhaps, is to measure it again."""
    table = run.path(LATENCY_TABLE)
    if not run.measures_latency or run.settings.latency_table is not None or not table.is_file():
        return run
    given = replace(run, settings=run.settings.model_copy(update={"latency_table": table}))
    vars(given)["data"] = run.data  # which is not read again
    return given


def _is_trained(run: RunContext) -> bool:
    return all(is_current(run, stage) for stage in TRAINED)


def _train_all(runs: dict[str, RunContext], room: Room, progress: Progress) -> dict[str, Ended]:
    """Train on Ray, which decides when and where: it knows what each part waits for."""
    with _ray(room) as ray:
        gpus = room.gpus if room.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        task = ray.remote(num_cpus=room.cpus, num_gpus=gpus, max_retries=0)(_train)
        first: dict[str, tuple[RunContext, Any]] = {}  # by what is trained: the run that does, and what Ray promises
        promised: dict[str, Any] = {}
        for name, run in runs.items():
            for stage, last in ((full.STAGE, "full"), (gates.STAGE, "surgery")):
                key = _key(run, stage)
                if key not in first:
                    donor, promise = first.get(_key(run, full.STAGE), (run, None))
                    first[key] = (
                        run,
                        task.remote(_Part(run.settings, run.folder, last, donor.folder, room.track), promise),
                    )
            promised[name] = first[_key(run, gates.STAGE)][1]
        names = {promise: [name for name in promised if promised[name] == promise] for promise in promised.values()}
        left, ended = list(names), {}
        while left:
            (done,), left = ray.wait(left)
            for name in names[done]:
                ended[name] = _fetched(ray, done)
                progress.note(f"{name}: {'trained' if not ended[name].error else 'failed'}")
        return ended


def _key(run: RunContext, stage: Stage) -> str:
    """What two runs have to have in common for one of them to train for both."""
    above = "" if stage is full.STAGE else _key(run, full.STAGE)
    return f"{above} {stage.name} {stage.fingerprint(run)}"


@contextmanager
def _ray(room: Room) -> Iterator[Any]:
    """Ray, for as long as runs are trained."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a run leaves the machine unasked
    where: dict[str, Any] = {"address": room.address} if room.address else {"num_cpus": room.workers * room.cpus}
    try:
        ray.init(**where, include_dashboard=False, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError) as error:
        what = f"Ray does not start{f' at {room.address}' if room.address else ''}: {first_line(error)}"
        raise MachineError(what, "see `ray status`, or leave --address out") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _fetched(ray: Any, promise: Any) -> Ended:
    try:
        found: Ended = ray.get(promise)
    except ray.exceptions.RayError as error:  # the process died, or its machine
        return Ended(MachineError.exit_code, f"Ray lost the run: {str(error).strip().splitlines()[-1]}")
    return found


@dataclass(frozen=True)
class _Part:
    """What a process of Ray's is to train: a run's stages up to `last`, with what the donor's run has trained."""

    settings: ResolvedSettings
    folder: Path
    last: str
    donor: Path
    track: Sequence[str]


def _train(part: _Part, before: Ended | None) -> Ended:
    """In a process of Ray's: train, unless what it builds on (`before`) failed."""
    from polar_deploy.progress import Progress, console

    if before is not None and before.error:
        return before
    part.folder.mkdir(parents=True, exist_ok=True)
    with open(part.folder / LOG, "a", encoding="utf-8") as log:
        progress = Progress(console(file=log, width=200))
        run = RunContext(part.settings, part.folder, progress, track=part.track)
        return _caught(lambda: _run(run, between("full", part.last), part.donor))


def _run(run: RunContext, stages: Sequence[Stage], donor: Path) -> int:
    with run.workspace.locked(_PATIENCE):
        if donor != run.folder:
            adopt(run, donor)
        run_stages(run, stages)
    return 0


def adopt(run: RunContext, donor: Path) -> None:
    """Copy what another run has finished of the stages that train, as far as it is what this run would make."""
    for stage in TRAINED:
        stamp = Path("stamps", f"{stage.name}.json")
        if is_current(run, stage) or not (donor / stamp).is_file():
            continue
        keep_before(run, stage)
        for name in [*map(Path, stage.writes), stamp]:
            if (donor / name).is_file():
                run.path(name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(donor / name, run.path(name))
        if not is_current(run, stage):  # it is of other settings
            run.workspace.invalidate(stage.name)
            return


def _time(run: RunContext, others: Collection[RunContext]) -> int:
    """Build and compare, with the machine to itself; returns the verdict's exit code."""
    from polar_deploy.documents.parity import Parity
    from polar_deploy.stages.artefacts import PARITY

    key = _key(run, gates.STAGE)
    donors = [other.folder for other in others if other.folder != run.folder and _key(other, gates.STAGE) == key]
    with run.workspace.locked(_PATIENCE):
        for donor in () if _is_trained(run) else donors:
            adopt(run, donor)
        run_stages(run, between("full", "report"))
    return Parity.read(run.path(PARITY)).verdict.exit_code


def _caught(work: Callable[[], int]) -> Ended:
    """What came of a part of a run: one that fails must not end the others."""
    from polar_deploy.commands import exit_code

    try:
        return Ended(work())
    except PolarDeployError as error:
        return Ended(error.exit_code, str(error))
    except (MemoryError, OSError) as error:
        return Ended(exit_code(error), str(error))
