"""From gates to files: the gated network as ONNX, each mask as one Mul that tells its gates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from polar_deploy import export as exporter
from polar_deploy.errors import ContentError
from polar_deploy.gating import masking
from polar_deploy.gating.analysis import Analysis
from polar_deploy.gating.places import aliases
from polar_deploy.surgery import detached
from polar_deploy.surgery.choices import NEVER, Choices
from polar_deploy.surgery.facts import Bools

SITE, KIND, GATES = "polar_deploy.site", "polar_deploy.kind", "polar_deploy.gates"  # metadata of a mask's Mul


def export(
    model: nn.Module, analysis: Analysis, path: Path, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> None:
    """Write the masked model as ONNX, see `Gates.export`."""
    with masking.exporting():
        graph = exporter.capture(model, analysis.example, inputs=inputs, outputs=outputs).deployable()
    _note_gates(graph, model, analysis)
    detached.save(graph, path)


def _note_gates(graph: onnx.ModelProto, model: nn.Module, analysis: Analysis) -> None:
    """Mark each mask's Mul, in place of the exporter's own notes."""
    wanted: dict[str, dict[str, int]] = {
        place.module: {} for place in analysis.places
    }  # module: the index of a mask by its buffer
    for index, place in reversed(list(enumerate(analysis.places))):
        wanted[place.module][masking.buffer(place)] = index
    first = aliases(model)  # the exporter may know a module by another of its names
    found = set()
    exporter.drop_notes(graph)
    for node in graph.graph.node:
        for name in node.input if node.op_type == "Mul" else ():
            path, _, buffer = name.rpartition(".")
            path = first.get(path, path)
            if buffer in wanted.get(path, ()):
                found.add((path, buffer))
                for key, value in _notes(analysis.choices, wanted[path][buffer]).items():
                    node.metadata_props.add(key=key, value=value)
    lost = [f"{path}.{buffer}" for path in wanted for buffer in wanted[path] if (path, buffer) not in found]
    if lost:
        raise ContentError(
            f"the export lost {lost[0]}" + (f" and {len(lost) - 1} more masks" if lost[1:] else ""),
            "report this network: each mask must come through the exporter as one Mul",
        )


def _notes(choices: Choices, mask: int) -> dict[str, str]:
    """What the Mul of a mask tells: the sites whose gates it closes, and which of its channels belong to which gate."""
    gates = choices.gate_of[mask]
    told: dict[str, dict[str, object]] = {}
    for span, name, kind in choices.owners():
        own = np.where((gates >= span.start) & (gates < span.stop), gates - span.start, NEVER)
        if (own != NEVER).any():
            told[name] = {"kind": kind, "width": len(span), "runs": _runs(own.tolist())}
    return {
        SITE: ",".join(told),
        KIND: ",".join(dict.fromkeys(str(each["kind"]) for each in told.values())),
        GATES: json.dumps(told, separators=(",", ":")),
    }


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """The gates of successive channels, without `NEVER`: [first channel, first gate, channels, step between gates]."""
    runs: list[list[int]] = []
    for channel, gate in enumerate(numbers):
        if gate == NEVER:
            continue
        last = runs[-1] if runs else None
        if last is not None and last[0] + last[2] == channel:
            step = gate - (last[1] + (last[2] - 1) * last[3])
            if last[2] == 1 or step == last[3]:
                last[2], last[3] = last[2] + 1, step
                continue
        runs.append([channel, gate, 1, 1])
    return runs


@contextmanager
def masked(model: nn.Module, analysis: Analysis, opened: Bools | None = None) -> Iterator[None]:
    """Inside, a model without gates has masks, at the state bool [gates] or all open."""
    handles = masking.attach(model, analysis.places, [mask.width for mask in analysis.choices.masks])
    try:
        if opened is not None:
            masking.write(model, analysis.places, analysis.gate_masks(torch.from_numpy(opened).float()))
        yield
    finally:
        masking.detach(model, analysis.places, handles)


def write_open(model: nn.Module, analysis: Analysis, path: Path) -> None:
    """Write a model without gates as if it had them, all open: for measuring what each one costs."""
    with masked(model, analysis):
        export(model, analysis, path)
