"""Latency as a cost: the sum that `polar_deploy.latency` describes, as measured; or what a device's file has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from polar_deploy.costs import Cost, Factor, Term
from polar_deploy.devices import Chosen
from polar_deploy.errors import ContentError
from polar_deploy.gating.on_device import device_cost
from polar_deploy.latency import Entry, LatencyTable
from polar_deploy.surgery.choices import Block, Choices, Site


@dataclass(frozen=True)
class _Saving:
    """Milliseconds that an entry of the table saves, as terms: (coefficient, factors, blocks)."""

    parts: tuple[tuple[float, tuple[Factor, ...], frozenset[int]], ...]


def latency_cost(source: LatencyTable | Chosen, choices: Choices) -> Cost:
    """The latency of a network as a function of what is kept: in milliseconds of a table, or in a device's own unit.

    Raises:
        ContentError: the table is of another network.
    """
    if isinstance(source, Chosen):
        return device_cost(source, choices)
    return table_cost(source, choices.sites, choices.blocks)


def table_cost(table: LatencyTable, sites: Sequence[Site], blocks: Sequence[Block]) -> Cost:
    """What was measured, in milliseconds.

    Raises:
        ContentError: the table is not of these sites and blocks.
    """
    _require_same(table, sites, blocks)
    site_of = {site.name: index for index, site in enumerate(sites)}
    block_of = {block.name: index for index, block in enumerate(blocks)}
    within = [frozenset(block_of[table.sites[around].name] for around in entry.within) for entry in table.sites]
    savings = [_saving(entry, site_of, block_of) for entry in table.sites]
    terms = [Term(table.full_ms)]
    for saving, around in zip(savings, within, strict=True):
        terms += [Term(-each, factors, inside | around) for each, factors, inside in saving.parts]
    for s, t, k in table.overlaps:
        terms += list(_products(savings[s], savings[t], k, within[s] | within[t]))
    return Cost(table.full_ms, tuple(terms))


def _saving(entry: Entry, site_of: dict[str, int], block_of: dict[str, int]) -> _Saving:
    if entry.kind == "block":  # all of it when closed: S (1 - b)
        return _Saving(((entry.saved[0], (), frozenset()), (-entry.saved[0], (), frozenset({block_of[entry.name]}))))
    curve = np.interp(np.arange(entry.width + 1), entry.widths, entry.saved)
    return _Saving(((1.0, (Factor(0.0, {site_of[entry.name]: curve}),), frozenset()),))


def _products(one: _Saving, other: _Saving, k: float, around: frozenset[int]) -> Iterator[Term]:
    for a, factors, inside in one.parts:
        for b, others, beside in other.parts:
            yield Term(k * a * b, (*factors, *others), around | inside | beside)


def _require_same(table: LatencyTable, sites: Sequence[Site], blocks: Sequence[Block]) -> None:
    wanted = {site.name: (site.kind, site.width) for site in sites} | {block.name: ("block", 1) for block in blocks}
    listed = {entry.name: (entry.kind, entry.width if entry.kind != "block" else 1) for entry in table.sites}
    for name in sorted(wanted.keys() | listed.keys()):
        if wanted.get(name) != listed.get(name):
            kind, width = wanted.get(name, ("nothing", 0))
            has = "a {} of width {}".format(*listed[name]) if name in listed else "nothing"
            what = f"{name!r} is {kind} of width {width} here, {has} in the table"
            raise ContentError(
                f"the latency table is of another network: {what}", "make one of this model and its settings"
            )
