"""report.json: the figures of a run in one place, each taken from the file of the stage that measured it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import latency
from polar_deploy.data.names import without_places
from polar_deploy.documents.build import Built, BuiltEngine
from polar_deploy.documents.gates import GateSite, GateStates
from polar_deploy.documents.parity import BatchLatency, Parity
from polar_deploy.documents.surgery import SurgeryReport
from polar_deploy.engines import timing
from polar_deploy.errors import ContentError
from polar_deploy.report.network import network, saved_ms, savings, sites
from polar_deploy.workspace import digest, read_json, sha256

if TYPE_CHECKING:
    from polar_deploy.config import Settings


class JsonFile:
    """A JSON file of a run; a missing key is an error that names file and key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = read_json(path)

    def get(self, *keys: str) -> Any:
        """The value at a path of keys."""
        value = self.content
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                where = ".".join(keys)
                raise ContentError(f"{self.path} has no '{where}'", "let the stage that writes it run again")
            value = value[key]
        return value


def build(folder: Path, settings: Settings) -> dict[str, Any]:
    """The content of report.json for the run in `folder`.

    Reads `gated/gates.json` and `model.onnx`, `compressed/surgery.json`, `engines/build.json` and `parity.json`; where
    latency has a budget, `latency-table.json` too, where there is a bundle, its manifest, and where networks were
    trained here, the logs of that.

    Raises:
        UsageError: one of the files is missing.
        ContentError: one is not JSON, or lacks a key.
    """
    gates, build_json = GateStates.read(folder / "gated/gates.json"), folder / "engines/build.json"
    built = Built.read(build_json)
    surgery, parity = SurgeryReport.read(folder / "compressed/surgery.json"), Parity.read(folder / "parity.json")
    compared = parity.as_json()
    entries = {name: built.entry(name, build_json) for name in ("full", "compressed")}
    logs = {name: _log(folder / name / "training.jsonl") for name in ("full", "gated")}
    costs = {key: _pair({name: getattr(each, key) for name, each in entries.items()}) for key in ("macs", "params")}
    measured = "latency" in gates.budget and settings.latency_is_measured
    cut = network(surgery, folder / "gated/model.onnx")
    return {
        "schema": 2,
        "settings": _digest(settings),
        "recipe": without_places(settings),
        "model": settings.model,
        "task": settings.task,
        "metric": compared["metric"],
        "outputs": compared["outputs"],
        "data": without_places(settings)["data"],
        "target": built.target,
        "seed": settings.seed,
        "full": "given" if settings.full_weights else "trained",
        "export": compared["export"],
        "surgery": compared["surgery"],
        "budget": {"asked": gates.budget, "achieved": gates.achieved},
        "verified": surgery.verified,
        "not_run": compared["not_run"],
        "accuracy": compared["accuracy"],
        "classes": _classes(parity),
        "worst_classes": _worst(parity),
        "worst_samples": _worst_samples(parity),
        "graphs": compared["graphs"],
        "precision": {name: _precision(entries[name], compared["precision"], name) for name in entries},
        **costs,
        "bytes": _pair({name: _bytes(each, f"{name}.onnx") for name, each in entries.items()}),
        "layers": {name: _layers(entry) for name, entry in entries.items()},
        "latency": [_latency(measured) for measured in parity.latency],
        "predicted": _predicted(folder / "latency-table.json", gates) if measured else None,
        "blocks": _blocks(gates.sites),
        "network": {**cut, "ungated": gates.ungated},
        "savings": {key: savings(cut["layers"], pair["full"], pair["compressed"], key) for key, pair in costs.items()},
        "sites": sites(gates.sites, logs["gated"]),
        "training": {name: _trained(log, costs["macs"]["full"]) for name, log in logs.items()},
        "history": {name: _history(log) for name, log in logs.items()},
        "freeze": _freeze(logs["gated"]),
        "verdict": compared["verdict"],
        "bundle": _bundle(folder / "bundle/manifest.json"),
        "versions": entries["compressed"].versions,
        "machine": compared["machine"],
    }


def _digest(settings: Settings) -> str:
    """SHA-256 of all settings that decide the result."""
    return digest(without_places(settings))


def _pair(values: dict[str, int]) -> dict[str, Any]:
    return {**values, "ratio": values["compressed"] / values["full"]}


