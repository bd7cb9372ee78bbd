"""Several runs side by side: which is best, what can be compared, and where pages are found."""

from __future__ import annotations

import copy
import json
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from polar_deploy import cli
from polar_deploy.report.__main__ import main
from polar_deploy.workspace import write_json
from tests.conftest import called
from tests.report.runs import GATES, built, write_run
from tests.report.test_page import Outline


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    return built(write_run(tmp_path / "source"))


def place(folder: Path, document: dict[str, Any], name: str, top1: float, ms: float, macs: int, **changed: Any) -> Path:
    """A run with these figures: its accuracy in percent, its latency at batch 1, its MACs."""
    told = copy.deepcopy(document) | changed
    told["accuracy"]["compressed"] = top1
    told["latency"][0]["compressed"] = {
        "median_ms": ms,
        "low_ms": 0.9 * ms,
        "high_ms": 1.1 * ms,
        "tail": {"p99": {"value_ms": ms, "low_ms": ms, "high_ms": ms}},
        "iqr_ms": 0.1,
    }
    told["latency"][0]["speedup"] = {"median": 1.2 / ms, "low": 1.1 / ms, "high": 1.3 / ms}
    told["macs"] |= {"compressed": macs, "ratio": macs / told["macs"]["full"]}
    write_json(folder / name / "report.json", told)
    (folder / name / "run.yaml").write_text("model: resnet20\n")
    return folder / name


@pytest.fixture
def sweep(document: dict[str, Any], tmp_path: Path) -> Path:
    """By latency b dominates c and d is best; by MACs c is better than b; the one elsewhere competes with nobody."""
    folder = tmp_path / "sweep"
    place(folder, document, "a", 99.0, 1.0, 30_000_000)
    place(folder, document, "b", 98.0, 0.5, 20_000_000)
    place(folder, document, "c", 97.9, 0.6, 10_000_000)
    place(folder, document, "d", 97.0, 0.4, 20_000_000)
    place(folder, document, "elsewhere", 90.0, 0.3, 40_000_000, target="trt-fp16")
    (folder / "notes").mkdir()
    return folder


