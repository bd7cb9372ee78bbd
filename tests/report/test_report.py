from __future__ import annotations

import copy
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polar_deploy import report
from polar_deploy.config import Budget, Settings
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.workspace import write_json
from tests.schemas import valid

SETTINGS = Settings(model="resnet20", data="digits", seed=3)


def interval(median: float, low: float, high: float) -> dict[str, float]:
    return {"median": median, "low": low, "high": high}


def latency(median: float, p99: float) -> dict[str, float]:
    return {"median_ms": median, "low_ms": 0.99 * median, "high_ms": 1.01 * median, "p99_ms": p99, "iqr_ms": 0.01}


def timed(control: float, speedup: dict[str, float], full: dict[str, float], small: dict[str, float]) -> dict[str, Any]:
    row = {"pairs": 204, "inferences": 1, "speedup": speedup, "control": interval(control, 0.99, 1.05)}
    return {**row, "full": full, "compressed": small, "before": None, "after": None}


GATES = {
    "schema": 1,
    "budget": {"macs": 0.5},
    "achieved": {"macs": 0.496},
    "sites": [
        {"name": "a", "kind": "block", "width": 1, "open": [], "share": [0.0]},
        {"name": "b", "kind": "block", "width": 1, "open": [0], "share": [1.0]},
        {"name": "c", "kind": "block", "width": 1, "open": [0], "share": [1.0]},
        {"name": "d", "kind": "channel", "width": 4, "open": [], "share": [0.0] * 4},
    ],
}


def entry(name: str, macs: int, params: int, size: int) -> dict[str, Any]:
    files = {f"{name}.onnx": {"bytes": size, "sha256": "0" * 64}}
    types = {"edges": "fp32", "types": {}, "kept": [], "calibration": None}
    precision = {"asked": "fp32", "found": {"fp32": 21}, **types}
    versions = {"onnxruntime": "1.32.0"}
    return {"macs": macs, "params": params, "files": files, "versions": versions, "precision": precision}


BUILD = {
    "schema": 1,
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
    "classes": [
        {"class": 0, "samples": 180, "full": 99.0, "compressed": 99.5, "drop": -0.5},
        {"class": 1, "samples": 180, "full": 99.9, "compressed": 98.3, "drop": 1.6},
    ],
    "worst_classes": [1],
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
        "min_speedup": 1.02,
        "max_latency_ms": None,
        "batch": 1,
        "accuracy": {"result": "pass", "reason": "accuracy drops by 0.56 points, 1 are allowed"},
        "latency": {"result": "pass", "reason": "the speed-up at batch 1 is 1.430"},
        "overall": {"result": "pass", "reason": "both"},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "gated/gates.json", GATES)
    write_json(tmp_path / "compressed/surgery.json", {"schema": 1, "verified": True})
    write_json(tmp_path / "engines/build.json", BUILD)
    write_json(tmp_path / "parity.json", PARITY)
    return tmp_path


