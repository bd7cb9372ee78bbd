"""What surgery knows of one tensor, in words: which channels go, which stay, with whom, and why."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.errors import UsageError
from polar_deploy.surgery import detached, sets
from polar_deploy.surgery.defaults import without_defaults
from polar_deploy.surgery.facts import Facts
from polar_deploy.surgery.graph import Graph
from polar_deploy.surgery.inline import inlined
from polar_deploy.surgery.observed import with_observed
from polar_deploy.surgery.report import reasons

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Channels, Ints
    from polar_deploy.surgery.sets import Sets

SHOWN = 12  # other tensors, and different constants, that are listed


def explain_file(source: Path, name: str) -> list[str]:
    """What is known of a tensor of the model at `source`, a line for each fact; nothing is written.

    Args:
        name: of the tensor, or of a node, whose first output is meant.

    Raises:
        UsageError: `source` is missing, or has no such tensor.
        ContentError: it is no model, or not valid.
    """
    model = detached.read(source)
    model.skeleton.check(str(source))
    graph = Graph(with_observed(inlined(without_defaults(model))))
    tensor = _tensor(graph, name, source)
    given = Facts(graph).named(tensor)
    facts, plan = sets.plan(graph)
    channels = facts.named(tensor)
    if given is None or channels is None:
        return [f"{tensor}: no channels are followed here: it is a constant, or behind what surgery does not know"]
    return [*_head(channels), *_fate(given, channels), *_partners(facts, plan, channels), *_kept(facts, plan, channels)]


def _tensor(graph: Graph, name: str, source: Path) -> str:
    """The name of a tensor. Raises UsageError."""
    nodes = {graph.label(node): node.outputs[0].name for node in graph.nodes if node.outputs}
    tensors = [
        tensor.name for tensor in (*graph.inputs, *(t for node in graph.nodes for t in node.outputs)) if tensor.name
    ]
    if name in tensors:
        return name
    if name in nodes:
        return nodes[name]
    near = get_close_matches(name, [*tensors, *nodes], 3)
    raise UsageError(
        f"{source} has no tensor and no node {name!r}",
        f"the nearest names are {', '.join(near)}" if near else "names are those that a viewer such as Netron shows",
    )


def _head(channels: Channels) -> Iterator[str]:
    axes = " and ".join(map(str, channels.axes))
    sizes = "" if len(channels.axes) == 1 else f" ({' x '.join(map(str, channels.dims))})"
    yield f"{channels.tensor}: {len(channels)} channels{sizes} on axis {axes}, made by {channels.producer}"


def _fate(given: Channels, channels: Channels) -> Iterator[str]:
    """given: as the model stands; channels: with the cut as planned."""
    for title, which in (
        ("go", ~channels.kept),
        ("needed", channels.needed),
        ("kept though nobody needs them", channels.kept & ~channels.needed),
    ):
        if which.any():
            yield f"  {title}: {_numbers(which)}"
    for title, one in (("constant", given), ("constant after the cut", channels)):
        which = one.constant & (channels.kept if one is channels else True)
        if one is channels and np.array_equal(which, given.constant & channels.kept):
            continue
        values = np.unique(one.value[which])
        parts = [f"{_numbers(which & (one.value == value))} = {value:.6g}" for value in values[:SHOWN]]
        if parts:
            yield f"  {title}: {'; '.join(parts)}{_more(len(values))}"


def _partners(facts: Facts, plan: Sets, channels: Channels) -> Iterator[str]:
    """The tensors that share coupled sets with this one."""
    mine = np.unique(plan.of(channels))
    others = [
        (int(np.isin(mine, plan.of(other)).sum()), other)
        for other in facts.everything()
        if other is not channels and np.isin(mine, plan.of(other)).any()
    ]
    for count, other in others[:SHOWN]:
        yield f"  {count} of them go or stay together with {other.tensor}, made by {other.producer}"
    if len(others) > SHOWN:
        yield f"  and with {len(others) - SHOWN} more tensors"


def _kept(facts: Facts, plan: Sets, channels: Channels) -> Iterator[str]:
    """Why channels stay, the strongest reason for each."""
    labels: Ints = plan.of(channels)
    asked = np.zeros(facts.total, bool)
    asked[labels[channels.kept]] = True
    found = reasons(facts, plan, asked)
    grouped: dict[tuple[str, str, str], Bools] = {}
    for label, why in found.items():
        grouped[why] = grouped.get(why, np.zeros(len(channels), bool)) | (labels == label)
    for (node, operator, reason), which in grouped.items():
        yield f"  {_numbers(which)} stay: {reason} ({operator} {node})"


def _numbers(which: Bools) -> str:
    """Channels in words: 0-3, 7."""
    at = np.flatnonzero(which)
    runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(parts[:SHOWN]) + _more(len(parts)) + ("" if len(at) < 2 else f" ({len(at)})")


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""
