"""Budgets: what was asked, and what it means for a network before its gates learn: whether it can be reached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.costs import Cost
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.gating import choice
from polar_deploy.gating.latency import latency_cost
from polar_deploy.latency import LatencyTable, read
from polar_deploy.recipes import parse_budget

if TYPE_CHECKING:
    from polar_deploy.devices import Chosen
    from polar_deploy.gating.choice import Limits
    from polar_deploy.surgery.choices import Choices

LIKELY = 4  # sub-networks that a latency table is held against


def require_reachable(
    choices: Choices, limits: Limits, budget: Mapping[str, float], latency: LatencyTable | Chosen | None
) -> None:
    """Raise UsageError where no sub-network is within the budgets; latency is left out where nothing tells it."""
    costs = _costs(choices, latency)
    asked = {name: share for name, share in budget.items() if name in costs}
    if asked:
        choice.require_reachable(choices, limits, costs, asked)


def smallest(choices: Choices, limits: Limits, latency: LatencyTable | Chosen | None) -> dict[str, float]:
    """The costs of the smallest sub-network, as shares of the full one's; latency where something tells it."""
    costs = _costs(choices, latency)
    least = choice.smallest(choices, limits, costs)
    return {name: cost.share(least) for name, cost in costs.items()}


def likely(choices: Choices, limits: Limits, budget: Mapping[str, float], table: LatencyTable) -> list[dict[str, int]]:
    """Sub-networks as they will be chosen by a latency table: open gates by site. What gates are worth is drawn.

    [] where no sub-network is within the budgets: the table is good for others, all the same.
    """
    costs = _costs(choices, table)
    if not choice.is_reachable(choices, limits, costs, budget):
        return []
    draws = np.random.default_rng(0).gamma(0.5, size=(LIKELY, choices.gates))
    return [choice.counts(choices, choice.choose(choices, limits, costs, budget, worth)) for worth in draws]


def _costs(choices: Choices, latency: LatencyTable | Chosen | None) -> dict[str, Cost]:
    return choices.costs if latency is None else {**choices.costs, "latency": latency_cost(latency, choices)}


def asked(budget: float | str | Mapping[str, float]) -> dict[str, float]:
    """Bounds by the name of the cost, as shares in (0, 1): of a number (MACs), of what --budget takes, or a mapping.

    Raises:
        UsageError: there is none, a cost that is not known, or a share out of range.
    """
    shares = parse_budget(budget).asked() if isinstance(budget, str) else budget
    given: Mapping[str, object] = shares if isinstance(shares, Mapping) else {"macs": shares}
    numbers = {name: float(share) for name, share in given.items() if isinstance(share, (int, float, np.floating))}
    known = ("macs", "params", "latency")
    for name, share in given.items():
        if name not in known or not 0 < numbers.get(name, 0) < 1:
            raise UsageError(f"budget {name}={share}", f"name one of {', '.join(known)}, with a share between 0 and 1")
    if not numbers:
        raise UsageError("the budget is empty", f"name one of {', '.join(known)}")
    return numbers


def require_known(budget: Mapping[str, float], costs: Mapping[str, Cost]) -> dict[str, float]:
    """A budget of a saved state, by the name of the cost.

    Raises:
        ContentError: nothing tells one of its costs here.
    """
    if lacking := sorted(budget.keys() - costs.keys()):
        raise ContentError(
            f"the state has the budget {lacking[0]}={budget[lacking[0]]:g}, and these gates know {', '.join(costs)}",
            "make Gates with the budget, and the latency_table or device, that the state was saved with",
        )
    return dict(budget)


def latency_source(table: LatencyTable | Path | str | None, device: Chosen | None) -> LatencyTable | Chosen:
    """What tells latency: a table as it was measured, or else a device's file.

    Raises:
        UsageError: neither was given.
    """
    if isinstance(table, (str, Path)):
        return read(Path(table))
    if source := table or device:
        return source
    raise UsageError(
        "budget latency= needs a latency table, or a device",
        "measure a table with `polar-deploy engines table`, or name a device: `polar-deploy devices list`",
    )
