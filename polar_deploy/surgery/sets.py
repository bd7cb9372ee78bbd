"""Which channels go: whole coupled sets in which nobody needs any member."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Facts, Note
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polar_deploy.surgery.facts import Bools, Channels, Ints
    from polar_deploy.surgery.graph import Graph


@dataclass(frozen=True)
class Sets:
    """The coupled sets of a graph and what was decided about them.

    labels: [channels of the graph] the set that a channel belongs to.
    retained: sets that nobody needs and that stay all the same, with the reason.
    """

    labels: Ints
    retained: dict[int, Note]

    def of(self, channels: Channels) -> Ints:
        """[channels of the tensor] their sets."""
        return self.labels[channels.first : channels.first + len(channels)]


def plan(graph: Graph) -> tuple[Facts, Sets]:
    """The facts about a graph, and what goes.

    Where the plan would leave something in a kept channel that might come out infinite, that channel is needed after
    all, and everything is asked anew. Nearly always the first answer stands.
    """
    demands: dict[str, Bools] = {}
    retained: dict[int, Note] = {}
    while True:
        facts = Facts(graph, demands)
        sets = decide(facts)
        facts.update_after_cut()
        retained.update(sets.retained)
        found = [found for step in facts.alive for found in step.handler.must_keep_values(step)]
        if not found:
            return facts, replace(sets, retained={int(sets.labels[label]): note for label, note in retained.items()})
        for channels, which in found:
            demands[channels.tensor] = demands.get(channels.tensor, False) | which


def decide(facts: Facts) -> Sets:
    """Plans the cut: sets `kept` of every tensor's channels."""
    labels = components(facts)
    sets = Sets(labels, {})
    if facts.total:
        blocked = np.zeros(facts.total, bool)
        blocked[labels[facts.needed | facts.gathered("pinned")]] = True
        facts.keep(blocked[labels])
        _retain(facts, sets)
    return sets


def _retain(facts: Facts, sets: Sets) -> None:
    """Takes back what operators cannot do without; going backwards, one pass is enough for a whole chain."""
    order = np.argsort(sets.labels, kind="stable")
    starts = np.searchsorted(sets.labels[order], np.arange(facts.total + 1))
    blocks = [channels for channels in facts.everything() if len(channels.axes) > 1]
    changed = True

    def keep(channels: Channels, indices: Ints, note: Note) -> None:
        nonlocal changed
        for label in sets.of(channels)[indices].tolist():
            facts.kept[order[starts[label] : starts[label + 1]]] = True
            sets.retained.setdefault(label, note)
            changed = True

    while changed:
        changed = False
        all_there = bool(facts.by_tensor(np.logical_or, facts.kept).all())
        for step in reversed(facts.alive):
            if all_there and type(step.handler).retain is Operator.retain:
                continue  # it asks for one channel of what is gone
            for retained in step.handler.retain(step):
                keep(retained.channels, retained.indices, step.note(retained.reason))
        for channels in blocks:
            if len(missing := np.flatnonzero(channels.block() & ~channels.kept)):
                keep(channels, missing, Note(channels.producer, "block", "its rows and columns are cut as a whole"))


def components(facts: Facts, more: Sequence[tuple[Ints, Ints]] = ()) -> Ints:
    """[channels of the graph] the smallest channel that each one is coupled with.

    more: further pairs of channels that count as coupled, by their numbers in the graph.

    Connected components by hooking and pointer jumping, in a number of rounds that grows with the logarithm of the
    longest chain.
    """
    links = [link for step in facts.alive for link in (*step.links, *step.ties) if link.coupled]
    pairs = [(link.source.first + link.out_of, link.target.first + link.into) for link in links]
    ends = [np.concatenate(each) for each in zip(*pairs, *more, strict=True)]
    one, other = ends or [np.empty(0, np.int64)] * 2
    labels = np.arange(facts.total)
    while True:
        low = np.minimum(labels[one], labels[other])
        roots = labels.copy()
        np.minimum.at(roots, labels[one], low)
        np.minimum.at(roots, labels[other], low)
        while not np.array_equal(roots, jumped := roots[roots]):
            roots = jumped
        if np.array_equal(roots, labels):
            return labels
        labels = roots