def _latency(measured: BatchLatency) -> dict[str, Any]:
    """The round that counts, of one batch size."""
    best = measured.best
    return {
        "batch": measured.batch,
        "decided": measured.decided,
        "images_per_second": measured.images_per_second.as_json(),
        "energy_mj": measured.energy_mj.as_json(),
        **best.as_json(),
        "speedup_with_noise": asdict(timing.with_noise(best.speedup, best.control)),  # what the verdict is about
    }


def _layers(entry: BuiltEngine) -> dict[str, Any]:
    """How many layers an engine runs, and what of that computes nothing (None: the backend does not tell)."""
    layers = sum(entry.precision.found.values())
    return {"layers": layers, "reformats": entry.reformats, "padded_channels": entry.padded_channels}


def _predicted(path: Path, gates: GateStates) -> dict[str, Any]:
    """What the latency table says of the gates that stayed open, to be held against what was measured."""
    table = latency.read(path)
    opened = {site.name: len(site.open) for site in gates.sites}
    predicted = {"full_ms": table.full_ms, "compressed_ms": table.predicted_ms(opened)}
    return {"batch": table.batch, **predicted, "saved": saved_ms(table, opened)}


def _bytes(entry: BuiltEngine, graph: str) -> int:
    """Of an ONNX file, with its weights where these lie beside it."""
    return sum(file.bytes for name, file in entry.files.items() if name in (graph, f"{graph}.data"))


def _precision(entry: BuiltEngine, loss: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """The types of one engine, which layers stayed wider, and what the precision cost (None: nobody looked)."""
    return {**entry.precision.as_json(), "loss": loss and loss[name]}


def _log(path: Path) -> list[dict[str, Any]]:
    """What a training stage wrote about each epoch; [] for a network that was not trained here."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _trained(log: list[dict[str, Any]], macs: int) -> dict[str, Any] | None:
    """What training took, teacher and search included; None for a network that was not trained here.

    macs: of one forward pass of the full network.
    """
    epochs = [record for record in log if "work" in record]
    if not epochs:
        return None
    return {
        "epochs": len(epochs),
        "seconds": round(sum(record["seconds"] for record in epochs), 1),
        "macs": round(sum(record["samples"] * record["work"] for record in epochs) * macs),
        "joules": sum(record["joules"] for record in epochs) if all("joules" in each for each in epochs) else None,
    }


def _history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curves: what changes from epoch to epoch."""
    keys = ("epoch", "loss", "train_score", "val_score", "costs", "undecided", "shares", "seconds")
    return [{key: record[key] for key in keys if key in record} for record in log]


def _freeze(log: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The epoch in which gates were fixed, and validation accuracy before, after, and with statistics anew."""
    frozen = [record["freeze"] for record in log if "freeze" in record]
    keys = ("epoch", "undecided", "val_before", "val_after", "val_estimated")
    return {key: frozen[-1].get(key) for key in keys} if frozen else None


def _classes(parity: Parity) -> list[dict[str, Any]] | None:
    """Every class by its name, in the order of the labels."""
    if parity.classes is None:
        return None
    return [{**each.as_json(), "name": _name(parity.class_names, each.label)} for each in parity.classes]


def _worst_samples(parity: Parity) -> list[dict[str, Any]]:
    """The samples that lose most; of a classifier with the names of their labels and answers."""
    return [
        each.as_json()
        | {
            f"{key}_name": _name(parity.class_names, label)
            for key, label in (("label", each.label), ("answer", each.answer))
            if label is not None
        }
        for each in parity.worst_samples or ()
    ]


def _name(names: list[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _worst(parity: Parity) -> list[dict[str, Any]] | None:
    """The classes that lose most, worst first."""
    if parity.worst_classes is None:
        return None
    classes = {each.label: each.as_json() for each in parity.classes or ()}
    return [classes[label] for label in parity.worst_classes]


def _bundle(manifest: Path) -> dict[str, Any] | None:
    """How large the bundle is, and what tells it from another one; None: there is none."""
    if not manifest.is_file():
        return None
    size = sum(path.stat().st_size for path in manifest.parent.rglob("*") if path.is_file())
    return {"manifest_sha256": sha256(manifest), "bytes": size}


def _blocks(sites: list[GateSite]) -> dict[str, int]:
    """How many of the blocks that have a gate are closed, and so removed."""
    blocks = [site for site in sites if site.kind == "block"]
    return {"removed": sum(not site.open for site in blocks), "total": len(blocks)}