def printed(document: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    report.table(document, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(text: str, label: str) -> list[str]:
    """The cells of the table's row that starts with `label`."""
    line = next(line for line in text.splitlines() if line.strip("│ ").startswith(label))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_report_takes_each_figure_from_its_stage(folder: Path) -> None:
    document = report.build(folder, SETTINGS)
    valid("report", document)
    names = ("model", "data", "target", "seed", "full")
    assert [document[name] for name in names] == ["resnet20", "digits", "ort-fp32", 3, "trained"]
    assert document["budget"] == {"asked": {"macs": 0.5}, "achieved": {"macs": 0.496}}
    assert document["macs"] == {"full": 40_800_000, "compressed": 20_250_000, "ratio": 20_250_000 / 40_800_000}
    assert document["bytes"]["compressed"] == 412_345
    assert document["blocks"] == {"removed": 1, "total": 3}
    assert document["latency"][0]["speedup"]["median"] == 1.43  # of the round that counts
    assert document["verdict"] == PARITY["verdict"]
    assert document["machine"]["cpu"] == "Some CPU"


def test_table_shows_the_figures(folder: Path) -> None:
    text = printed(report.build(folder, SETTINGS))
    assert "resnet20 on digits, ort-fp32, full network trained" in text
    assert row(text, "accuracy") == ["accuracy", "99.44 %", "98.89 %", "-0.56 points (-1.41 to +0.31)"]
    assert row(text, "MACs") == ["MACs", "40.8 M", "20.2 M", "49.6 % of full"]
    assert row(text, "parameters") == ["parameters", "272 k", "98.8 k", "36.2 % of full"]
    assert row(text, "file size") == ["file size", "1.1 MB", "412 kB", "37.5 % of full"]
    assert row(text, "latency, batch 1") == ["latency, batch 1", "1.23 ms", "0.863 ms", "1.43× as fast (1.38 to 1.46)"]
    assert row(text, "p99, batch 1") == ["p99, batch 1", "1.88 ms", "1.21 ms", ""]
    undecided = "undecided: noise of 3.4 %"
    assert row(text, "latency, batch 64") == ["latency, batch 64", "52.2 ms", "32.6 ms", undecided]
    assert row(text, "gated blocks") == ["gated blocks", "3", "2", "1 of 3 removed"]
    assert "verdict: PASS" in text
    assert "pass: accuracy drops by 0.56 points, 1 are allowed" in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("answer", ["fail", "undecided"])
def test_table_shows_other_verdicts(answer: str, folder: Path) -> None:
    document = report.build(folder, SETTINGS)
    document["verdict"] = copy.deepcopy(PARITY["verdict"])
    document["verdict"]["overall"]["result"] = document["verdict"]["latency"]["result"] = answer
    document["latency"][0]["full"]["median_ms"] = 2345.6
    document["params"]["compressed"] = 999
    text = printed(document)
    assert row(text, "latency, batch 1")[1] == "2346 ms"
    assert row(text, "parameters")[2] == "999"
    assert f"verdict: {answer.upper()}" in text
    assert f"{answer}: the speed-up" in text


def test_what_training_took_is_told(folder: Path) -> None:
    """Two epochs of 100 images; the second one trained half of the network, with a teacher all along."""
    assert report.build(folder, SETTINGS)["training"] == {"full": None, "gated": None}
    logs = {
        "full": [{"epoch": 1, "images": 100, "work": 3.0, "seconds": 4.0}] * 2,
        "gated": [{"images": 100, "work": 4.0, "seconds": 5.0}, {"images": 100, "work": 2.5, "seconds": 2.0}],
    }
    for name, records in logs.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "training.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in records))
    document = report.build(folder, SETTINGS)
    valid("report", document)
    assert document["training"] == {
        "full": {"epochs": 2, "seconds": 8.0, "macs": 600 * 40_800_000},
        "gated": {"epochs": 2, "seconds": 7.0, "macs": 650 * 40_800_000},
    }
    assert row(printed(document), "training") == ["training", "8 s", "7 s", "0.88× the time, 1.08× MACs"]
    (folder / "full/training.jsonl").write_text('{"epoch": 0, "given": true, "val_accuracy": 90.0}\n')
    assert row(printed(report.build(folder, SETTINGS)), "training") == ["training", "given", "7 s", ""]


def test_settings_digest_depends_on_what_decides_the_result_alone(folder: Path) -> None:
    def digest(settings: Settings) -> str:
        value = report.build(folder, settings)["settings"]
        assert isinstance(value, str)
        return value

    values = SETTINGS.model_dump(mode="json")
    del values["data_dir"], values["full_weights"], values["latency_table"]
    assert digest(SETTINGS) == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert digest(SETTINGS.model_copy(update={"data_dir": Path("elsewhere")})) == digest(SETTINGS)
    assert digest(SETTINGS.model_copy(update={"budget": Budget(macs=0.6)})) != digest(SETTINGS)


def test_given_weights_are_named(folder: Path) -> None:
    given = SETTINGS.model_copy(update={"full_weights": Path("weights.npz")})
    assert report.build(folder, given)["full"] == "given"


def test_missing_file_and_missing_key_are_named(folder: Path) -> None:
    write_json(folder / "engines/build.json", {"schema": 1, "target": "ort-fp32", "engines": {"full": {}}})
    with pytest.raises(ContentError, match=r"build\.json has no 'engines\.compressed'"):
        report.build(folder, SETTINGS)
    (folder / "parity.json").write_text("half a {")
    with pytest.raises(ContentError, match=r"parity\.json is not JSON"):
        report.build(folder, SETTINGS)
    (folder / "gated/gates.json").unlink()
    with pytest.raises(UsageError, match=r"gates\.json"):
        report.build(folder, SETTINGS)


def test_throughput_and_energy_are_those_of_the_largest_batch(folder: Path) -> None:
    text = printed(report.build(folder, SETTINGS))
    assert row(text, "images a second") == ["images a second", "1,226", "1,963", "at batch 64"]
    assert row(text, "energy an image") == ["energy an image", "10 mJ", "5 mJ", "50.0 % of full"]
    assert row(text, "layers") == ["layers", "21", "21", ""]
    assert "reformats" not in text  # ONNX Runtime does not tell


def test_layers_that_compute_nothing_are_shown(folder: Path) -> None:
    build = copy.deepcopy(BUILD)
    for entry, reformats, padded in zip(build["engines"].values(), (4, 2), (7, 0), strict=True):
        entry |= {"reformats": reformats, "padded_channels": padded}
    write_json(folder / "engines/build.json", build)
    text = printed(report.build(folder, SETTINGS))
    assert row(text, "reformats") == ["reformats", "4", "2", "change a format only"]
    assert row(text, "padded channels") == ["padded channels", "7", "0", "fill up formats"]


def test_what_the_precision_cost_is_a_line_of_its_own(folder: Path) -> None:
    document = report.build(folder, SETTINGS)
    loss = {
        "samples": 360,
        "interval": [0.0, 1.0],
        "agreement": 98.5,
        "relative_difference": 0.03,
        "scale": 9.0,
        "nonfinite": 0,
    }
    for name, drop in (("full", 0.28), ("compressed", -0.56)):
        document["precision"][name] |= {"asked": "int8", "loss": {**loss, "drop": drop}}
    document["precision"]["compressed"]["kept"] = [{"layer": "stem", "operator": "Conv", "error": 0.2, "type": "fp32"}]
    text = printed(document)
    assert row(text, "int8 for fp32") == ["int8 for fp32", "-0.28", "+0.56", "points; 98.50 % agree"]
    assert row(text, "layers kept wider") == ["layers kept wider", "0", "1", "see build.json"]


def test_engines_that_did_not_run_have_the_accuracy_of_their_graphs(folder: Path) -> None:
    graphs = {**PARITY["accuracy"], "full": 97.5}
    lost = dict.fromkeys(("accuracy", "classes", "worst_classes"))
    not_run = "built, not run here: no NVIDIA driver"
    write_json(folder / "parity.json", {**PARITY, **lost, "not_run": not_run, "graphs": graphs, "latency": []})
    document = report.build(folder, SETTINGS)
    assert (document["accuracy"], document["not_run"], document["latency"]) == (None, not_run, [])
    text = printed(document)
    assert row(text, "accuracy, graphs")[1] == "97.50 %"
    assert "images a second" not in text


def test_predicted_latency_is_held_against_the_measured_one(folder: Path) -> None:
    """Block a, which is closed, saves 3 ms of 10; site d lies in b and saves 1 ms with all its channels closed."""
    blocks = [
        {"name": name, "kind": "block", "width": 1, "widths": [0, 1], "ms": [7, 10], "within": []} for name in "abc"
    ]
    inner = {"name": "d", "kind": "channel", "width": 4, "widths": [2, 4], "ms": [9, 10], "within": ["b"]}
    table = {"schema": 1, "target": "ort-fp32", "batch": 1, "full_ms": 10.0, "sites": [*blocks, inner], "overlaps": []}
    write_json(folder / "latency-table.json", table)
    write_json(folder / "gated/gates.json", {**GATES, "budget": {"latency": 0.6}})
    document = report.build(folder, SETTINGS)
    assert document["predicted"] == {"batch": 1, "full_ms": 10.0, "compressed_ms": 6.0}
    # 1.43 times as fast means 6.99 of 10 ms; 6.00 were promised
    assert row(printed(document), "by table, batch 1") == [
        "by table, batch 1",
        "10 ms",
        "6 ms",
        "1.67× as fast, off by -14.2 %",
    ]
