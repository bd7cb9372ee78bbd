"""What surgery tells: `surgery.json`, and the same as a table for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.arrays import any_of
from polar_deploy.surgery.count import count, parameters
from polar_deploy.surgery.cut import Gate
from polar_deploy.surgery.facts import Note
from polar_deploy.surgery.mixing import Mixing
from polar_deploy.surgery.verify import Proof

if TYPE_CHECKING:
    import onnx
    from rich.console import Console
    from rich.text import Text

    from polar_deploy.surgery.count import Cost, Layer
    from polar_deploy.surgery.detached import DetachedModel
    from polar_deploy.surgery.facts import Bools, Channels, Facts, Ints, Step
    from polar_deploy.surgery.rounds import Round
    from polar_deploy.surgery.sets import Sets

SCHEMA = 2
ALIGNMENTS = (32, 16, 8, 4, 2, 1)
LONGEST_LINE = 400  # characters of what is printed
OTHERS = "products without weights"  # of two computed tensors, as in attention; no layer of the report does that
MULTIPLES = (8, 16, 32)  # what devices round widths up to, by precision


def build(rounds: list[Round], given: DetachedModel, proof: Proof | str | None) -> dict[str, Any]:
    """The report as `polar_deploy/schemas/surgery.schema.json` describes it.

    `given`: the model before the first round. `proof`: or why there is none, or None where
    it was not asked for. Pairs are [before, after]; widths and counts are channels, MACs at batch 1 at the shapes under
    `inputs`.
    """
    last = rounds[-1]
    before, after = (count(one.model, skeleton=one.skeleton) for one in (given, last.model))
    return {
        **_verdict(proof),
        "as_it_is": None,
        "inputs": {name: list(shape) for name, shape in before.inputs.items()},
        "macs": [before.macs, after.macs],
        "params": [before.params, after.params],
        "padding": _padding(after),
        "operators": _operators(given.model, last.model.model),
        "layers": _layers(rounds, before, after),
        "blocks_removed": [block for done in rounds for block in _blocks(done)],
        "gates": _gates(rounds),
        "cuts_not_made": _cuts_not_made(last.facts, last.sets) + _gates_not_followed(rounds),
        "unsupported": [
            _entry(step.plan) for step in last.facts.alive if isinstance(step.plan, Note) and _is_end(step)
        ],
    }


def as_it_is(model: onnx.ModelProto, reason: str, *, unproven: bool = False) -> dict[str, Any]:
    """The report on a model that comes back as it is. `reason`: why. `unproven`: whether it could not be run."""
    return {
        **_verdict(reason if unproven else Proof(0.0, None, "onnxruntime")),
        "as_it_is": reason,
        "inputs": {},
        "macs": None,
        "params": [sum(parameters(model).values())] * 2,
        "padding": None,
        "operators": _operators(model, model),
        **{key: [] for key in ("layers", "blocks_removed", "gates", "cuts_not_made", "unsupported")},
    }


def _verdict(proof: Proof | str | None) -> dict[str, Any]:
    made = proof if isinstance(proof, Proof) else None
    return {
        "schema": SCHEMA,
        "verified": made is not None,
        "unverified": "it was not asked for" if proof is None else proof if isinstance(proof, str) else None,
        "difference": made.difference if made else None,
        "tolerance": made.tolerance if made else None,
        "runtime": made.runtime if made else None,
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
    names = [field.name for field in fields(Gate)]
    return [{name: value for name in names if (value := getattr(gate, name)) is not None} for gate in gates.values()]


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
                "padding": _padding(now) if now else None,
            }
        )
    return rows


def _padding(cost: Cost | Layer) -> dict[str, float]:
    """Shares of the work that rounding widths up would waste, by the multiple."""
    return {str(multiple): round(cost.padding(multiple), 4) for multiple in MULTIPLES}


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


def _is_end(step: Step) -> bool:
    """Whether channels end at a node that they cannot be followed through; arithmetic on indices has none."""
    graph = step.graph
    ends = [tensor for tensor in (*step.original, *step.made) if step.facts.of(tensor) is not None]
    return any(graph.dtype(tensor) != np.int64 for tensor in ends)


def _entry(note: Note) -> dict[str, Any]:
    return {"node": note.node, "operator": note.operator, "reason": note.reason}


def _cuts_not_made(facts: Facts, sets: Sets) -> list[dict[str, Any]]:
    """Closed channels that stay, by the layer or gate that they are seen at first, and why."""
    asked = np.zeros(facts.total, bool)
    found: list[tuple[str, Ints]] = []
    stay = facts.total and any_of(facts.kept & (facts.gathered("constant") | ~facts.needed))
    for step in facts.alive if stay else ():
        if not (isinstance(step.handler, Mixing) or step.node.op == "Mul") or not step.outputs:
            continue
        channels = step.output
        closed = channels.kept & (channels.constant | ~channels.needed)
        if not any_of(closed):
            continue
        labels = np.unique(sets.of(channels)[closed])
        labels = labels[~asked[labels]]
        asked[labels] = True
        found.append((step.label, labels))
    why = reasons(facts, sets, asked)
    counts = Counter((layer, why[label]) for layer, labels in found for label in labels.tolist())
    return [
        {"layer": layer, "channels": number, "node": node, "operator": operator, "reason": reason}
        for (layer, (node, operator, reason)), number in counts.items()
    ]


def _gates_not_followed(rounds: list[Round]) -> list[dict[str, Any]]:
    """Products with a vector that has zeros which are no gates, since nothing is known of the channels there."""
    facts = rounds[-1].facts
    gates = {gate.node for done in rounds for gate in done.cut.gates}
    makers = {tensor.name: step for step in facts.steps for tensor in step.made}
    found = []
    for step in facts.alive:
        held = [tensor.values for tensor in step.original if tensor.values is not None]
        if step.node.op != "Mul" or len(held) != 1 or step.label in gates:
            continue
        zeros = int(np.count_nonzero(held[0] == 0))
        if zeros and 1 < held[0].size == max(held[0].shape):
            why = _end_before(step, makers) or step.note("its zeros lie along no axis whose channels are followed")
            found.append({"layer": step.label, "channels": zeros, **_entry(why)})
    return found


def _end_before(step: Step, makers: dict[str, Step]) -> Note | None:
    """The first node on the way to `step` that channels were not followed through; None where they came all along."""
    note: Note | None = None
    at: Step | None = step
    while at is not None:
        note = at.plan if isinstance(at.plan, Note) else note
        behind = [makers[tensor.name] for tensor in at.original if tensor.name in makers]
        at = next((each for each in behind if isinstance(each.plan, Note) or not each.outputs), None)
    return note


def reasons(facts: Facts, sets: Sets, asked: Bools) -> dict[int, tuple[str, str, str]]:
    """Why the sets stay that are asked for ([channels of the graph] by label), each with node, operator and reason.

    What an operator retains comes first, then pins, then constants that cannot move, then live members.
    """
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
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1), caption="lost: % of the work where widths are rounded up to 8/16/32"
    )
    table.add_column("layer", overflow="fold", min_width=16)
    for heading in ("in", "out", "MACs", "params", "lost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report["layers"]:
        row = [_pair(layer["in"]), _pair(layer["out"]), _left(layer["macs"]), _left(layer["params"])]
        if layer["out"][1]:
            table.add_row(_plain(layer["name"]), *row, _shares(layer["padding"]))
        else:
            table.add_row(_plain(layer["name"]), *row[:1], f"{layer['out'][0]:,} → removed")
    rest = [total - sum(layer["macs"][i] for layer in report["layers"]) for i, total in enumerate(report["macs"] or ())]
    if any(rest):
        table.add_row(OTHERS, "", "", _left(rest))
    console.print(table)

    def tell(line: str) -> None:
        console.print(_plain(line))

    for key in ("macs", "params") if report["macs"] else ():
        was, now = report[key]
        tell(f"{key}: {was:,} → {now:,} ({now / was if was else 1:.1%})")
    if report["params"][1] > report["params"][0]:
        tell(
            "more parameters than before: weights that several nodes share, or that are stored in a compressed form, "
            "are cut in different ways or scaled"
        )
    if report["as_it_is"]:
        tell(f"the model is as it was: {report['as_it_is']}")
        return
    tell(f"work lost where a device rounds widths up to 8/16/32: {_shares(report['padding'])} %")
    outcomes = Counter(gate["outcome"] for gate in report["gates"])
    gates = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "none"
    tell(f"blocks removed: {len(report['blocks_removed'])}; gates: {gates}")
    unexplained = not (outcomes or report["cuts_not_made"] or report["unsupported"])
    if unexplained and report["params"][0] == report["params"][1]:
        tell("nothing to cut: no channel is closed, by a gate or by a filter of zeros")
    for entry in report["cuts_not_made"]:
        tell(
            f"kept: {entry['channels']} closed channels of {entry['layer']}: {entry['reason']} "
            f"({entry['operator']} {entry['node']})"
        )
    for entry in report["unsupported"]:
        tell(f"not followed: {entry['operator']} {entry['node']}: {entry['reason']}")
    if report["verified"]:
        tell(f"verified: outputs differ by {report['difference']:.2g} of their scale")
    else:
        tell(f"NOT verified: {report['unverified']}")


def _plain(text: str) -> Text:
    """Names come from strangers: no markup, no control characters, no end."""
    from rich.text import Text

    short = text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}…"
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in short))


def _shares(padding: dict[str, float] | None) -> str:
    return "/".join(f"{100 * share:.0f}" for share in padding.values()) if padding else ""


def _pair(pair: list[int]) -> str:
    return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} → {pair[1]:,}"


def _left(pair: list[int]) -> str:
    """A large number and what is left of it; more than 0 becomes of 0 where a shared weight is cut for each reader."""
    was, now = pair
    if not was and now:
        return _pair(pair)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if was >= size:
            return f"{was / size:.3g} {unit}" + (f" {now / was:4.0%}" if now != was else " " * 5)
    return f"{was}" + (f" {now / was:4.0%}" if now != was else " " * 5)
