"""Cuts after facts: every node is cut to the channels that stay, gates fold, and what feeds nothing goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.ops.elementwise import Multiply, keeps_shape

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Facts, Floats, Step
    from polar_deploy.surgery.graph import Graph, Node, Tensor


@dataclass(frozen=True)
class Gate:
    """A node that multiplies by one constant a channel, and what became of it.

    outcome: "removed" (with all channels that it closed), "folded" (into the weights of the node `into`; into zero
    filters or columns where that is absent), or "kept" (for `reason`).
    """

    node: str
    site: str | None
    kind: str | None
    width: int
    closed: int
    removed_channels: int
    outcome: str
    into: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Cut:
    """What the cut did to a graph: its gates, and the nodes that went."""

    gates: list[Gate]
    dropped: list[Node]


def apply(facts: Facts) -> Cut:
    """Cuts the graph as planned by `sets.decide`."""
    found = [(step, factors) for step in facts.steps if (factors := step.handler.gate(step)) is not None]
    gates = {id(step.node): _record(step, factors) for step, factors in found}
    for step in facts.alive:
        if not step.outputs or not all(channels.gone for channels in step.outputs):
            step.handler.slice(step)
    dropped = facts.graph.drop_unused()
    steps = {id(step.node): step for step in facts.alive}
    for step in (*facts.alive, *reversed(facts.alive)):  # factors move up in the one order, down in the other
        index = _factor(step)
        if index is not None:
            into = _fold(steps, step, index)
            if id(step.node) in gates:
                gates[id(step.node)] = _concluded(gates[id(step.node)], into)
    return Cut(list(gates.values()), dropped + facts.graph.drop_unused())


def _record(step: Step, factors: Floats) -> Gate:
    """The gate before the cut."""
    metadata = step.graph.metadata(step.node)
    kept = step.output.kept
    return Gate(
        node=step.label,
        site=metadata.get("polar_deploy.site"),
        kind=metadata.get("polar_deploy.kind"),
        width=factors.size,
        closed=int((factors == 0).sum()),
        removed_channels=int((~kept).sum()),
        outcome="folded" if (kept & (factors == 0)).any() else "removed",
    )


def _factor(step: Step) -> int | None:
    """The input of a Mul that is left which holds one constant a kept channel, be it a gate or a constant branch."""
    if not isinstance(step.handler, Multiply) or not step.graph.contains(step.node):
        return None
    kept = int(step.output.kept.sum())
    found = [i for i in (0, 1) if (values := step.constant(i)) is not None and values.size == kept]
    return found[0] if len(found) == 1 else None


def _fold(steps: dict[int, Step], step: Step, index: int) -> str | None:
    """Moves the factors of a Mul into the weights of its neighbours, where that is exact to rounding.

    Returns:
        The nodes whose weights took them up; None: the Mul stays.
    """
    graph, node = step.graph, step.node
    if not keeps_shape(step, 1 - index) or not graph.can_bypass(node, 1 - index):
        return None
    factors: Floats = step.parameter(index, "factor").astype(np.float64).ravel()
    producer, readers = _producer(steps, node.inputs[1 - index], graph), _readers(steps, node.outputs[0], graph)
    if producer is not None and producer.handler.scale_output(producer, factors):
        into = producer.label
    elif readers:
        into = ", ".join(reader.label for reader in readers)
        for reader in readers:
            reader.handler.scale_input(reader, factors)
    else:
        return None
    graph.bypass(node, 1 - index)
    return into


def _concluded(gate: Gate, into: str | None) -> Gate:
    if into is not None:
        return replace(gate, outcome="folded", into=into, reason=None)
    reason = "its factors can move neither into one producer nor into all of its readers"
    return replace(gate, outcome="kept", reason=reason)


def _producer(steps: dict[int, Step], tensor: Tensor, graph: Graph) -> Step | None:
    """What makes `tensor`, where nobody else reads it."""
    if not tensor.inputs or len(tensor.outputs) != 1 or not graph.is_private(tensor.name):
        return None
    return steps.get(id(tensor.inputs[0]))


def _readers(steps: dict[int, Step], tensor: Tensor, graph: Graph) -> list[Step]:
    """All readers of `tensor` where every one can make up for factors; none otherwise."""
    readers = [steps[id(reader)] for reader in tensor.outputs]
    able = all(
        reader.handler.scales_input(reader) and [t is tensor for t in reader.node.inputs].index(True) == 0
        for reader in readers
    )
    return readers if able and graph.is_private(tensor.name) else []
