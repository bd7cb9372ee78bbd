"""From gates to files: the gated network as ONNX, each mask as one Mul that tells its gates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from polar_deploy import export as exporter
from polar_deploy.errors import UsageError
from polar_deploy.gating import masking
from polar_deploy.gating.analysis import Analysis, require_float32
from polar_deploy.gating.rehearsal import require_same
from polar_deploy.onnx_files import GATES, KIND, SITE
from polar_deploy.surgery import detached
from polar_deploy.surgery.choices import MASK, NEVER, Choices, constant_name, insert, with_values
from polar_deploy.surgery.detached import DetachedModel
from polar_deploy.surgery.facts import Bools


def export(
    model: nn.Module, analysis: Analysis, path: Path, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
) -> None:
    """Write the masked model as ONNX, see `Gates.export`."""
    graph = analysis.structure.model.graph
    _require_names("inputs", inputs, len(graph.input))
    _require_names("outputs", outputs, len(graph.output), inputs)
    values = zip(analysis.choices.masks, masking.read(model, analysis.places), strict=True)
    closed = {constant_name(mask): value.cpu().numpy() for mask, value in values}
    exporter.save(with_values(_masked_graph(model, analysis), closed), path, inputs=inputs, outputs=outputs)


def _require_names(what: str, names: Sequence[str], number: int, others: Sequence[str] = ()) -> None:
    """Raise UsageError where names are given, and not one for each of the graph's tensors."""
    if names and (isinstance(names, str) or len(names) != number or len({*names, *others}) < number + len(others)):
        raise UsageError(f"{what}={names!r}", f"give a list of {number} names, none of them twice")


def export_checked(model: nn.Module, analysis: Analysis, path: Path, **names: Sequence[str]) -> None:
    """The same, and nothing is written where ONNX Runtime finds that the graph does not do what the model does."""
    require_float32(model)
    with TemporaryDirectory(prefix="polar_deploy-") as folder:
        made = Path(folder, "gated.onnx")
        export(model, analysis, made, **names)
        require_same(model, analysis, made)
        detached.copy(made, path)


def write_open(model: nn.Module, analysis: Analysis, path: Path) -> None:
    """Write a model without gates as if it had them, all open: for measuring what each one costs."""
    exporter.save(_masked_graph(model, analysis), path)


def _masked_graph(model: nn.Module, analysis: Analysis) -> DetachedModel:
    """The graph of a model, with a Mul for each mask, all open, that tells its gates."""
    choices = analysis.choices
    masked = insert(exporter.with_weights(analysis.structure, model), choices.masks)
    index = {mask.name: number for number, mask in enumerate(choices.masks)}
    for node in masked.model.graph.node:
        for name in [entry.value for entry in node.metadata_props if entry.key == MASK]:
            del node.metadata_props[:]
            for key, value in _notes(choices, index[name]).items():
                node.metadata_props.add(key=key, value=value)
    return masked


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
            masking.write(model, analysis, torch.from_numpy(opened).float())
        yield
    finally:
        masking.detach(model, analysis.places, handles)
