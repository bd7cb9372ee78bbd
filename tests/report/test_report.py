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
from tests.report.runs import (
    BUILD,
    GATES,
    LOG,
    PARITY,
    SETTINGS,
    SURGERY,
    built,
    typed,
    write_graph,
    write_log,
    write_run,
)
from tests.support.schemas import valid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def printed(document: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    report.table(typed(document), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(text: str, label: str) -> list[str]:
    """The cells of the table's row that starts with `label`."""
    line = next(line for line in text.splitlines() if line.strip("│ ").startswith(label))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_report_takes_each_figure_from_its_stage(folder: Path) -> None:
    document = built(folder)
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
    text = printed(built(folder))
    assert "resnet20 on digits, ort-fp32, full network trained" in text
    assert row(text, "accuracy") == ["accuracy", "99.44 %", "98.89 %", "-0.56 points (-1.41 to +0.31)"]
    assert row(text, "MACs") == ["MACs", "40.8 M", "20.2 M", "49.6 % of full"]
    assert row(text, "parameters") == ["parameters", "272 k", "98.8 k", "36.2 % of full"]
    assert row(text, "file size") == ["file size", "1.1 MB", "412 kB", "37.5 % of full"]
    speedup = "1.43× as fast (1.31 to 1.53)"  # with the noise of the machine: 1.38 / 1.05, 1.46 * 1.05
    assert row(text, "latency, batch 1") == ["latency, batch 1", "1.23 ms", "0.863 ms", speedup]
    assert row(text, "p99, batch 1") == ["p99, batch 1", "1.88 ms", "1.21 ms", ""]
    assert row(text, "p99, batch 64") == ["p99, batch 64", "65.1 ms", "40.9 ms", "too few samples for an interval"]
    undecided = "undecided: noise of 3.4 %"
    assert row(text, "latency, batch 64") == ["latency, batch 64", "52.2 ms", "32.6 ms", undecided]
    assert row(text, "gated blocks") == ["gated blocks", "3", "2", "1 of 3 removed"]
    assert "verdict: PASS" in text
    assert "pass: accuracy drops by 0.56 points, 1 are allowed" in text
    assert "what-now" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("answer", ["fail", "undecided"])
def test_table_shows_other_verdicts(answer: str, folder: Path) -> None:
    document = built(folder)
    document["verdict"] = copy.deepcopy(PARITY["verdict"])
    document["verdict"]["overall"]["result"] = document["verdict"]["latency"]["result"] = answer
    document["latency"][0]["full"]["median_ms"] = 2345.6
    document["params"]["compressed"] = 999
    text = printed(document)
    assert row(text, "latency, batch 1")[1] == "2346 ms"
    assert row(text, "parameters")[2] == "999"
    assert f"verdict: {answer.upper()}" in text
    assert f"{answer}: the speed-up" in text
    said = " ".join(printed(document, 1000).split())
    step = {"fail": "Ask for latency, which is measured before training", "undecided": "Measure again"}[answer]
    assert f"what to do: {step}" in said
    assert "More in report.html, and in docs/what-now.md." in said


def test_zeros_have_no_minus_and_no_block_no_row(folder: Path) -> None:
    document = built(folder)
    document["accuracy"] |= {"drop": 0.0, "interval": [-1.875, 0.001]}
    document["blocks"] = {"removed": 0, "total": 0}
    text = printed(document)
    assert row(text, "accuracy")[3] == "+0.00 points (+0.00 to +1.88)"
    assert "gated blocks" not in text


def test_what_training_took_is_told(folder: Path) -> None:
    """Two epochs of 100 images; the second one trained half of the network, with a teacher all along."""
    assert built(folder)["training"] == {"full": None, "gated": None}
    logs = {
        "full": [{"epoch": 1, "samples": 100, "work": 3.0, "seconds": 4.0, "joules": 50.0}] * 2,
        "gated": LOG,
    }
    for name, records in logs.items():
        write_log(folder, name, records)
    document = built(folder)
    valid("report", document)
    assert document["training"] == {
        "full": {"epochs": 2, "seconds": 8.0, "macs": 600 * 40_800_000, "joules": 100.0},
        "gated": {"epochs": 2, "seconds": 7.0, "macs": 650 * 40_800_000, "joules": 80.0},
    }
    assert row(printed(document, 100), "training") == ["training", "8 s", "7 s", "0.88× time, 1.08× MACs, 0.80× energy"]
    (folder / "full/training.jsonl").write_text('{"epoch": 0, "given": true, "val_score": 90.0}\n')
    assert row(printed(built(folder)), "training") == ["training", "given", "7 s", ""]


def test_settings_digest_depends_on_what_decides_the_result_alone(folder: Path) -> None:
    def digest(settings: Settings) -> str:
        value = built(folder, settings)["settings"]
        assert isinstance(value, str)
        return value

    values = SETTINGS.model_dump(mode="json")
    del values["data_dir"], values["full_weights"], values["latency_table"]
    assert digest(SETTINGS) == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert digest(SETTINGS.model_copy(update={"data_dir": Path("elsewhere")})) == digest(SETTINGS)
    assert digest(SETTINGS.model_copy(update={"budget": Budget(macs=0.6)})) != digest(SETTINGS)


def test_given_weights_are_named(folder: Path) -> None:
    given = SETTINGS.model_copy(update={"full_weights": Path("weights.npz")})
    assert built(folder, given)["full"] == "given"


def test_missing_file_and_missing_key_are_named(folder: Path) -> None:
    write_json(folder / "engines/build.json", {"schema": 2, "target": "ort-fp32", "engines": {"full": {}}})
    with pytest.raises(ContentError, match=r"build\.json: engines\.full\.provider: Field required"):
        built(folder)
    write_json(folder / "engines/build.json", {**BUILD, "engines": {"full": BUILD["engines"]["full"]}})
    with pytest.raises(ContentError, match=r"build\.json does not list the engine 'compressed'"):
        built(folder)
    (folder / "parity.json").write_text("half a {")
    with pytest.raises(ContentError, match=r"parity\.json is not JSON"):
        built(folder)
    (folder / "gated/gates.json").unlink()
    with pytest.raises(UsageError, match=r"gates\.json"):
        built(folder)


def test_throughput_and_energy_are_those_of_the_largest_batch(folder: Path) -> None:
    text = printed(built(folder))
    assert row(text, "images a second") == ["images a second", "1,226", "1,963", "at batch 64"]
    assert row(text, "energy an image") == ["energy an image", "10 mJ", "5 mJ", "50.0 % of full"]
    assert row(text, "layers") == ["layers", "21", "21", ""]
    assert "reformats" not in text  # ONNX Runtime does not tell


def test_layers_that_compute_nothing_are_shown(folder: Path) -> None:
    build = copy.deepcopy(BUILD)
    for entry, reformats, padded in zip(build["engines"].values(), (4, 2), (7, 0), strict=True):
        entry |= {"reformats": reformats, "padded_channels": padded}
    write_json(folder / "engines/build.json", build)
    text = printed(built(folder))
    assert row(text, "reformats") == ["reformats", "4", "2", "change a format only"]
    assert row(text, "padded channels") == ["padded channels", "7", "0", "fill up formats"]


def test_what_the_precision_cost_is_a_line_of_its_own(folder: Path) -> None:
    document = built(folder)
    loss = {
        "samples": 360,
        "interval": [0.0, 1.0],
        "agreement": 98.5,
        "relative_difference": 0.03,
        "scale": 9.0,
        "outputs": {"logits": 0.03},
        "nonfinite": 0,
    }
    for name, drop in (("full", 0.28), ("compressed", -0.56)):
        document["precision"][name] |= {"asked": "int8", "loss": {**loss, "drop": drop}}
    document["precision"]["compressed"]["high_precision_layers"] = [
        {"layer": "stem", "operator": "Conv", "error": 0.2, "type": "fp32", "why": "it is off"}
    ]
    text = printed(document)
    assert row(text, "int8 vs fp32") == ["int8 vs fp32", "-0.28", "+0.56", "points; 98.50 % agree"]
    assert row(text, "layers kept wider") == ["layers kept wider", "0", "1", "see build.json"]


def test_engines_that_did_not_run_have_the_accuracy_of_their_graphs(folder: Path) -> None:
    graphs = {**PARITY["accuracy"], "full": 97.5}
    lost = dict.fromkeys(("accuracy", "classes", "worst_classes", "worst_samples"))
    not_run = "built, not run here: no NVIDIA driver"
    write_json(folder / "parity.json", {**PARITY, **lost, "not_run": not_run, "graphs": graphs, "latency": []})
    document = built(folder)
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
    write_json(folder / "gated/gates.json", {**GATES, "budget": {"latency": 0.6}, "achieved": {"latency": 0.6}})
    document = built(folder)
    predicted = document["predicted"]
    assert [predicted[key] for key in ("batch", "full_ms", "compressed_ms")] == [1, 10.0, 6.0]
    assert [(each["name"], each["ms"]) for each in predicted["saved"]] == [("a", 3), ("b", 0), ("c", 0), ("d", 1)]
    # 1.43 times as fast means 6.99 of 10 ms; 6.00 were promised
    assert row(printed(document), "by table, batch 1") == [
        "by table, batch 1",
        "10 ms",
        "6 ms",
        "1.67× as fast, off by -14.2 %",
    ]
    assert row(printed(document), "budget, latency") == ["budget, latency", "1", "0.600", "0.6 asked, 0.699 measured"]


def test_the_network_is_told_layer_by_layer_in_the_names_of_its_modules(folder: Path) -> None:
    """node_2 lay in a removed block, node_3 was narrowed; 20.4 of 40.8 M MACs went, 15 of them with node_2."""
    write_log(folder, "gated", LOG)
    document = built(folder)
    valid("report", document)
    layers = document["network"]["layers"]
    assert [(each["name"], each["out"], each["removed_block"]) for each in layers] == [
        ("stem.conv", [16, 16], None),
        ("body.1.conv", [32, 0], 0),
        ("body.2.conv", [32, 8], None),
    ]
    assert document["network"]["not_cut"][0]["layer"] == "body.2.conv"
    assert document["savings"]["macs"] == {"left": 20_250_000, "removed": 15_000_000, "narrowed": 5_550_000}
    assert [(site["name"], site["open"], site["changes"]) for site in document["sites"]] == [
        ("a", 0, [[2, 0]]),
        ("b", 1, []),
        ("c", 1, []),
        ("d", 0, [[1, 3], [2, 0]]),
    ]
    assert document["freeze"] == {
        "epoch": 2,
        "undecided": 0.0,
        "val_before": 89.0,
        "val_after": 70.0,
        "val_estimated": None,
    }
    assert [each["val_score"] for each in document["history"]["gated"]] == [88.0, 89.5]


def test_each_of_two_removed_blocks_in_a_row_has_its_own_layers(folder: Path) -> None:
    """Surgery lists, for the second one, all that went before its Add: the layers of the first one are among them."""
    blocks = [{"add": "add_1", "layers": ["node_2"]}, {"add": "add_2", "layers": ["node_2", "node_3"]}]
    write_json(folder / "compressed/surgery.json", {**SURGERY, "blocks_removed": blocks})
    layers = built(folder)["network"]["layers"]
    assert [layer["removed_block"] for layer in layers] == [None, 0, 1]


def test_layers_that_share_a_weight_keep_the_names_of_their_nodes(folder: Path) -> None:
    write_graph(folder / "gated/model.onnx", ("stem.conv", "stem.conv", "body.2.conv"))
    names = [layer["name"] for layer in built(folder)["network"]["layers"]]
    assert names == ["node_1", "node_2", "body.2.conv"]


def test_classes_and_samples_have_names(folder: Path) -> None:
    document = built(folder)
    assert [(each["name"], each["drop"]) for each in document["classes"]] == [("cat", -0.5), ("dog", 1.6)]
    assert [(each["label_name"], each["answer_name"]) for each in document["worst_samples"]] == [("dog", "cat")]
