"""What there is to choose from, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from polar_deploy.costs import Cost, Floats, State


@dataclass(frozen=True)
class Site:
    """A place with a width to choose.

    widths: the allowed ones, ascending, >= 1; the last is the full width.
    utility: [full width + 1], of keeping the n most useful gates: non-decreasing, 0 at 0.
    blocks: closing any of them removes the whole site, which then has no utility and costs nothing.
    """

    widths: tuple[int, ...]
    utility: Floats
    blocks: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Problem:
    """What there is to choose from, and the budgets.

    blocks: [B] >= 0, utility of each block beyond that of the sites inside it. Where all that is in one block (sites
        and terms) is in another one, too, it lies inside it, and is closed with it.
    costs: by name.
    asked: the budgets by the same names, shares of the full network's cost in (0, 1].
    alive: of each of these sets of blocks at least one stays open.
    """

    sites: tuple[Site, ...]
    blocks: Floats
    costs: Mapping[str, Cost]
    asked: Mapping[str, float]
    alive: tuple[frozenset[int], ...] = ()

    def utility(self, state: State) -> float:
        """The utility of a state: of its open sites and blocks."""
        here = (
            float(site.utility[width])
            for site, width in zip(self.sites, state.widths, strict=True)
            if all(state.blocks[block] for block in site.blocks)
        )
        return sum(here) + float(np.asarray(self.blocks, dtype=np.float64) @ np.array(state.blocks, dtype=np.float64))

    def shares(self, state: State) -> dict[str, float]:
        """Each cost of a state as a share of the full network's."""
        return {name: self.costs[name].share(state) for name in self.asked}


@dataclass(frozen=True)
class Solution:
    """The state that was chosen; sites inside closed blocks have their least width in it.

    bound: no state within the budgets has more utility than this.
    in_window: whether the tightest budget is used up to `WINDOW`.
    """

    state: State
    utility: float
    bound: float
    in_window: bool

    @property
    def gap(self) -> float:
        """How far the bound is above the utility, as a share of it."""
        return (self.bound - self.utility) / max(abs(self.utility), 1e-12)
