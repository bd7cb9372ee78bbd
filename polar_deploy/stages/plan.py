"""The plan of a run, found out without training: gates, costs, what can be reached, what the target needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from polar_deploy import targets, tasks
from polar_deploy.errors import MachineError
from polar_deploy.stages import full
from polar_deploy.stages.gates import known_latency, limits, require_reachable

if TYPE_CHECKING:
    from polar_deploy.stages.context import RunContext
    from polar_deploy.stages.stage import Stage


def plan(run: RunContext, stages: Sequence[Stage]) -> dict[str, Any]:
    """The resolved settings, stages, what a folder of pictures holds, gates, costs, and the target's needs.

    Costs are those of the full network, and the smallest that can be reached.

    Raises:
        UsageError: the model has no place for a gate, the budget is below the smallest reachable cost, or the full
            network's weights are not where they should be.
        ContentError: these weights are of another network; or the network cannot be exported, or what surgery makes of
            it is not what is promised; or a folder of pictures is not what a run takes.
    """
    from polar_deploy.gating import budgets

    data = tasks.listed(run.settings) if any(stage.reads_data for stage in stages) else None
    if full.STAGE in stages and run.settings.full_weights is not None:  # else no network is built for it
        full.load_given(run, run.network())
    require_reachable(run)
    settings, choices, latency, allowed = run.settings, run.analysis.choices, known_latency(run), limits(run)
    return {
        "settings": settings.model_dump(mode="json"),
        "folder": str(run.folder),
        "stages": [stage.name for stage in stages],
        "data": data,
        "gates": {
            "channel_sites": len(choices.sites),
            "channels": sum(site.width * site.size for site in choices.sites),
            "streams": sum(site.kind == "stream" for site in choices.sites),
            "blocks": len(choices.blocks),
            "ungated": run.analysis.ungated,
        },
        "full": {name: round(cost.full) for name, cost in choices.costs.items()},
        "smallest": budgets.smallest(choices, allowed, latency),
        "target": {"name": settings.target, "align": settings.align, **_missing(run.target)},
        "device": run.device.described() if run.device else None,
    }


def _missing(target: targets.Target) -> dict[str, str | None]:
    """What this machine lacks to build for the target, and to run what it built; None: nothing."""
    try:
        targets.check(target)
    except MachineError as error:
        return {"missing": str(error), "not_run": None}
    return {"missing": None, "not_run": "; ".join(targets.lacks_to_run(target)) or None}
