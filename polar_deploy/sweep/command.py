"""Run budgets × seeds × targets: trained side by side on Ray, timed one after the other, with one table in the end.

The same command goes on after a kill. Its exit code is 0 when all runs came to their end, whatever their verdict;
otherwise that of the first one that did not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy import extras
from polar_deploy.errors import MachineError, UsageError
from polar_deploy.tracking import LIBRARIES, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_deploy.sweep.plan import Planned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `polar-deploy sweep`."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the YAML file of a sweep: recipe, settings, budgets, seeds, targets")
    add("--out", metavar="DIR", type=Path, help="folder of the runs and their results (default: sweeps/NAME)")
    add("--workers", metavar="N", type=_count, help="runs trained at once here (default: one a GPU, or two cores)")
    add("--address", metavar="ADDRESS", help="train on this Ray cluster; auto: the one that this machine belongs to")
    add("--cpus-per-run", metavar="N", type=_count, default=1, help="cores that Ray sets aside for a run (default: 1)")
    add(
        "--gpus-per-run", metavar="X", type=float, help="the same of GPUs, 0.5: two runs share one (default: 1, if any)"
    )
    add("--track", metavar="SERVICE", action="append", default=[], choices=tuple(LIBRARIES), help="as of a run")
    add("--dry-run", action="store_true", help="print the runs")
    add("--json", action="store_true", help="print the results as JSON")
    add("--quiet", action="store_true", help="show no progress, only the results and errors")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep, write its results, and print them."""
    from polar_deploy.progress import Progress, console
    from polar_deploy.stages import STAGES
    from polar_deploy.stages.runner import require_machine
    from polar_deploy.sweep.plan import planned
    from polar_deploy.sweep.results import document, table
    from polar_deploy.sweep.runs import Room, run_all
    from polar_deploy.workspace import Workspace

    if arguments.gpus_per_run is not None and not arguments.gpus_per_run >= 0:
        raise UsageError(f"--gpus-per-run {arguments.gpus_per_run}: less than none", "give 0, a part of one, or more")
    folder = arguments.out or Path("sweeps", arguments.file.stem)
    runs = planned(arguments.file, folder)
    for each in runs:
        require_machine(each.settings, STAGES)
    if arguments.dry_run:
        print(json.dumps([each.name for each in runs], indent=1) if arguments.json else _listed(runs))
        return 0
    _require_ray()
    require(arguments.track)
    room = Room(
        arguments.address,
        arguments.workers or _workers_here(),
        arguments.cpus_per_run,
        arguments.gpus_per_run,
        arguments.track,
    )
    with Workspace(folder).locked():
        ended = run_all(runs, room, Progress(quiet=arguments.quiet))
        found = document(folder.name, runs, ended)
        found.write(folder / "results.json")
    if arguments.json:
        print(json.dumps(found.as_json(), indent=1, allow_nan=False))
    else:
        terminal = console(least=72)
        terminal.print(table(found))
        for note in found.notes:
            terminal.print(note, markup=False, highlight=False)
        print(f"results: {folder / 'results.json'}\neach run: polar-deploy report compare {folder}")
    return next((each.code for each in ended.values() if each.error), 0)


def _listed(runs: Sequence[Planned]) -> str:
    return "\n".join([*(str(each.folder) for each in runs), f"{len(runs)} runs"])


def _require_ray() -> None:
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise MachineError("ray is not installed", f"install it, {extras.install('sweep')}")


def _workers_here() -> int:
    """One a GPU; without GPUs one for each two cores, since training on fewer is slow and loading takes its own."""
    import torch

    from polar_deploy.engines.machine import cores

    return torch.cuda.device_count() or max(1, cores() // 2)
