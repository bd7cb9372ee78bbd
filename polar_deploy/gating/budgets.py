"""What budgets mean for a network before its gates learn: whether they can be reached, and what would be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.costs import Cost
from polar_deploy.gating import choice
from polar_deploy.gating.latency import latency_cost

if TYPE_CHECKING:
    from polar_deploy.devices import Chosen
    from polar_deploy.gating.choice import Limits
    from polar_deploy.latency import LatencyTable
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

    Raises:
        UsageError: no sub-network is within the budgets.
    """
    costs = _costs(choices, table)
    choice.require_reachable(choices, limits, costs, budget)
    draws = np.random.default_rng(0).gamma(0.5, size=(LIKELY, choices.gates))
    return [choice.counts(choices, choice.choose(choices, limits, costs, budget, worth)) for worth in draws]


def _costs(choices: Choices, latency: LatencyTable | Chosen | None) -> dict[str, Cost]:
    return choices.costs if latency is None else {**choices.costs, "latency": latency_cost(latency, choices)}