def test_runs_of_a_sweep_are_ordered_and_the_best_are_named(sweep: Path) -> None:
    outcome = called(main, "compare", sweep, "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert [run["name"] for run in found["runs"]] == ["elsewhere", "d", "b", "c", "a"]
    best = {
        cost: {run["name"] for run in found["runs"] if run["best"][cost]}
        for cost in ("latency_ms", "macs", "energy_mj")
    }
    assert best["latency_ms"] == {"elsewhere", "d", "b", "a"}
    assert best["macs"] == {"a", "b", "c"}
    assert best["energy_mj"] == set()  # no device counted it at batch 1
    assert found["notes"] == [
        "Not all were timed on the same target, machine and batch: compare their speed-ups, not their times."
    ]


def test_the_terminal_has_a_table_of_eighty_columns(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = called(main, "compare", sweep / "b", sweep / "a").out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line.split() for line in lines if line.split()[:2] == ["1*", "b"])
    assert row[2:] == ["pass", "98.00", "%", "−0.56", "0.5", "ms", "2.40×", "49.0", "%"]


def test_a_narrow_terminal_breaks_lines_and_no_figures(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    outcome = called(main, "compare", sweep / "b", sweep / "a")
    row = next(line.split() for line in outcome.out.splitlines() if line.split()[:2] == ["1*", "b"])
    assert row[2:] == ["pass", "98.00", "%", "−0.56", "0.5", "ms", "2.40×", "49.0", "%"]
    assert "…" not in outcome.out


def test_the_page_has_both_plots_and_every_run(sweep: Path, tmp_path: Path) -> None:
    page = tmp_path / "compared.html"
    assert called(main, "compare", sweep, "--html", page).code == 0
    outline = Outline(page.read_text())
    assert outline.texts[outline.all("h1")[0]] == "5 runs compared"
    titles = [outline.texts[index] for index in outline.all("title")]
    assert {"Accuracy against latency", "Accuracy against MACs"} <= set(titles)
    assert sum(title.startswith("the full network resnet20: ") for title in titles) == 2 + 1  # two targets; one network
    told = json.loads(called(main, "compare", sweep, "--json").out)
    outline.require_figures(told)


def test_runs_of_another_metric_are_told_by_its_name(document: dict[str, Any], tmp_path: Path) -> None:
    metric = {"name": "mAP", "unit": "%"}
    place(tmp_path, document, "a", 61.0, 1.0, 30_000_000, metric=metric)
    place(tmp_path, document, "b", 60.0, 0.5, 20_000_000, metric=metric)
    page = tmp_path / "compared.html"
    outcome = called(main, "compare", tmp_path / "a", tmp_path / "b", "--html", page)
    assert "mAP" in outcome.out
    assert "mAP against latency" in page.read_text()
    assert "accura" not in outcome.out.lower().replace("as accurate and", "") + page.read_text().lower().replace(
        "accuracy/", ""
    ).replace("accurate", "")
    place(tmp_path, document, "c", 99.0, 0.4, 20_000_000)
    found = json.loads(called(main, "compare", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--json").out)
    assert "These runs are judged by different metrics: their scores cannot be compared." in found["notes"]
    assert {run["name"] for run in found["runs"] if run["best"]["latency_ms"]} == {"a", "b", "c"}


def test_runs_without_a_latency_are_compared_by_their_macs(document: dict[str, Any], tmp_path: Path) -> None:
    graphs = {**document["accuracy"], "compressed": 95.0}
    lost = {"accuracy": None, "classes": None, "latency": [], "graphs": graphs, "not_run": "no GPU"}
    write_json(tmp_path / "built/report.json", document | lost)
    noisy = copy.deepcopy(document)
    noisy["latency"][0]["decided"] = False
    write_json(tmp_path / "noisy/report.json", noisy)
    found = json.loads(called(main, "compare", tmp_path / "built", tmp_path / "noisy", "--json").out)
    assert [(run["name"], run["latency_ms"] is None, run["speedup"]) for run in found["runs"]] == [
        ("noisy", False, None),
        ("built", True, None),
    ]
    assert found["notes"] == ["built was not timed.", "noisy was timed on a machine too noisy to tell."]
    assert called(main, "compare", tmp_path / "built", "--html", tmp_path / "page.html").code == 0
    assert "Accuracy against latency" not in (tmp_path / "page.html").read_text()


def test_times_of_an_unsteady_machine_are_no_comparison(document: dict[str, Any], tmp_path: Path) -> None:
    place(tmp_path, document, "a", 61.0, 1.0, 30_000_000)
    slower = copy.deepcopy(document)
    slower["latency"][0]["full"] |= {"median_ms": 2.468, "low_ms": 2.4, "high_ms": 2.5}
    place(tmp_path, slower, "b", 60.0, 0.5, 20_000_000)
    assert json.loads(called(main, "compare", tmp_path / "a", tmp_path / "b", "--json").out)["notes"] == [
        "The full network itself took 1.23 ms in one run and 2.47 ms in another: "
        "compare their speed-ups, not their times."
    ]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    outcome = called(main, "compare", tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {tmp_path} has no report.json, and none of its folders has\n")
    write_json(tmp_path / "report.json", {"schema": 1})
    outcome = called(main, "compare", tmp_path)
    assert (outcome.code, outcome.err.splitlines()[0]) == (
        4,
        f"error: {tmp_path}/report.json: schema: Input should be 2",
    )


def test_view_prints_the_path_and_opens_a_browser_where_there_is_a_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    assert called(main, "view", tmp_path).code == 2
    page = tmp_path / "report.html"
    page.write_text("<h1>Pass</h1>")
    outcome = called(main, "view", tmp_path)
    assert (outcome.code, outcome.out, opened) == (0, f"{page.resolve()}\n", [])
    monkeypatch.setenv("DISPLAY", ":0")
    assert called(main, "view", tmp_path, "--no-browser").out == f"{page.resolve()}\n"
    assert opened == []
    called(main, "view", tmp_path)
    assert opened == [page.resolve().as_uri()]


def test_gates_are_drawn_place_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 characters for the widest place; fewer on a narrow terminal, where names stay whole."""
    sites = [
        {"name": "stem", "kind": "stream", "width": 16, "open": list(range(16)), "share": [1.0] * 16},
        {"name": "body.conv1", "kind": "channel", "width": 32, "open": list(range(8)), "share": [0.5] * 32},
        {"name": "body:out", "kind": "block", "width": 1, "open": [], "share": [0.0]},
        {"name": "tail:out", "kind": "block", "width": 1, "open": [0], "share": [1.0]},
    ]
    write_json(tmp_path / "gated/gates.json", {**GATES, "sites": sites, "achieved": {"macs": 0.4961}})
    assert called(cli.main, "gates", "show", tmp_path).out.splitlines() == [
        f"stream  stem        {'█' * 16} 16",
        f"channel body.conv1  {'█' * 8}{'░' * 24} 8 of 32",
        "block   body:out    removed",
        "block   tail:out    stays",
        "macs: 0.496 of the full network's, 0.5 asked",
    ]
    monkeypatch.setenv("COLUMNS", "44")  # 10 for names, 24 for kinds and numbers
    assert called(cli.main, "gates", "show", tmp_path).out.splitlines()[:2] == [
        f"stream  stem        {'█' * 5} 16",
        f"channel body.conv1  {'█' * 2}{'░' * 8} 8 of 32",
    ]
    assert called(cli.main, "gates", "show", tmp_path / "nowhere").code == 2
