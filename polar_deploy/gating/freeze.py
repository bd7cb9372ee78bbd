"""The freeze: from what the gates decided to one static sub-network that meets its budget exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor

from polar_deploy.errors import UsageError
from polar_deploy.gating.cost import Constraint, offsets
from polar_deploy.gating.sites import Site


def alignment_of(width: int, align: int) -> int:
    """The multiple that a layer of `width` channels keeps to when the target asks for `align`.

    A layer narrower than twice the alignment uses the largest of 16, 8, 1 that is at most half its width.
    """
    return align if width >= 2 * align else next(a for a in (16, 8, 1) if a <= max(1, width // 2))


def widths(width: int, align: int, min_width: float) -> list[int]:
    """The widths that a layer may be cut to, ascending; the last is its own."""
    step = alignment_of(width, align)
    least = max(step, ceil(min_width * width / step) * step)
    return [*range(least, width, step), width]


@dataclass(frozen=True)
class _Plan:
    """How many gates of each site stay open: an index into that site's `choices`."""

    level: tuple[int, ...]

    def moved(self, site: int, level: int) -> _Plan:
        return _Plan((*self.level[:site], level, *self.level[site + 1 :]))


@dataclass(frozen=True)
class _Move:
    plan: _Plan
    site: int
    utility: float  # at stake
    saved: float  # of the tightest budget's excess
    price: float  # what it adds to the excess of the budget that it touches most
    excess: float  # afterwards
    free: bool  # costs nothing, and yet is not in vain


