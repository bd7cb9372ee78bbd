"""The latency of a network as its gates stand, from a table that was measured (`polar_deploy.latency`).

The value is the table's: exact at the measured widths, straight between them. The gradient is that of the curve's
convex hull from below: what a channel costs on average on the way down. A measured curve has flat stretches (24
channels may take as long as 32); its own slope there would say that closing a channel is worth nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from polar_deploy.errors import ContentError
from polar_deploy.gating.sites import Site
from polar_deploy.latency import Entry, LatencyTable


class LatencyModel:
    """Latency of a gated network as a function of the vector of all gates; a cost of `Constraint`.

    Args:
        table: what was measured.
        sites: the network's sites, in the order of the gate vector.

    Raises:
        ContentError: the table is not of these sites.
    """

    def __init__(self, table: LatencyTable, sites: Sequence[Site]) -> None:
        found = {entry.name: entry for entry in table.sites}
        for site in sites:
            entry = found.pop(site.name, None)
            if entry is None or (entry.kind, entry.width) != (site.kind, site.width):
                has = f"a {entry.kind} site of width {entry.width}" if entry else "none"
                raise _foreign(f"{site.name!r} is a {site.kind} site of width {site.width}, the table has {has} there")
        if found:
            raise _foreign(f"it has a site {next(iter(found))!r}, the network has none there")
        entries = {entry.name: entry for entry in table.sites}
        ordered = [entries[site.name] for site in sites]
        place = {table.sites.index(entry): index for index, entry in enumerate(ordered)}
        count = len(sites)
        self.full = table.full_ms
        self._site = torch.repeat_interleave(torch.arange(count), torch.tensor([site.gates for site in sites]))
        self._exact, self._hull = _Curves([_knots(e) for e in ordered]), _Curves([_hull(_knots(e)) for e in ordered])
        self._within = torch.zeros(count, count, dtype=torch.bool)  # site, the blocks around it
        for index, entry in enumerate(ordered):
            self._within[index, [place[block] for block in entry.within]] = True
        pairs = [(place[s], place[t]) for s, t, _ in table.overlaps]
        self._pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
        self._within_either = self._within[self._pairs].any(1)  # pair, the blocks around one of the two
        self._overlap = torch.tensor([k for _, _, k in table.overlaps], dtype=torch.float64)

    def __call__(self, gates: Tensor) -> Tensor:
        """Latency as a share of the full network's, for gates [..., G] in [0, 1]; differentiable, [...]."""
        counts = self._counts(gates)
        hull = self._hull(counts)
        saved = hull + (self._exact(counts) - hull).detach()
        first, second = saved[..., self._pairs[:, 0]], saved[..., self._pairs[:, 1]]
        twice = self._overlap * _products(counts, self._within_either) * first * second
        return 1 - ((_products(counts, self._within) * saved).sum(-1) - twice.sum(-1)) / self.full

    def resting(self, gates: Tensor) -> Tensor:
        """The gates that nothing depends on, because they lie in a closed block; bool [G], for 0/1 gates [G]."""
        return (_products(self._counts(gates), self._within) == 0)[self._site]

    def to(self, device: torch.device) -> LatencyModel:
        """Move the tables to a device, in place."""
        for name in ("_site", "_within", "_within_either", "_pairs", "_overlap"):
            setattr(self, name, getattr(self, name).to(device))
        self._exact.to(device)
        self._hull.to(device)
        return self

    def _counts(self, gates: Tensor) -> Tensor:
        """Open gates of each site, [..., S]."""
        gates = gates.double()
        return gates.new_zeros(*gates.shape[:-1], len(self._within)).index_add(-1, self._site, gates)


class _Curves:
    """Piecewise linear functions of one variable, one a site: a value at the first knot, and a slope behind each."""

    def __init__(self, knots: Sequence[Sequence[tuple[float, float]]]) -> None:
        depth = max(map(len, knots))
        self._at = torch.full((len(knots), depth), torch.inf, dtype=torch.float64)
        self._value, self._slope = torch.zeros_like(self._at), torch.zeros_like(self._at)
        for row, curve in enumerate(knots):
            for column, (x, y) in enumerate(curve):
                self._at[row, column], self._value[row, column] = x, y
            for column, ((x, y), (next_x, next_y)) in enumerate(pairwise(curve)):
                self._slope[row, column] = (next_y - y) / (next_x - x)
        self._rows = torch.arange(len(knots))

    def __call__(self, counts: Tensor) -> Tensor:
        """Values at `counts` [..., S]. At a knot the slope is that below: what closing one more saves."""
        column = ((counts.unsqueeze(-1) > self._at).sum(-1) - 1).clamp_min(0).detach()
        at, value, slope = (each[self._rows, column] for each in (self._at, self._value, self._slope))
        inside = torch.where(counts >= at, counts, at)  # below the least measured width: no further saving
        return value + slope * (inside - at)

    def to(self, device: torch.device) -> None:
        for name in ("_at", "_value", "_slope", "_rows"):
            setattr(self, name, getattr(self, name).to(device))


def _products(counts: Tensor, chosen: Tensor) -> Tensor:
    """For each row of the mask `chosen` [R, S] the product of those of `counts` [..., S]; [..., R]."""
    return torch.where(chosen, counts.unsqueeze(-2), torch.ones_like(counts).unsqueeze(-2)).prod(-1)


def _knots(entry: Entry) -> list[tuple[float, float]]:
    return [(float(width), saved) for width, saved in zip(entry.widths, entry.saved, strict=True)]


def _hull(knots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The knots of the smallest concave curve above the savings: of the largest convex one below the latency."""
    hull: list[tuple[float, float]] = []
    for x, y in knots:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) <= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _foreign(what: str) -> ContentError:
    return ContentError(f"the latency table is of another network: {what}", "make one of this model and its settings")
