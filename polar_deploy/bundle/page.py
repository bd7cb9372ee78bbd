"""What `bundle verify` found on a device as a page, beside what the maker of the bundle measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_deploy.report import formats
from polar_deploy.report.charts import Estimate, intervals
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
            accuracy=manifest.metrics.accuracy or manifest.metrics.fp32_graphs,
            figure=_speedups(bundle, maker, found["latency"], here),
        )
    )


def _speedups(
    bundle: Bundle, maker: dict[str, Any] | None, timed: dict[str, Any] | None, here: dict[str, Any] | None
) -> Markup | None:
    """The speed-up on both machines."""
    measured = [("where it was made", maker, maker), ("on this device", here, timed)]
    rows = [
        Estimate(
            label,
            each["speedup"]["median"],
            each["speedup"]["low"],
            each["speedup"]["high"],
            formats.times(each["speedup"]["median"]) if whole["decided"] else "too noisy to tell",
            whole["decided"],
        )
        for label, each, whole in measured
        if each and whole
    ]
    asked = bundle.manifest.verdict.asked
    if not rows:
        return None
    about = "; ".join(f"{row.label}: {row.shown}, 95 % from {row.low:.2f} to {row.high:.2f}" for row in rows)
    return intervals(
        f"Speed-up at batch {asked.batch}",
        f"{about}. {asked.min_speedup:g} is asked.",
        rows,
        "times as fast, with 95 % interval",
        bound=(asked.min_speedup, f"{asked.min_speedup:g}× asked"),
        good=1,
    )