class Knapsack:
    """Chooses the open gates: the most utility that fits the budget, near to what the gates decided.

    Starting from the gates' own state (each site rounded to an allowed width), groups of channels and whole blocks
    are closed in the order of utility lost per cost saved until the budget holds; then the best that still fits is
    opened again; then exchanges bring the cost into the window if it is not there. A block is worth at least what its
    open channels are together: its own gate's second-order utility is short of what so large a step costs. Which
    channels of a site stay is always the same order: those that the gates hold open first, then by utility.

    Args:
        sites: the sites, in the order of the gate vector.
        constraint: the budget.
        utility: [G] >= 0, the loss that closing each gate would add.
        state: [G], 0 or 1, what the gates decided.
        align, min_width: see `widths`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        constraint: Constraint,
        utility: Tensor,
        state: Tensor,
        *,
        align: int,
        min_width: float,
    ) -> None:
        self.sites, self.constraint = list(sites), constraint
        self.starts = offsets(sites)
        self.state = state.detach().double().cpu()
        self.utility = self._with_blocks(utility.detach().double().cpu())
        self.choices = [
            widths(site.width, align, min_width) if site.kind == "channel" else [0, 1] for site in self.sites
        ]
        self._all = range(len(self.sites))
        self._order = [self._ranking(site, start) for site, start in zip(self.sites, self.starts, strict=True)]

    def solve(self) -> Tensor:
        """The open gates, float [G] of 0 and 1.

        Raises:
            UsageError: the budget is below the smallest reachable cost.
        """
        least = _Plan((0,) * len(self.sites))
        if self._excess(least) > 0:
            raise unreachable(self.constraint, self.gates(least))
        plan = self._shrink(self._nearest(), self._all)
        if self._excess(plan) > 0:  # two budgets pull apart
            plan = least
        return self.gates(self._exchange(self._fill(plan, self._all)))

    def gates(self, plan: _Plan) -> Tensor:
        """The gate vector [G] of a plan."""
        gates = torch.zeros_like(self.state)
        for order, choices, level in zip(self._order, self.choices, plan.level, strict=True):
            gates[order[: choices[level]]] = 1.0
        return gates

    def _with_blocks(self, utility: Tensor) -> Tensor:
        """`utility` [G], that of each block at least the sum of its open channels'."""
        worth = utility.clone()
        for site, start in zip(self.sites, self.starts, strict=True):
            if site.kind == "block":
                closed = torch.ones_like(utility).index_fill(0, torch.tensor(start), 0.0)
                inside = self.constraint.resting(closed)
                worth[start] = max(float(utility[start]), float(utility[inside] @ self.state[inside]))
        return worth

    def _ranking(self, site: Site, start: int) -> Tensor:
        here = slice(start, start + site.gates)
        utility = self.utility[here]
        first = self.state[here] * (utility.max() + 1.0) + utility  # open gates before closed ones
        return start + torch.argsort(first, descending=True, stable=True)

    def _nearest(self) -> _Plan:
        level = []
        for order, choices in zip(self._order, self.choices, strict=True):
            open_now = float(self.state[order].sum())
            nearest = [(abs(choice - open_now), -choice, index) for index, choice in enumerate(choices)]
            level.append(min(nearest)[2])
        return _Plan(tuple(level))

    def _moves(self, plan: _Plan, step: int, among: Iterable[int]) -> Iterator[_Move]:
        """All plans in which one of some sites is a step away: -1 closes a group of channels or a block, +1 opens.

        Where a cost is not linear in a site's gates, further levels are a step, too: the next one may save nothing
        while the one behind it does.
        """
        gates = self.gates(plan)
        levels = [(site, level) for site in among for level in self._reach(site, plan.level[site], step)]
        groups = [self._between(site, plan.level[site], level) for site, level in levels]
        excess, changes = self.constraint.changes(gates, groups, step)
        resting = None if self.constraint.linear else self.constraint.resting(gates)
        for (site, level), moved, change in zip(levels, groups, changes.unbind(dim=1), strict=True):
            price = float(change.max())
            yield _Move(
                plan=plan.moved(site, level),
                site=site,
                utility=float(self.utility[moved].sum()),
                saved=float(excess.max() - (excess + change).max()),
                price=price,
                excess=float((excess + change).max()),
                free=price <= 0 and resting is not None and not bool(resting[moved].all()),
            )

    def _reach(self, site: int, level: int, step: int) -> range:
        """The levels of a site that are one step from `level`."""
        last = len(self.choices[site]) if step > 0 else -1
        reach = range(level + step, last, step)
        return reach[:1] if self.constraint.linear else reach

    def _between(self, site: int, level: int, other: int) -> Tensor:
        """The gates of a site that are open at one of two levels only."""
        low, high = sorted((self.choices[site][level], self.choices[site][other]))
        return self._order[site][low:high]

    def _shrink(self, plan: _Plan, among: Sequence[int]) -> _Plan:
        """Close the least utility per cost saved until the budget holds, or nothing is left to close."""
        while self._excess(plan) > 0:
            saving = [move for move in self._moves(plan, -1, among) if move.saved > 0]
            if not saving:
                break
            plan = min(saving, key=lambda move: move.utility / move.saved).plan
        return plan

    def _fill(self, plan: _Plan, among: Sequence[int]) -> _Plan:
        """Open the most utility per cost while anything fits."""
        while fitting := [m for m in self._moves(plan, +1, among) if (m.price > 0 or m.free) and m.excess <= 0]:
            plan = max(fitting, key=lambda move: inf if move.free else move.utility / move.price).plan
        return plan

    def _exchange(self, plan: _Plan) -> _Plan:
        """Move one site a step and adjust the rest, while that brings the cost closer to the budget from below."""
        while not self.constraint.in_window(self.gates(plan)):
            within = (variant for variant in self._variants(self._rest(plan)) if self._excess(variant) <= 0)
            best = max(within, key=self._excess, default=plan)
            if self._excess(best) <= self._excess(plan):
                break
            plan = best
        return plan

    def _variants(self, plan: _Plan) -> Iterator[_Plan]:
        """Plans that differ from `plan` by one step of one site and what that asks for, or allows, elsewhere."""
        yield self._fill(plan, self._all)
        for step in (-1, +1):
            for move in self._moves(plan, step, self._all):
                if move.price != 0:
                    moved, others = self._rest(move.plan), [site for site in self._all if site != move.site]
                    adjusted = self._fill(self._shrink(moved, others), others)
                    yield adjusted
                    yield self._fill(adjusted, self._all)
                    yield self._fill(self._shrink(moved, self._all), self._all)

    def _rest(self, plan: _Plan) -> _Plan:
        """Closed blocks at the least width inside, where it costs nothing: they open as a small step."""
        resting = self.constraint.resting(self.gates(plan))
        idle = [s.kind == "channel" and bool(resting[o].all()) for s, o in zip(self.sites, self._order, strict=True)]
        return _Plan(tuple(0 if rests else level for rests, level in zip(idle, plan.level, strict=True)))

    def _excess(self, plan: _Plan) -> float:
        return float(self.constraint(self.gates(plan)))


def smallest(sites: Sequence[Site], align: int, min_width: float) -> Tensor:
    """The cheapest state, float [G]: every layer at its least width (`widths`), every block closed that may be."""
    ones = [min(widths(s.width, align, min_width)) if s.kind == "channel" else 0 for s in sites]
    return torch.cat([(torch.arange(s.gates) < n).double() for s, n in zip(sites, ones, strict=True)])


def require_reachable(constraint: Constraint, sites: Sequence[Site], align: int, min_width: float) -> None:
    """Raise UsageError if even the cheapest state is above the budget."""
    least = smallest(sites, align, min_width)
    if float(constraint(least)) > 0:
        raise unreachable(constraint, least)


def unreachable(constraint: Constraint, state: Tensor) -> UsageError:
    """The error for a budget below what any choice of gates can reach; `state` [G] is the cheapest one."""
    least = constraint.achieved(state)
    name = max(least, key=lambda each: least[each] - constraint.asked[each])
    return UsageError(
        f"budget {name}={constraint.asked[name]} cannot be reached: with every gate closed that may close, "
        f"{least[name]:.3f} of the full network's {name} is left",
        f"ask for at least {name}={ceil(least[name] * 1000 + 1) / 1000:.3f}, or lower gates.min_width or --align",
    )
