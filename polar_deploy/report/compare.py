"""Several runs side by side: accuracy against latency, MACs and energy, and which of them are worth a choice.

A run is the folder that the pipeline wrote, or a folder with such folders in it, as a sweep leaves them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polar_deploy.documents.comparison import Comparison, Run, Score, What
from polar_deploy.documents.parity import Interval, Latency, known_drop
from polar_deploy.documents.part import Pair
from polar_deploy.documents.report import Report
from polar_deploy.errors import UsageError
from polar_deploy.report import formats, outdated

if TYPE_CHECKING:
    from rich.table import Table

_STEADY = 1.1  # by which times of one network may differ between runs before speed-ups alone are comparable
# What accuracy is held against: key of a run -> what it is called
COSTS: dict[What, str] = {"latency_ms": "latency", "macs": "MACs", "energy_mj": "energy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of such folders")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, too")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare runs on the terminal, and on a page where one is asked for."""
    from polar_deploy.workspace import write_text

    compared = compare(arguments.runs)
    if arguments.html:
        from polar_deploy.report.plots import page

        write_text(arguments.html, page(compared))
    if arguments.json:
        print(json.dumps(compared.as_json(), indent=1, allow_nan=False))
        return 0
    from polar_deploy.progress import console

    terminal = console(least=72)
    terminal.print(table(compared))
    for note in compared.notes:
        terminal.print(note, markup=False, highlight=False)
    if arguments.html:
        print(f"page: {arguments.html}")
    return 0


def compare(paths: Sequence[Path]) -> Comparison:
    """The figures of some runs, in the order of their latency; those that did not run come last.

    Raises:
        UsageError: there is no run at one of the paths, or one whose accuracy nobody knows.
        ContentError: a report.json is damaged, or of another version.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _folders(path)))
    for folder in folders:
        outdated.warn(folder, "report")
    names = _names(folders)
    runs = [_run(folder / "report.json", name) for folder, name in zip(folders, names, strict=True)]
    runs.sort(key=lambda each: each.latency_ms.compressed.median if each.latency_ms else float("inf"))
    best = [{cost: _is_best(each, runs, cost) for cost in COSTS} for each in runs]
    ordered = [
        each.model_copy(update={"best": found, "number": number})
        for number, (each, found) in enumerate(zip(runs, best, strict=True), 1)
    ]
    return Comparison(schema=1, runs=ordered, notes=_notes(ordered))


def _folders(path: Path) -> list[Path]:
    if (path / "report.json").is_file():
        return [path]
    found = sorted(each.parent for each in path.glob("*/report.json") if (each.parent / "run.yaml").is_file())
    if not found:
        what = f"{path} has no report.json, and none of its folders has"
        raise UsageError(what, "give folders of runs that came to their end; `--from report` makes a missing one")
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """Folders by their last part, by the last two where that is not enough, or in full."""
    for parts in (1, 2):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _run(path: Path, name: str) -> Run:
    """What is compared of one run."""
    report = Report.read(path)
    counted, known, metric, timed = report.counted, known_drop(report.counted), report.metric, report.timed
    if metric is None or counted is None or counted.full is None or counted.compressed is None or known is None:
        raise UsageError(f"{path} has no accuracy", "compare runs whose parity stage has run, on a test set that tells")
    drop, low, high = known
    spent = timed.energy_mj if timed else None
    each = {name: getattr(report, name) for name in ("model", "data", "target", "seed", "macs", "params", "bytes")}
    return Run(
        name=name,
        **each,
        blocks=report.blocks,
        metric=metric,
        machine=report.machine.cpu,
        batch=report.verdict.batch,
        result=report.verdict.overall.result,
        reason=report.verdict.overall.reason,
        budget=report.budget.asked,
        accuracy=Score(full=counted.full, compressed=counted.compressed, drop=drop, interval=(low, high)),
        measured=report.accuracy is not None,
        latency_ms=Pair(full=_interval(timed.full), compressed=_interval(timed.compressed)) if timed else None,
        speedup=timed.speedup if timed and timed.decided else None,
        energy_mj=Pair(full=spent.full / timed.batch, compressed=spent.compressed / timed.batch)
        if timed and spent and spent.full and spent.compressed
        else None,
        best={},
        number=0,
    )


def _interval(latency: Latency) -> Interval:
    return Interval(latency.median_ms, latency.low_ms, latency.high_ms)


def interval_of(run: Run, cost: What, which: Literal["full", "compressed"] = "compressed") -> Interval | None:
    """One run's figure of one of `COSTS`, as an interval without width where it has none; None: not measured."""
    found = getattr(run, cost) and getattr(getattr(run, cost), which)
    return found if found is None or isinstance(found, Interval) else Interval(found, found, found)


