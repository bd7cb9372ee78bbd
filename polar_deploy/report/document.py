"""report.json: the figures of a run in one place, each taken from the file of the stage that measured it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import latency
from polar_deploy.config import PLACES
from polar_deploy.errors import ContentError
from polar_deploy.workspace import digest, read_json, sha256

if TYPE_CHECKING:
    from polar_deploy.config import Settings


class _File:
    """A stage's JSON file; a missing key is an error that names file and key."""

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

    Reads `gated/gates.json`, `compressed/surgery.json`, `engines/build.json` and `parity.json`; where latency has a
    budget, `latency-table.json` too, where there is a bundle, its manifest, and where networks were trained here, the
    logs of that.

    Raises:
        UsageError: one of the files is missing.
        ContentError: one is not JSON, or lacks a key.
    """
    gates, engines = _File(folder / "gated/gates.json"), _File(folder / "engines/build.json")
    surgery, parity = _File(folder / "compressed/surgery.json"), _File(folder / "parity.json")
    entries = {name: engines.get("engines", name) for name in ("full", "compressed")}
    return {
        "schema": 1,
        "settings": _digest(settings),
        "model": settings.model,
        "data": settings.data,
        "target": engines.get("target"),
        "seed": settings.seed,
        "full": "given" if settings.full_weights else "trained",
        "export": parity.get("export"),
        "surgery": parity.get("surgery"),
        "budget": {"asked": gates.get("budget"), "achieved": gates.get("achieved")},
        "verified": surgery.get("verified"),
        "not_run": parity.get("not_run"),
        "accuracy": parity.get("accuracy"),
        "worst_classes": _worst(parity),
        "graphs": parity.get("graphs"),
        "precision": {name: _precision(entries[name], parity.get("precision"), name) for name in entries},
        "macs": _pair({name: engines.get("engines", name, "macs") for name in entries}),
        "params": _pair({name: engines.get("engines", name, "params") for name in entries}),
        "bytes": _pair({name: engines.get("engines", name, "files", f"{name}.onnx", "bytes") for name in entries}),
        "layers": {name: _layers(entry) for name, entry in entries.items()},
        "latency": [_latency(measured) for measured in parity.get("latency")],
        "predicted": _predicted(folder / "latency-table.json", gates) if "latency" in gates.get("budget") else None,
        "blocks": _blocks(gates.get("sites")),
        "training": _training(folder, engines.get("engines", "full", "macs")),
        "verdict": parity.get("verdict"),
        "bundle": _bundle(folder / "bundle/manifest.json"),
        "versions": engines.get("engines", "compressed", "versions"),
        "machine": parity.get("machine"),
    }


def _digest(settings: Settings) -> str:
    """SHA-256 of all settings that decide the result."""
    values = settings.model_dump(mode="json", exclude=PLACES)
    return digest(values)


def _pair(values: dict[str, int]) -> dict[str, Any]:
    return {**values, "ratio": values["compressed"] / values["full"]}


def _latency(measured: dict[str, Any]) -> dict[str, Any]:
    """The round that counts, of one batch size."""
    return {
        "batch": measured["batch"],
        "decided": measured["decided"],
        "images_per_second": measured["images_per_second"],
        "energy_mj": measured["energy_mj"],
        **measured["rounds"][measured["chosen"]],
    }


def _layers(entry: dict[str, Any]) -> dict[str, Any]:
    """How many layers an engine runs, and what of that computes nothing (None: the backend does not tell)."""
    overheads = {key: entry.get(key) for key in ("reformats", "padded_channels")}
    return {"layers": sum(entry["precision"]["found"].values()), **overheads}


def _predicted(path: Path, gates: _File) -> dict[str, Any]:
    """What the latency table says of the gates that stayed open, to be held against what was measured."""
    table = latency.read(path)
    compressed_ms = table.predicted_ms({site["name"]: len(site["open"]) for site in gates.get("sites")})
    return {"batch": table.batch, "full_ms": table.full_ms, "compressed_ms": compressed_ms}


def _precision(entry: dict[str, Any], loss: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """The types of one engine, which layers stayed wider, and what the precision cost (None: nobody looked)."""
    return {**entry["precision"], "loss": loss and loss[name]}


def _training(folder: Path, macs: int) -> dict[str, Any]:
    """What training took for each network, teacher and search included; None for one that was not trained here.

    macs: of one forward pass of the full network.
    """
    return {name: _trained(folder / name / "training.jsonl", macs) for name in ("full", "gated")}


def _trained(log: Path, macs: int) -> dict[str, Any] | None:
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    epochs = [record for record in records if "work" in record]
    if not epochs:
        return None
    return {
        "epochs": len(epochs),
        "seconds": round(sum(record["seconds"] for record in epochs), 1),
        "macs": round(sum(record["images"] * record["work"] for record in epochs) * macs),
    }


def _worst(parity: _File) -> list[dict[str, Any]] | None:
    """The classes that lose most, worst first."""
    worst = parity.get("worst_classes")
    if worst is None:
        return None
    classes = {each["class"]: each for each in parity.get("classes")}
    return [classes[label] for label in worst]


def _bundle(manifest: Path) -> dict[str, Any] | None:
    """How large the bundle is, and what tells it from another one; None: there is none."""
    if not manifest.is_file():
        return None
    size = sum(path.stat().st_size for path in manifest.parent.rglob("*") if path.is_file())
    return {"manifest_sha256": sha256(manifest), "bytes": size}


def _blocks(sites: list[dict[str, Any]]) -> dict[str, int]:
    """How many of the blocks that have a gate are closed, and so removed."""
    blocks = [site for site in sites if site["kind"] == "block"]
    return {"removed": sum(not site["open"] for site in blocks), "total": len(blocks)}
