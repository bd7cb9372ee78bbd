"""The cut, when facts are known: nodes keep the channels that stay, gates fold, and what feeds nothing goes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.onnx_files import KIND, SITE
from polar_deploy.surgery.arrays import any_of
from polar_deploy.surgery.elementwise import keeps_shape
from polar_deploy.surgery.ops.gates import Multiply
from polar_deploy.surgery.standins import STANDARD

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Facts, Floats, Step
    from polar_deploy.surgery.graph import Graph
    from polar_deploy.surgery.ir import Node, Tensor


LEFT = "what it closes is needed, and in use elsewhere as well"


@dataclass(frozen=True)
class Gate:
    """A node that multiplies by one constant a channel, or masks channels, and what became of it.

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


@np.errstate(all="ignore")
def apply(facts: Facts) -> Cut:
    """Cuts the graph as planned by `sets.decide`."""
    found = [(step, factors) for step in facts.steps if (factors := step.handler.gate(step)) is not None]
    gates = {id(step.node): _record(step, factors) for step, factors in found}
    dropped = trim(facts)
    steps, folded = {id(step.node): step for step in facts.alive}, False
    for step in (*facts.alive, *reversed(facts.alive)):  # factors move up in the one order, down in the other
        index = _factor(step)
        if index is not None:
            into = _fold(steps, step, index)
            folded |= into is not None
            if id(step.node) in gates:
                gates[id(step.node)] = _concluded(gates[id(step.node)], into)
    dropped += facts.graph.drop_unused() if folded else []
    for step, _ in found:
        if facts.graph.contains(step.node) and gates[id(step.node)].reason is None:
            gates[id(step.node)] = replace(gates[id(step.node)], outcome="kept", reason=LEFT)
    return Cut(list(gates.values()), dropped)


def trim(facts: Facts) -> list[Node]:
    """Cuts every node to the channels that stay, and folds nothing. Returns the nodes that went."""
    for step in facts.alive:
        if not step.outputs or not all(channels.is_removed for channels in step.outputs):
            step.handler.slice(step)
        if step.node.domain not in STANDARD:
            _declare(facts, step)
    return facts.graph.drop_unused()


def _declare(facts: Facts, step: Step) -> None:
    """Says how large the results are of an operator for which onnx infers no shapes."""
    for tensor in step.node.outputs:
        channels = facts.of(tensor)
        if channels is not None and not channels.kept.all():
            for axis in channels.axes:
                facts.graph.resize(tensor, axis, len(channels.keep(axis)))


def _record(step: Step, factors: Floats) -> Gate:
    """The gate before the cut."""
    metadata = step.graph.metadata(step.node)
    kept = step.output.kept
    return Gate(
        node=step.label,
        site=metadata.get(SITE),
        kind=metadata.get(KIND),
        width=factors.size,
        closed=int(np.count_nonzero(factors == 0)),
        removed_channels=int(np.count_nonzero(~kept)),
        outcome="folded" if any_of(kept & (factors == 0)) else "removed",
    )


def _factor(step: Step) -> int | None:
    """The input of a Mul that is left which holds one constant a kept channel, be it a gate or a constant branch."""
    if not isinstance(step.handler, Multiply) or not step.graph.contains(step.node):
        return None
    found = [i for i in (0, 1) if (values := step.constant(i)) is not None and _is_along(step, values)]
    return found[0] if len(found) == 1 else None


def _is_along(step: Step, values: Array) -> bool:
    """Whether a constant has one element a kept channel, and lies along the channels and no other axis."""
    target, rank = step.output, len(step.graph.shape(step.made[0]) or ())
    own = [axis - rank for axis in target.axes if axis - rank >= -values.ndim]
    return bool(values.size == int(target.kept.sum()) == math.prod(values.shape[axis] for axis in own))


def _fold(steps: dict[int, Step], step: Step, index: int) -> str | None:
    """Moves the factors of a Mul into the weights of its neighbours, where that is exact to rounding.

    Returns:
        The nodes whose weights took them up; None: the Mul stays.
    """
    graph, node = step.graph, step.node
    if not keeps_shape(step, 1 - index) or not graph.can_bypass(node, 1 - index):
        return None
    factors: Floats = step.parameter(index, "factor").astype(np.float64).ravel()
    into, readers = _absorb(steps, node.inputs[1 - index], factors, graph), _readers(steps, node.outputs[0], graph)
    if into is None and not readers:
        return None
    if into is None:
        into = ", ".join(reader.label for reader in readers)
        for reader in readers:
            reader.handler.scale_input(reader, factors)
    graph.bypass(node, 1 - index)
    return into


def _absorb(steps: dict[int, Step], tensor: Tensor, factors: Floats, graph: Graph) -> str | None:
    """Scales what makes `tensor`, which nobody else reads; a layer's bias and Transpose may stand in between.

    Returns:
        The node whose weights took the factors up; None, and nothing is done, where there is none.
    """
    between: list[Step] = []
    while (producer := _producer(steps, tensor, graph)) is not None:
        if producer.handler.scale_output(producer, factors):
            for step in between:
                step.handler.scale_addend(step, factors)
            return producer.label
        index = producer.handler.through(producer)
        if index is None:
            return None
        between.append(producer)
        tensor = producer.node.inputs[index]
    return None


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
