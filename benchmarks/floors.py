"""What learned gates have to beat: sub-networks of the same cost that nobody had to learn, from the same full weights.

Uniform width: every layer keeps the same share of its channels, those whose filters have the largest L1 norm (Li et
al., arXiv 1608.08710). Uniform depth: every stage loses its last blocks first.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from polar_deploy.gating.choice import widths
from polar_deploy.gating.gates import Gates
from polar_deploy.surgery.facts import Bools


def uniform_width(gates: Gates, network: nn.Module, align: int) -> Bools:
    """The widest state bool [gates] within the budget in which all layers keep one share of their channels.

    Streams stay whole: in a residual network that is the usual way, and the better one.

    Raises:
        ValueError: none is within the budget.
    """
    for share in np.linspace(1, 0, 401)[1:]:
        opened = np.ones(len(gates.opened), bool)
        for site in gates.sites:
            if site.kind != "channel":
                continue
            allowed = widths(site, align, 0.0)
            width = min(allowed, key=lambda each: abs(each - share * site.width))
            norms = network.get_submodule(site.name).weight.detach().abs().flatten(1).sum(1).view(site.width, -1)
            closed = norms.sum(1).argsort(stable=True)[: site.width - width].numpy()
            opened[site.gates.start + closed] = False
        if _fits(gates, opened):
            return opened
    raise ValueError(f"no uniform width is within {dict(gates.budget)}")


def uniform_depth(gates: Gates) -> Bools:
    """The state with the fewest blocks closed, the last ones of each stage in turn, that is within the budget.

    Raises:
        ValueError: none is.
    """
    stages: dict[str, list[int]] = {}
    for block in gates.blocks:
        stages.setdefault(block.name.partition(".")[0], []).append(block.gate)
    turns = max(map(len, stages.values()))
    order = [blocks[-1 - turn] for turn in range(turns) for blocks in stages.values() if turn < len(blocks)]
    opened = np.ones(len(gates.opened), bool)
    for gate in order:
        opened[gate] = False
        if _fits(gates, opened):
            return opened
    raise ValueError(f"no depth is within {dict(gates.budget)}")


def _fits(gates: Gates, opened: Bools) -> bool:
    cost = gates.cost(opened)
    return all(cost[name] <= share for name, share in gates.budget.items())
