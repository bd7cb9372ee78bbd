"""What `bundle verify` found on a device as a page, beside what the maker of the bundle measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_deploy.report import formats
from polar_deploy.report.figures import speedups
from polar_deploy.report.page import environment

if TYPE_CHECKING:
    from markupsafe import Markup

    from polar_deploy.bundle.read import Bundle

_HEADLINES = {
    "pass": "Verified: the bundle is whole, and right on this device",
    "fail": "Not verified: the bundle fails on this device",
    "undecided": "Undecided: not everything could be verified on this device",
}


def page(bundle: Bundle, found: dict[str, Any]) -> str:
    """One self-contained page.

    Args:
        bundle: what was verified.
        found: what `verify` says of it.
    """
    manifest = bundle.manifest
    maker = next(
        (each.model_dump() for each in manifest.metrics.latency if each.batch == manifest.verdict.asked.batch), None
    )
    counted, metric = manifest.metrics.accuracy or manifest.metrics.fp32_graphs, manifest.task.metric
    here = found["latency"] and found["latency"]["rounds"][found["latency"]["chosen"]]
    return (
        environment()
        .get_template("verified.html.j2")
        .render(
            manifest=manifest,
            found=found,
            headline=_HEADLINES[found["verdict"]["overall"]["result"]],
            maker=maker,
            here=here,
            name=metric.name if metric else "accuracy",
            score=formats.score(counted.compressed, metric.unit) if counted and metric else "–",
            figure=_speedups(bundle, maker, found["latency"], here),
        )
    )


def _speedups(
    bundle: Bundle, maker: dict[str, Any] | None, timed: dict[str, Any] | None, here: dict[str, Any] | None
) -> Markup | None:
    """The speed-up on both machines."""
    asked = bundle.manifest.verdict.asked
    measured = [("where it was made", maker["speedup"], maker["decided"])] if maker else []
    measured += [("on this device", here["speedup"], timed["decided"])] if here and timed else []
    return speedups(f"Speed-up at batch {asked.batch}", measured, asked.model_dump()) if measured else None
