"""A measured latency as a cost: against what the table itself predicts, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polar_deploy.costs import State
from polar_deploy.errors import ContentError
from polar_deploy.gating.latency import table_cost
from polar_deploy.latency import Entry, LatencyTable
from polar_deploy.surgery.choices import Block, Site

# A stream that two blocks read and write. The first one has an inner layer, the second one another block in it.
ENTRIES = (
    Entry("stream", "stream", 16, (8, 16), (4.0, 0.0), ()),
    Entry("one.inner", "channel", 16, (4, 8, 16), (3.0, 1.0, 0.0), (2,)),
    Entry("one", "block", 1, (0, 1), (4.0, 0.0), ()),
    Entry("two.inner", "channel", 12, (4, 12), (1.0, 0.0), (4, 5)),
    Entry("two.nested", "block", 1, (0, 1), (2.0, 0.0), (5,)),
    Entry("two", "block", 1, (0, 1), (5.0, 0.0), ()),
)
OVERLAPS = (
    (0, 1, 0.1),  # stream and a layer
    (0, 2, 0.05),  # stream and a block
    (0, 3, 0.08),
    (0, 4, 0.03),  # stream and a block within a block
    (0, 5, 0.04),
    (2, 5, 0.01),  # two blocks
)
TABLE = LatencyTable("ort-fp32", 1, 20.0, ENTRIES, OVERLAPS)


def _site(entry: Entry, first: int) -> Site:
    return Site(entry.name, "stream" if entry.kind == "stream" else "channel", range(first, first + entry.width))


SITES = tuple(_site(entry, 100 * index) for index, entry in enumerate(ENTRIES) if entry.kind != "block")
BLOCKS = tuple(
    Block(entry.name, 0, 1000 + index, np.arange(16), frozenset())
    for index, entry in enumerate(ENTRIES)
    if entry.kind == "block"
)


def _opened(state: State) -> dict[str, int]:
    opened = {site.name: width for site, width in zip(SITES, state.widths, strict=True)}
    return opened | {block.name: int(kept) for block, kept in zip(BLOCKS, state.blocks, strict=True)}


def _random_states(number: int) -> list[State]:
    random = np.random.default_rng(0)
    return [
        State(
            tuple(int(random.integers(0, site.width + 1)) for site in SITES),
            tuple(bool(random.random() < 0.6) for _ in BLOCKS),
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize(
    ("widths", "blocks", "expected"),
    [
        ((16, 16, 12), (True, True, True), 20.0),
        ((8, 16, 12), (True, True, True), 16.0),
        ((16, 6, 12), (True, True, True), 18.0),  # half way from 1 to 3 ms
        ((8, 4, 12), (True, True, True), 20 - 4 - 3 + 0.1 * 4 * 3),
        ((8, 4, 12), (False, True, True), 20 - 4 - 4 + 0.05 * 4 * 4),  # the layer has gone with its block
        ((12, 16, 4), (True, True, True), 20 - 2 - 1 + 0.08 * 2 * 1),  # half of the stream's saving
        ((16, 16, 4), (True, False, True), 18.0),
        ((16, 16, 4), (True, False, False), 15.0),  # the outer block alone
        ((16, 16, 4), (True, True, False), 15.0),
        ((16, 16, 12), (False, True, False), 20 - 4 - 5 + 0.01 * 4 * 5),
        ((8, 16, 12), (True, False, True), 20 - 4 - 2 + 0.03 * 4 * 2),
    ],
)
def test_by_hand(widths: tuple[int, ...], blocks: tuple[bool, ...], expected: float) -> None:
    cost, state = table_cost(TABLE, SITES, BLOCKS), State(widths, blocks)
    assert cost.full == 20.0
    assert cost.absolute(state) == pytest.approx(expected)
    assert cost.share(state) == pytest.approx(expected / 20)


@pytest.mark.parametrize("overlaps", [(), OVERLAPS])
def test_it_is_what_the_table_predicts(overlaps: tuple[tuple[int, int, float], ...]) -> None:
    table = replace(TABLE, overlaps=overlaps)
    cost = table_cost(table, SITES, BLOCKS)
    states = _random_states(200)
    assert len({state.blocks for state in states}) == 8
    for state in states:
        assert cost.absolute(state) == pytest.approx(table.predicted_ms(_opened(state)))


def test_the_order_of_sites_does_not_matter() -> None:
    """Not that of the table's, nor that of the network's."""
    last = len(ENTRIES) - 1
    turned = LatencyTable(
        "ort-fp32",
        1,
        20.0,
        tuple(replace(entry, within=tuple(last - b for b in entry.within)) for entry in reversed(ENTRIES)),
        tuple((last - s, last - t, k) for s, t, k in OVERLAPS),
    )
    one, other = table_cost(TABLE, SITES, BLOCKS), table_cost(turned, SITES[::-1], BLOCKS[::-1])
    for state in _random_states(50):
        back = State(state.widths[::-1], state.blocks[::-1])
        assert other.absolute(back) == pytest.approx(one.absolute(state))


def test_terms_are_products_of_at_most_two_widths() -> None:
    """What the solver takes: and one table of a site in each factor, from no channel to all."""
    for term in table_cost(TABLE, SITES, BLOCKS).terms:
        assert len(term.factors) <= 2
        for factor in term.factors:
            assert all(len(table) == SITES[site].width + 1 for site, table in factor.tables.items())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((*ENTRIES, Entry("more", "block", 1, (0, 1), (1.0, 0.0), ())), "'more' is nothing of width 0 here"),
        (ENTRIES[:-1], "'two' is block of width 1 here, nothing in the table"),
        ((replace(ENTRIES[0], width=32), *ENTRIES[1:]), "'stream' is stream of width 16 here, a stream of width 32"),
        ((replace(ENTRIES[0], kind="channel"), *ENTRIES[1:]), "'stream' is stream of width 16 here, a channel of"),
    ],
)
def test_a_table_of_another_network_is_refused(entries: tuple[Entry, ...], message: str) -> None:
    with pytest.raises(ContentError, match=message):
        table_cost(replace(TABLE, sites=entries, overlaps=()), SITES, BLOCKS)
