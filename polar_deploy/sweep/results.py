"""What came of a sweep: its runs one by one, and over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from polar_deploy.documents.comparison import Run
from polar_deploy.documents.sweep import Group, Spread, SweepResults, SweptRun
from polar_deploy.report import compare, formats
from polar_deploy.stages.artefacts import REPORT

if TYPE_CHECKING:
    from rich.table import Table

    from polar_deploy.sweep.plan import Planned
    from polar_deploy.sweep.runs import Ended


def document(name: str, planned: Sequence[Planned], ended: Mapping[str, Ended]) -> SweepResults:
    """All that is known: runs with their figures, groups of them that differ in the seed alone, and what failed."""
    done = [each for each in planned if not ended[each.name].error]
    compared = compare.compare([each.folder for each in done]) if done else None
    folders = {each.folder.resolve().name: each for each in done}
    figures = {folders[run.name].name: run for run in compared.runs} if compared else {}
    groups: dict[tuple[str, str], list[Planned]] = {}
    for each in planned:
        groups.setdefault((each.settings.target, str(each.settings.budget.asked())), []).append(each)
    return SweepResults(
        schema=1,
        name=name,
        groups=[_group([(each, figures.get(each.name)) for each in group]) for group in groups.values()],
        runs=[
            SweptRun(
                folder=each.name,
                seed=each.settings.seed,
                budget=each.settings.budget.asked(),
                target=each.settings.target,
                exit_code=ended[each.name].code,
                error=ended[each.name].error,
                report=f"{each.name}/{REPORT.name}" if each.name in figures else None,
                figures=figures.get(each.name),
            )
            for each in planned
        ],
        notes=compared.notes if compared else [],
    )


def _group(runs: Sequence[tuple[Planned, Run | None]]) -> Group:
    """Runs that differ in the seed alone."""
    settings = runs[0][0].settings
    done = [figures for _, figures in runs if figures is not None]
    return Group(
        target=settings.target,
        budget=settings.budget.asked(),
        seeds=[planned.settings.seed for planned, _ in runs],
        results=[figures.result if figures else "failed" for _, figures in runs],
        accuracy=_spread([figures.accuracy.compressed for figures in done]),
        drop=_spread([figures.accuracy.drop for figures in done]),
        speedup=_spread([figures.speedup.median for figures in done if figures.speedup]),
        latency_ms=_spread(
            [figures.latency_ms.compressed.median for figures in done if figures.latency_ms and figures.speedup]
        ),
        macs=_spread([figures.macs.ratio for figures in done]),
        params=_spread([figures.params.ratio for figures in done]),
    )


def _spread(values: Sequence[float]) -> Spread | None:
    return Spread(mean=sum(values) / len(values), low=min(values), high=max(values)) if values else None


def table(found: SweepResults) -> Table:
    """The groups as a table for the terminal: means, and of accuracy the spread over seeds."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("target", "budget"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("seeds", "verdicts", "top-1"):
        grid.add_column(heading, overflow="fold")
    for heading in ("change", "speed-up", "MACs", "params"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for group in found.groups:
        results = {result: group.results.count(result) for result in group.results}
        grid.add_row(
            group.target,
            ", ".join(f"{name}={share:g}" for name, share in group.budget.items()),
            ", ".join(map(str, group.seeds)),
            ", ".join(f"{count} {result}" for result, count in results.items()),
            _cell(group.accuracy, formats.percent, spread=True),
            _cell(group.drop, formats.points),
            _cell(group.speedup, formats.times),
            _cell(group.macs, formats.share),
            _cell(group.params, formats.share),
        )
    return grid


def _cell(values: Spread | None, form: Callable[[float], str], *, spread: bool = False) -> str:
    if values is None:
        return "–"
    ends = f" ({form(values.low)} to {form(values.high)})" if spread and values.low < values.high else ""
    return f"{form(values.mean)}{ends}"
