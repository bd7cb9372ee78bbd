"""What `bundle verify` found on a device as a page, beside what the maker of the bundle measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.documents.parity import Interval
from polar_deploy.report import formats
from polar_deploy.report.figures import speedups
from polar_deploy.report.page import render

if TYPE_CHECKING:
    from polar_deploy.bundle.read import Bundle
    from polar_deploy.documents.verified import Verified

_HEADLINES = {
    "pass": "Verified: the bundle is whole, and right on this device",
    "fail": "Not verified: the bundle fails on this device",
    "undecided": "Undecided: not everything could be verified on this device",
}


def page(bundle: Bundle, found: Verified) -> str:
    """One self-contained page.

    Args:
        bundle: what was verified.
        found: what `verify` says of it.
    """
    manifest = bundle.manifest
    asked, metric = manifest.verdict.asked, manifest.task.metric
    maker = next((each for each in manifest.metrics.latency if each.batch == asked.batch), None)
    counted = manifest.metrics.accuracy or manifest.metrics.fp32_graphs
    measured = []
    if maker:
        there = Interval(maker.speedup.median, maker.speedup.low, maker.speedup.high)
        measured.append(("where it was made", there, maker.decided))
    if found.latency:
        measured.append(("on this device", found.latency.best.speedup, found.latency.decided))
    title = f"Speed-up at batch {asked.batch}"
    return render(
        "verified.html.j2",
        manifest=manifest,
        found=found,
        headline=_HEADLINES[found.verdict["overall"].result],
        maker=maker,
        here=found.latency and found.latency.best,
        name=metric.name if metric else "accuracy",
        score=formats.score(counted.compressed, metric.unit) if counted and metric else "–",
        figure=speedups(title, measured, asked.min_speedup, asked.batch) if measured else None,
    )
