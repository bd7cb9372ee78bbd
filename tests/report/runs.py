"""A run's files as its stages write them, with made-up figures: what reports are built from in these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from polar_deploy import report
from polar_deploy.config import Settings, Training
from polar_deploy.documents.report import Report
from polar_deploy.workspace import write_json

SETTINGS = Settings(model="resnet20", data="digits", seed=3, training=Training(epochs=10))


def interval(median: float, low: float, high: float) -> dict[str, float]:
    return {"median": median, "low": low, "high": high}


def latency(median: float, p99: float) -> dict[str, Any]:
    tail = {"p99": {"value_ms": p99, "low_ms": 0.9 * p99, "high_ms": None if p99 > 60 else 1.1 * p99}}
    ends = {"low_ms": 0.99 * median, "high_ms": 1.01 * median}
    return {"median_ms": median, **ends, "iqr_ms": 0.01, "tail": tail}


def timed(control: float, speedup: dict[str, float], full: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    row = {"pairs": 204, "inferences": 1, "singles": 204, "speedup": speedup, "control": interval(control, 0.99, 1.05)}
    quantiles = {
        name: [0.9 * each["median_ms"], each["median_ms"], each["tail"]["p99"]["value_ms"]]
        for name, each in zip(("full", "compressed"), (full, small), strict=True)
    }
    return {**row, "full": full, "compressed": small, "before": None, "after": None, "quantiles_ms": quantiles}


GATES = {
    "schema": 1,
    "model": "resnet20",
    "inputs": {"input": [3, 8, 8]},
    "align": 8,
    "device": None,
    "budget": {"macs": 0.5},
    "achieved": {"macs": 0.496},
    "sites": [
        {"name": "a", "kind": "block", "width": 1, "open": [], "share": [0.0]},
        {"name": "b", "kind": "block", "width": 1, "open": [0], "share": [1.0]},
        {"name": "c", "kind": "block", "width": 1, "open": [0], "share": [1.0]},
        {"name": "d", "kind": "channel", "width": 4, "open": [], "share": [0.0] * 4},
    ],
    "ungated": {"head": "its channels are outputs"},
}


def entry(name: str, macs: int, params: int, size: int) -> dict[str, Any]:
    files = {f"{name}.onnx": {"bytes": size, "sha256": "0" * 64}}
    types = {"io_dtype": "fp32", "types": {}, "high_precision_layers": [], "calibration": None}
    precision = {"asked": "fp32", "found": {"fp32": 21}, **types}
    versions = {"onnxruntime": "1.32.0"}
    made = {"backend": "ort", "provider": "CPUExecutionProvider", "threads": 1, "tf32": False, "plan": "none: a graph"}
    costs = {"macs": macs, "params": params, "seconds": 1.5}
    return {**made, "versions": versions, "precision": precision, "files": files, **costs}


BUILD = {
    "schema": 2,
    "target": "ort-fp32",
    "engines": {
        "full": entry("full", 40_800_000, 272_474, 1_100_000),
        "compressed": entry("compressed", 20_250_000, 98_765, 412_345),
    },
}
PARITY = {
    "schema": 1,
    "machine": {"cpu": "Some CPU", "cores": 2, "architecture": "x86_64", "system": "Linux"},
    "not_run": None,
    "metric": {"name": "accuracy", "unit": "%"},
    "outputs": {"relative_difference": 0.4, "scale": 12.0, "outputs": {"logits": 0.4}},
    "classes": [
        {"class": 0, "samples": 180, "full": 99.0, "compressed": 99.5, "drop": -0.5},
        {"class": 1, "samples": 180, "full": 99.9, "compressed": 98.3, "drop": 1.6},
    ],
    "worst_classes": [1],
    "worst_samples": [{"index": 7, "label": 1, "answer": 0, "confidence": 91.5}],
    "class_names": ["cat", "dog"],
    "files": {"engines/full.onnx": "0" * 64},
    "precision": None,
    "graphs": None,
    "accuracy": {
        "samples": 360,
        "full": 99.4444,
        "compressed": 98.8889,
        "drop": 0.5555,
        "interval": [-0.31, 1.41],
        "agreement": 98.6,
        "lost": 3,
        "gained": 1,
        "nonfinite": {"full": 0, "compressed": 0},
    },
    "export": None,
    "surgery": None,
    "latency": [
        {
            "batch": 1,
            "decided": True,
            "different": True,
            "chosen": 1,
            "images_per_second": {"full": 810.4, "compressed": 1158.7},
            "energy_mj": {"full": None, "compressed": None},
            "rounds": [
                timed(1.05, interval(9.0, 8.0, 10.0), latency(7.0, 8.0), latency(6.0, 7.0)),
                timed(1.01, interval(1.43, 1.38, 1.46), latency(1.234, 1.876), latency(0.863, 1.211)),
            ],
        },
        {
            "batch": 64,
            "decided": False,
            "different": False,
            "chosen": 0,
            "images_per_second": {"full": 1226.1, "compressed": 1963.2},
            "energy_mj": {"full": 640.0, "compressed": 320.0},
            "rounds": [timed(1.034, interval(1.6, 1.5, 1.7), latency(52.2, 65.1), latency(32.6, 40.9))],
        },
    ],
    "verdict": {
        "max_drop": 1.0,
        "accuracy_rule": "interval",
        "min_speedup": 1.02,
        "max_latency_ms": None,
        "latency_percentile": "p50",
        "batch": 1,
        "accuracy": {"result": "pass", "reason": "accuracy drops by 0.56 points, 1 are allowed"},
        "latency": {"result": "pass", "reason": "the speed-up at batch 1 is 1.430"},
        "overall": {"result": "pass", "reason": "both"},
    },
}


def layer(name: str, width: tuple[int, int], macs: tuple[int, int]) -> dict[str, Any]:
    pair = {"in": [3, 3], "out": list(width), "macs": list(macs), "params": [macs[0] // 100, macs[1] // 100]}
    return {"name": name, "operator": "Conv", **pair, "alignment": {"in": 1, "out": 1}, "padding": None}


SURGERY = {
    "schema": 2,
    "verified": True,
    **dict.fromkeys(("unverified", "as_it_is", "padding")),
    "difference": 1e-7,
    "tolerance": 1e-5,
    "runtime": "onnxruntime",
    "inputs": {"input": [1, 3, 8, 8]},
    "macs": [40_800_000, 20_250_000],
    "params": [408_000, 202_500],
    "operators": {"Conv": [3, 2]},
    "gates": [],
    "layers": [
        layer("node_1", (16, 16), (20_000_000, 20_000_000)),
        layer("node_2", (32, 0), (15_000_000, 0)),
        layer("node_3", (32, 8), (5_800_000, 250_000)),
    ],
    "blocks_removed": [{"add": "node_add", "layers": ["node_2"]}],
    "cuts_not_made": [{"layer": "node_3", "channels": 2, "node": "n", "operator": "Softmax", "reason": "reads all"}],
    "unsupported": [{"node": "w", "operator": "Odd", "reason": "unknown"}],
}
LOG = [
    {
        "epoch": 1,
        "loss": 0.5,
        "train_score": 90.0,
        "samples": 100,
        "work": 4.0,
        "seconds": 5.0,
        "joules": 60.0,
        "cost": 0.8,
    }
    | {
        "costs": {"macs": 0.8},
        "val_score": 88.0,
        "undecided": 0.25,
        "shares": [1, 0, 0, 2, 4],
        "open": [1, 1, 1, 3],
    },
    {
        "epoch": 2,
        "loss": 0.4,
        "train_score": 92.0,
        "samples": 100,
        "work": 2.5,
        "seconds": 2.0,
        "joules": 20.0,
        "cost": 0.496,
    }
    | {"costs": {"macs": 0.496}, "val_score": 89.5, "open": [0, 1, 1, 0]}
    | {"freeze": {"epoch": 2, "undecided": 0.0, "share": [0.0], "val_before": 89.0, "val_after": 70.0}},
]
NAMES = ("stem.conv", "body.1.conv", "body.2.conv")


def built(folder: Path, settings: Settings = SETTINGS) -> dict[str, Any]:
    """report.json of a run."""
    return report.build(folder, settings).as_json()


def typed(document: dict[str, Any]) -> Report:
    """report.json as its readers have it."""
    return Report.model_validate_json(json.dumps(document))


def write_run(folder: Path) -> Path:
    """Write all files of a run that passed; its networks were given."""
    write_json(folder / "gated/gates.json", GATES)
    write_json(folder / "compressed/surgery.json", SURGERY)
    write_json(folder / "engines/build.json", BUILD)
    write_json(folder / "parity.json", PARITY)
    write_graph(folder / "gated/model.onnx")
    np.savez(folder / "worst-samples.npz", images=np.full((1, 4, 4, 3), 200, np.uint8))
    return folder


def write_log(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    """Write the log of a training stage."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "training.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))


def write_graph(path: Path, names: tuple[str, ...] = NAMES) -> None:
    """A graph of convolutions node_1, node_2, … that read the weights of these modules."""
    weights = [helper.make_tensor(f"{name}.weight", TensorProto.FLOAT, [1] * 4, [1.0]) for name in dict.fromkeys(names)]
    nodes = []
    for number, name in enumerate(names, 1):
        nodes.append(helper.make_node("Conv", [f"t{number - 1}", f"{name}.weight"], [f"t{number}"], f"node_{number}"))
    ends = [helper.make_tensor_value_info(f"t{n}", TensorProto.FLOAT, [1, 1, 4, 4]) for n in (0, len(names))]
    graph = helper.make_graph(nodes, "gated", ends[:1], ends[1:], weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph), path)