def _is_best(run: Run, runs: Sequence[Run], cost: What) -> bool:
    """Whether no comparable run is at least as accurate and as cheap, and better in one of the two."""
    own = interval_of(run, cost)
    if own is None:
        return False
    mine = (own.median, -run.accuracy.compressed)
    for other in runs:
        theirs = interval_of(other, cost)
        if theirs is None or circumstances(other, cost) != circumstances(run, cost):
            continue
        rival = (theirs.median, -other.accuracy.compressed)
        if rival != mine and rival[0] <= mine[0] and rival[1] <= mine[1]:
            return False
    return True


def circumstances(run: Run, cost: What) -> tuple[object, ...]:
    """What has to be the same for figures to be comparable: data, metric; and for what is measured, all it is on."""
    common = run.data, run.metric.name
    return common if cost == "macs" else (*common, run.target, run.machine, run.batch)


def _notes(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before he compares."""
    notes = []
    if len({run.data for run in runs}) > 1:
        notes.append("These runs are of different data sets: their scores cannot be compared.")
    if len({run.metric.name for run in runs}) > 1:
        notes.append("These runs are judged by different metrics: their scores cannot be compared.")
    if len({circumstances(run, "latency_ms")[2:] for run in runs if run.latency_ms}) > 1:
        notes.append(
            "Not all were timed on the same target, machine and batch: compare their speed-ups, not their times."
        )
    notes.extend(_unsteady(runs))
    for what, left_out in (
        ("was not timed", [run for run in runs if not run.latency_ms]),
        ("was timed on a machine too noisy to tell", [run for run in runs if run.latency_ms and not run.speedup]),
    ):
        notes.extend(f"{run.name} {what}." for run in left_out)
    return notes


def _unsteady(runs: Sequence[Run]) -> list[str]:
    """What to make of times, where the same full network took now more and now less of it."""
    full: dict[object, list[float]] = {}
    for run in runs:
        if run.latency_ms:
            full.setdefault((run.model, circumstances(run, "latency_ms")), []).append(run.latency_ms.full.median)
    ends = max(
        ((min(times), max(times)) for times in full.values()), key=lambda each: each[1] / each[0], default=(1, 1)
    )
    if ends[1] <= _STEADY * ends[0]:
        return []
    fastest, slowest = (formats.milliseconds(each) for each in ends)
    told = f"The full network itself took {fastest} in one run and {slowest} in another"
    return [f"{told}: compare their speed-ups, not their times."]


def score_name(runs: Sequence[Run]) -> str:
    """What all runs are judged by; "score", where that differs."""
    names = {run.metric.name for run in runs}
    return names.pop() if len(names) == 1 else "score"


def change_of(run: Run) -> str:
    """How the score of a run changes; points, where it is a percentage, without a word."""
    drop, unit = run.accuracy.drop, run.metric.unit
    return formats.points(drop) if unit == "%" else formats.change(drop, unit)


def table(compared: Comparison) -> Table:
    """The runs as a table for the terminal; a star: nothing else is as accurate and as fast."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    star = "* no other run is as accurate and as fast"
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=star, caption_justify="left")
    grid.add_column("#", justify="right", no_wrap=True)
    grid.add_column("run", overflow="fold", min_width=12)
    change = "points" if all(run.metric.unit == "%" for run in compared.runs) else "change"
    for heading in ("verdict", score_name(compared.runs), change, "latency", "speed-up", "MACs"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for run in compared.runs:
        cells = (
            run.result,
            formats.score(run.accuracy.compressed, run.metric.unit),
            change_of(run),
            formats.milliseconds(run.latency_ms.compressed.median) if run.latency_ms else "–",
            formats.times(run.speedup.median) if run.speedup else "–",
            formats.share(run.macs.ratio),
        )
        grid.add_row(f"{run.number}{'*' if run.best['latency_ms'] else ''}", Text(run.name), *cells)
    return grid
