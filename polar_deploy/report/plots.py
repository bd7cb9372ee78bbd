"""The page of a comparison: Pareto plots, and a table of all runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from markupsafe import Markup

from polar_deploy.documents.comparison import Comparison, Run, What
from polar_deploy.documents.parity import Interval
from polar_deploy.report import charts, formats
from polar_deploy.report.charts import Point
from polar_deploy.report.compare import COSTS, change_of, circumstances, interval_of, score_name
from polar_deploy.report.page import render, value

_AXES: dict[What, str] = {
    "latency_ms": "milliseconds an inference",
    "macs": "multiply-accumulates, millions",
    "energy_mj": "mJ an image",
}
_STYLES = {"pass": "point pass", "fail": "point fail", "undecided": "point undecided"}


def page(compared: Comparison) -> str:
    """One self-contained page of what `compare` found."""
    content = compared.as_json()
    figures = {cost: drawn for cost in COSTS if (drawn := _plot(compared.runs, cost))}
    return render(
        "compare.html.j2",
        compared=compared,
        costs=COSTS,
        alike=len({(run.model, run.data, run.target) for run in compared.runs}) == 1,
        figures=figures,
        name=score_name(compared.runs),
        score=lambda run: formats.score(run.accuracy.compressed, run.metric.unit),
        change=change_of,
        chosen=_chosen(compared.runs),
        value=lambda path, form="plain": value(content, path, form),
    )


def _chosen(runs: Sequence[Run]) -> Sequence[tuple[str, Run]]:
    """The runs that a reader looks for: of those that passed, the fastest and the most accurate."""
    passed = [run for run in runs if run.result == "pass" and run.speedup]
    if not passed:
        return []
    fastest = max(passed, key=lambda run: run.speedup.median if run.speedup else 0.0)
    best = max(passed, key=lambda run: run.accuracy.compressed)
    if fastest is best:
        return [("Fastest and most accurate that passed", best)]
    return [("Fastest that passed", fastest), ("Most accurate that passed", best)]


def _plot(runs: Sequence[Run], cost: What) -> Markup | None:
    """The score against one cost; None where no run has that figure."""
    scale = 1e-6 if cost == "macs" else 1.0
    points = [
        *_full(runs, cost, scale),
        *(_point(run, cost, x, scale) for run in runs if (x := interval_of(run, cost))),
    ]
    if not points:
        return None
    best = ", ".join(f"{run.number} {run.name}" for run in runs if run.best[cost])
    about = f"{len(points)} points. No other run is as accurate and as cheap as: {best}."
    name, units = score_name(runs), {run.metric.unit for run in runs}
    unit = f", {units.pop()}" if len(units) == 1 and units != {""} else ""
    title = f"{formats.heading(name)} against {COSTS[cost]}"
    return charts.scatter(title, about, points, _AXES[cost], f"{name}{unit}")


def _point(run: Run, cost: What, x: Interval, scale: float) -> Point:
    accuracy, unit = run.accuracy, run.metric.unit
    low, high = accuracy.interval
    y = (accuracy.full - high, accuracy.compressed, accuracy.full - low)
    about = f"{run.number} {run.name}: {formats.score(y[1], unit)}, {x.median * scale:.3g} {_AXES[cost]}"
    across = (x.low * scale, x.median * scale, x.high * scale)
    front = circumstances(run, cost) if run.best[cost] else None
    return Point(str(run.number), about, across, _within(y) if unit == "%" else y, _STYLES[run.result], front)


def _within(interval: tuple[float, float, float]) -> tuple[float, float, float]:
    """No share lies beyond 0 or 100 %."""
    low, value, high = interval
    return max(0.0, low), value, min(100.0, high)


def _full(runs: Sequence[Run], cost: What, scale: float) -> list[Point]:
    """The full networks, each once: medians over the runs that began with it."""
    groups: dict[tuple[object, ...], list[tuple[Run, float]]] = {}
    for run in runs:
        if found := interval_of(run, cost, "full"):
            groups.setdefault((run.model, *circumstances(run, cost)), []).append((run, found.median))
    points = []
    for key, members in groups.items():
        x = median(found for _, found in members) * scale
        y = median(run.accuracy.full for run, _ in members)
        about = f"the full network {key[0]}: {formats.score(y, members[0][0].metric.unit)}, {x:.3g} {_AXES[cost]}"
        points.append(Point("full", about, (x, x, x), (y, y, y), "point whole"))
    return points
