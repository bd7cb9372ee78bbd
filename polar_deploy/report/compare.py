"""Several runs side by side: accuracy against latency, MACs and energy, and which of them are worth a choice.

A run is the folder that the pipeline wrote, or a folder with such folders in it, as a sweep leaves them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy.errors import UsageError
from polar_deploy.report import formats
from polar_deploy.report.document import JsonFile

if TYPE_CHECKING:
    from rich.table import Table

# What accuracy is held against: key of a run -> what it is called
COSTS = {"latency_ms": "latency", "macs": "MACs", "energy_mj": "energy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of such folders")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots, too")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare runs on the terminal, and on a page where one is asked for."""
    from polar_deploy.workspace import atomic_path

    compared = compare(arguments.runs)
    if arguments.html:
        from polar_deploy.report.plots import page

        with atomic_path(arguments.html) as temporary:
            temporary.write_text(page(compared), encoding="utf-8")
    if arguments.json:
        print(json.dumps(compared, indent=1, allow_nan=False))
        return 0
    from polar_deploy.progress import console

    terminal = console()
    terminal.print(table(compared))
    for note in compared["notes"]:
        terminal.print(note, markup=False, highlight=False)
    if arguments.html:
        print(f"page: {arguments.html}")
    return 0


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """The figures of some runs, in the order of their latency; those that did not run come last.

    Raises:
        UsageError: there is no run at one of the paths.
        ContentError: a report.json lacks a figure.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _folders(path)))
    names = _names(folders)
    runs = [_figures(JsonFile(folder / "report.json"), name) for folder, name in zip(folders, names, strict=True)]
    runs.sort(key=lambda each: each["latency_ms"]["compressed"]["median"] if each["latency_ms"] else float("inf"))
    for number, each in enumerate(runs, 1):
        each["number"] = number
    for cost in COSTS:
        for each in runs:
            each["best"][cost] = _is_best(each, runs, cost)
    return {"schema": 1, "runs": runs, "notes": _notes(runs)}


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


def _figures(report: JsonFile, name: str) -> dict[str, Any]:
    """What is compared of one run."""
    counted = report.get("accuracy") or report.get("graphs")
    if counted is None:
        raise UsageError(f"{report.path} has no accuracy", "compare runs whose parity stage has run")
    batch = report.get("verdict", "batch")
    timed = next((each for each in report.get("latency") if each["batch"] == batch), None)
    energy = timed["energy_mj"] if timed and all(timed["energy_mj"].values()) else None
    return {
        "name": name,
        **{key: report.get(key) for key in ("model", "data", "target", "seed", "macs", "params", "bytes", "blocks")},
        "metric": report.get("metric"),
        "machine": report.get("machine", "cpu"),
        "batch": batch,
        "result": report.get("verdict", "overall", "result"),
        "reason": report.get("verdict", "overall", "reason"),
        "budget": report.get("budget", "asked"),
        "accuracy": {key: counted[key] for key in ("full", "compressed", "drop", "interval")},
        "measured": report.get("accuracy") is not None,
        "latency_ms": timed and {which: _interval(timed[which]) for which in ("full", "compressed")},
        "speedup": timed and timed["speedup"] if timed and timed["decided"] else None,
        "energy_mj": energy and {which: spent / batch for which, spent in energy.items()},
        "best": {},
    }


def _interval(latency: Mapping[str, float]) -> dict[str, float]:
    return {key: latency[f"{key}_ms"] for key in ("median", "low", "high")}


def cost_of(run: Mapping[str, Any], cost: str, which: str = "compressed") -> float | None:
    """One run's figure of one of `COSTS`; None where it was not measured."""
    found: Any = run[cost] and run[cost][which]
    cost_found: float | None = found["median"] if isinstance(found, dict) else found
    return cost_found


def _is_best(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], cost: str) -> bool:
    """Whether no comparable run is at least as accurate and as cheap, and better in one of the two."""
    own = cost_of(run, cost)
    if own is None:
        return False
    mine = (own, -run["accuracy"]["compressed"])
    for other in runs:
        theirs = cost_of(other, cost)
        if theirs is None or circumstances(other, cost) != circumstances(run, cost):
            continue
        rival = (theirs, -other["accuracy"]["compressed"])
        if rival != mine and rival[0] <= mine[0] and rival[1] <= mine[1]:
            return False
    return True


def circumstances(run: Mapping[str, Any], cost: str) -> tuple[Any, ...]:
    """What has to be the same for figures to be comparable: data, metric; and for what is measured, all it is on."""
    common = run["data"], run["metric"]["name"]
    return common if cost == "macs" else (*common, *(run[key] for key in ("target", "machine", "batch")))


def _notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know before he compares."""
    notes = []
    if len({run["data"] for run in runs}) > 1:
        notes.append("These runs are of different data sets: their scores cannot be compared.")
    if len({run["metric"]["name"] for run in runs}) > 1:
        notes.append("These runs are judged by different metrics: their scores cannot be compared.")
    if len({circumstances(run, "latency_ms")[2:] for run in runs if run["latency_ms"]}) > 1:
        notes.append(
            "Not all were timed on the same target, machine and batch: compare their speed-ups, not their times."
        )
    for what, left_out in (
        ("was not timed", [run for run in runs if not run["latency_ms"]]),
        ("was timed on a machine too noisy to tell", [run for run in runs if run["latency_ms"] and not run["speedup"]]),
    ):
        notes.extend(f"{run['name']} {what}." for run in left_out)
    return notes


def score_name(runs: Sequence[Mapping[str, Any]]) -> str:
    """What all runs are judged by; "score", where that differs."""
    names = {run["metric"]["name"] for run in runs}
    return str(names.pop()) if len(names) == 1 else "score"


def change_of(run: Mapping[str, Any]) -> str:
    """How the score of a run changes; points, where it is a percentage, without a word."""
    drop, unit = run["accuracy"]["drop"], run["metric"]["unit"]
    return formats.points(drop) if unit == "%" else formats.change(drop, unit)


def table(compared: Mapping[str, Any]) -> Table:
    """The runs as a table for the terminal; a star: nothing else is as accurate and as fast."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    star = "* no other run is as accurate and as fast"
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=star, caption_justify="left")
    grid.add_column("#", justify="right", no_wrap=True)
    grid.add_column("run", overflow="fold", min_width=12)
    for heading in ("verdict", score_name(compared["runs"]), "change", "latency", "speed-up", "MACs"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for run in compared["runs"]:
        cells = (
            run["result"],
            formats.score(run["accuracy"]["compressed"], run["metric"]["unit"]),
            change_of(run),
            formats.milliseconds(run["latency_ms"]["compressed"]["median"]) if run["latency_ms"] else "–",
            formats.times(run["speedup"]["median"]) if run["speedup"] else "–",
            formats.share(run["macs"]["ratio"]),
        )
        grid.add_row(f"{run['number']}{'*' if run['best']['latency_ms'] else ''}", Text(run["name"]), *cells)
    return grid
