"""Where gate sites meet: which of their savings are the same, and which of those are measured in one sum.

What a hub is, and why hubs are treated apart, `polar_deploy.engines.table` says.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TypeVar

from polar_deploy.engines.sites import Site

MEETINGS = 4  # a site that meets more others than these is a hub
Pair = tuple[Site, Site]
_Sites = TypeVar("_Sites", bound=tuple[Site, ...])


@dataclass(frozen=True)
class Group:
    """Pairs of sites whose overlaps are measured as one sum.

    `cut`: the pairs that are in the sum; `even`: whether it is shared out evenly, and not by MACs.
    """

    pairs: Sequence[Pair]
    cut: Sequence[Pair]
    even: bool


def meeting_pairs(sites: Sequence[Site]) -> Iterator[Pair]:
    """Each two sites that meet in a layer, unless one holds the other."""
    for a, b in combinations(sites, 2):
        if a.meets(b) and not a.holds(b) and not b.holds(a):
            yield a, b


def find_hubs(sites: Sequence[Site]) -> frozenset[str]:
    """Names of the sites, no blocks, that meet more than `MEETINGS` others."""
    meetings = Counter(site.name for pair in meeting_pairs(sites) for site in pair if site.kind != "block")
    return frozenset(name for name, number in meetings.items() if number > MEETINGS)


def side_by_side(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that stand side by side, at once or through others, together."""
    bundles: list[list[Site]] = []
    for site in sites:
        near = [bundle for bundle in bundles if any(site.beside(other) for other in bundle)]
        bundles = [bundle for bundle in bundles if bundle not in near] + [[*chain.from_iterable(near), site]]
    return bundles


def group_pairs(pairs: Sequence[Pair], hubs: frozenset[str]) -> list[Group]:
    """The sums of overlaps to measure: those of pairs of one kind, of hubs with each other, of hubs with channel sites.

    A sum is known before it is in another one. Those of hubs with blocks are not measured.
    """
    kinds: dict[object, list[Pair]] = {}
    for a, b in pairs:
        if hubs.isdisjoint((a.name, b.name)):
            kinds.setdefault((a.alike, b.alike), []).append((a, b))
    channels = [(a, b) for a, b in pairs if "block" not in (a.kind, b.kind)]
    between = [(a, b) for a, b in channels if hubs.issuperset((a.name, b.name))]
    mixed = [(a, b) for a, b in channels if (a.name in hubs) != (b.name in hubs)]
    alone = [Group(each, apart(each), True) for each in kinds.values()]
    return [*alone, Group(between, between, False), Group(mixed, mixed, False)]


def expected_overlap(a: Site, b: Site, saves: Mapping[str, float]) -> float:
    """What the probes of two sites save twice, by the count; a MAC's time is the geometric mean of the two sites'."""
    if not (shared := a.shared(b)):
        return 0.0
    return shared * math.sqrt(saves[a.name] / a.saves * saves[b.name] / b.saves)


def counted_savings(sites: Sequence[Site], opened: Mapping[str, int]) -> float:
    """MACs that these sites save together, as the probes of each one tell."""
    closed = {site.name: site.closed(opened[site.name]) for site in sites}
    twice = sum(a.shared(b) * closed[a.name] * closed[b.name] for a, b in combinations(sites, 2))
    return sum(site.saves * closed[site.name] for site in sites) - twice


def apart(groups: Sequence[_Sites]) -> list[_Sites]:
    """Groups of sites, as many as possible in order, of which no two meet in a layer: their savings just add up."""
    chosen: list[_Sites] = []
    for group in groups:
        others = [site for each in chosen for site in each]
        if not any(site.meets(other) for site in group for other in others):
            chosen.append(group)
    return chosen
