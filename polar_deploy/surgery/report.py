"""What surgery tells: `surgery.json`, and the same as a table for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.facts import Note
from polar_deploy.surgery.mixing import Mixing
from polar_deploy.surgery.model import concrete_inputs
from polar_deploy.surgery.operator import Unknown

if TYPE_CHECKING:
    import onnx
    from rich.console import Console

    from polar_deploy.surgery.count import Cost
    from polar_deploy.surgery.facts import Bools, Channels, Facts, Ints, Step
    from polar_deploy.surgery.rounds import Round
    from polar_deploy.surgery.sets import Sets
    from polar_deploy.surgery.verify import Proof

SCHEMA = 1
ALIGNMENTS = (32, 16, 8, 4, 2, 1)


def build(rounds: list[Round], costs: tuple[Cost, Cost], proof: Proof | None) -> dict[str, Any]:
    """The report as `polar_deploy/schemas/surgery.schema.json` describes it.

    Pairs are [before, after]; widths and counts are channels, MACs at batch 1 at the shapes under `inputs`.
    """
    first, last, (before, after) = rounds[0], rounds[-1], costs
    model = first.facts.graph.model
    return {
        "schema": SCHEMA,
        "verified": proof is not None,
        "difference": proof.difference if proof else None,
        "tolerance": proof.tolerance if proof else None,
        "runtime": proof.runtime if proof else None,
        "inputs": {name: list(shape) for name, shape in concrete_inputs(model, 1).items()},
        "macs": [before.macs, after.macs],
        "params": [before.params, after.params],
        "operators": _operators(model, last.model),
        "layers": _layers(rounds, before, after),
        "blocks_removed": [block for done in rounds for block in _blocks(done)],
        "gates": _gates(rounds),
        "cuts_not_made": _cuts_not_made(last.facts, last.sets),
        "walls": [_entry(step.memo) for step in last.facts.alive if _is_wall(step)],
    }


def _gates(rounds: list[Round]) -> list[dict[str, Any]]:
    """Every gate of the graph as it was given; the last round that saw it says what became of it."""
    gates = {gate.node: gate for gate in rounds[0].cut.gates}
    for later in rounds[1:]:
        for gate in later.cut.gates:
            if gate.node in gates:
                removed = gates[gate.node].removed_channels + gate.removed_channels
                outcome = {name: getattr(gate, name) for name in ("outcome", "into", "reason")}
                gates[gate.node] = replace(gates[gate.node], removed_channels=removed, **outcome)
    return [{name: value for name, value in asdict(gate).items() if value is not None} for gate in gates.values()]


def _operators(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[str, list[int]]:
    was, now = (Counter(node.op_type for node in model.graph.node) for model in (before, after))
    return {name: [was[name], now[name]] for name in sorted(was | now)}


def _layers(rounds: list[Round], before: Cost, after: Cost) -> list[dict[str, Any]]:
    graph, labels = rounds[0].facts.graph, rounds[-1].labels
    left = {labels[layer.node]: layer for layer in after.layers}
    rows = []
    for layer in before.layers:
        name = graph.label(graph.original_nodes[layer.node])
        now = left.get(name)
        width = now.width if now else (0, 0)
        rows.append(
            {
                "name": name,
                "operator": layer.operator,
                "in": [layer.width[0], width[0]],
                "out": [layer.width[1], width[1]],
                "macs": [layer.macs, now.macs if now else 0],
                "params": [layer.params, now.params if now else 0],
                "alignment": {"in": alignment(width[0]), "out": alignment(width[1])},
            }
        )
    return rows


def alignment(width: int) -> int:
    """The largest of 32, 16, 8, 4, 2, 1 that divides a width; 0 for no channels."""
    return next(step for step in ALIGNMENTS if width % step == 0) if width else 0


def _blocks(done: Round) -> list[dict[str, Any]]:
    """Adds that became identities because a branch was constant, with the layers of that branch."""
    dropped = {id(node) for node in done.cut.dropped}
    makers = {tensor.name: step for step in done.facts.steps for tensor in step.made}
    return [
        {"add": step.label, "layers": _branch(step, makers, dropped)}
        for step in done.facts.alive
        if step.node.op in ("Add", "Sum") and id(step.node) in dropped and step.replaced
    ]


def _branch(step: Step, makers: dict[str, Step], dropped: set[int]) -> list[str]:
    """Layers that went, upstream of the inputs of `step` that were replaced by constants."""
    pending = [step.original[index].name for index in step.replaced]
    seen: set[str] = set()
    layers = []
    while pending:
        name = pending.pop()
        maker = makers.get(name)
        if name in seen or maker is None or id(maker.node) not in dropped:
            continue
        seen.add(name)
        if isinstance(maker.handler, Mixing):
            layers.append(maker.label)
        pending.extend(tensor.name for tensor in maker.original)
    return layers[::-1]


def _is_wall(step: Step) -> bool:
    """Whether channels end at a node that they cannot be followed through; shape arithmetic has none."""
    ends = step.outputs or any(channels is not None for channels in step.inputs)
    return isinstance(step.handler, Unknown) and bool(ends)


def _entry(note: Note) -> dict[str, Any]:
    return {"node": note.node, "operator": note.operator, "reason": note.reason}


def _cuts_not_made(facts: Facts, sets: Sets) -> list[dict[str, Any]]:
    """Closed channels that stay, by the layer or gate that they are seen at first, and why."""
    asked = np.zeros(facts.total, bool)
    found: list[tuple[str, Ints]] = []
    for step in facts.alive:
        if not (isinstance(step.handler, Mixing) or step.node.op == "Mul") or not step.outputs:
            continue
        channels = step.output
        labels = np.unique(sets.of(channels)[channels.kept & (channels.constant | ~channels.needed)])
        labels = labels[~asked[labels]]
        asked[labels] = True
        found.append((step.label, labels))
    reasons = _reasons(facts, sets, asked)
    counts = Counter((layer, reasons[label]) for layer, labels in found for label in labels.tolist())
    return [
        {"layer": layer, "channels": number, "node": node, "operator": operator, "reason": reason}
        for (layer, (node, operator, reason)), number in counts.items()
    ]


def _reasons(facts: Facts, sets: Sets, asked: Bools) -> dict[int, tuple[str, str, str]]:
    """Why sets stay: what an operator retains, then pins, then constants that cannot move, then live members."""
    best: dict[int, tuple[int, tuple[str, str, str]]] = {}
    if not asked.any():
        return {}

    def offer(labels: Ints, rank: int, note: Note) -> None:
        for label in np.unique(labels[asked[labels]]).tolist():
            if label not in best or rank < best[label][0]:
                best[label] = (rank, (note.node, note.operator, note.reason))

    for label, note in sets.retained.items():
        offer(np.array([label]), 0, note)
    for channels in facts.everything():
        for rank, held, note in _holds(channels):
            offer(sets.of(channels)[held], rank, note)
    return {label: reason for label, (_, reason) in best.items()}


def _holds(channels: Channels) -> list[tuple[int, Bools, Note]]:
    """What keeps channels of one tensor: (rank, which, why)."""
    every = np.ones(len(channels), bool)
    holds = [
        (1 if note.channels is None else 2, every if note.channels is None else note.channels, note)
        for note in channels.notes
    ]
    live = Note(channels.producer, "coupling", f"it goes together with channels in use, in {channels.tensor}")
    fixed = Note(channels.producer, "coupling", f"its constant is needed in {channels.tensor}")
    return [
        *holds,
        (3, channels.needed & ~channels.constant, live),
        (4, channels.needed & channels.constant, fixed),
    ]


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the report as a table."""
    from rich.table import Table

    table = Table("layer", "operator", "in", "out", "MACs", "params", "aligned")
    for layer in report["layers"]:
        widths = [_pair(layer[key]) for key in ("in", "out", "macs", "params")]
        aligned = str(layer["alignment"]["out"]) if layer["out"][1] else "gone"
        table.add_row(layer["name"], layer["operator"], *widths, aligned)
    console.print(table)
    for key in ("macs", "params"):
        was, now = report[key]
        console.print(f"{key}: {was:,} -> {now:,} ({now / was if was else 1:.1%})")
    outcomes = Counter(gate["outcome"] for gate in report["gates"])
    console.print(f"blocks removed: {len(report['blocks_removed'])}; gates: {dict(outcomes)}")
    for entry in report["cuts_not_made"]:
        console.print(
            f"kept: {entry['channels']} closed channels of {entry['layer']}: {entry['reason']} "
            f"({entry['operator']} {entry['node']})",
            markup=False,
        )
    for wall in report["walls"]:
        console.print(f"wall: {wall['operator']} {wall['node']}: {wall['reason']}", markup=False)
    if report["verified"]:
        console.print(f"verified: outputs differ by {report['difference']:.2g} of their scale")
    else:
        console.print("NOT verified")


def _pair(pair: list[int]) -> str:
    return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} -> {pair[1]:,}"
