"""--budget latency=: the whole command under a table that is given, made here, or cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from polar_deploy import gpu, latency
from polar_deploy.documents.latency_table import MeasuredTable
from polar_deploy.engines import machine, table
from polar_deploy.workspace import read_json, write_json
from tests.conftest import MINIATURE, Miniature, polar

TINY = (*MINIATURE, "--epochs", "1", "--until", "gates")


def _document(target: str = "ort-fp32") -> dict[str, Any]:
    """A table of the tiny network: 10 ms; a layer takes 1 ms, of which half a width saves half, and its block 2 ms."""
    sites = []
    for name, width in (("stem.0", 12), ("block2.conv2", 24)):
        widths = [width // 4, width // 2, width]
        entry = {"name": name, "kind": "stream", "width": width, "widths": widths, "ms": [9.25, 9.5, 10.0]}
        sites.append(entry | {"within": []})
    for number in (1, 2, 3):
        block = f"block{number}.bn2:out"
        inner = {"name": f"block{number}.conv1", "kind": "channel", "width": 16, "widths": [4, 8, 16]}
        whole = {"name": block, "kind": "block", "width": 1, "widths": [0, 1], "ms": [8.0, 10.0], "within": []}
        sites += [inner | {"ms": [9.25, 9.5, 10.0], "within": [block]}, whole]
    shortcut = {"name": "block2.shortcut:out", "kind": "block", "width": 1, "widths": [0, 1], "ms": [9.9, 10.0]}
    sites.append(shortcut | {"within": []})
    return {"schema": 1, "target": target, "batch": 1, "full_ms": 10.0, "sites": sites, "overlaps": []}


def _measured(**changes: Any) -> MeasuredTable:
    """The same as this program measures it."""
    about = {"machine": machine.describe().as_json(), "device": None, "throttled": [], "versions": {}, "engines": 9}
    noise = {"median": 0.0, "worst": 0.01}
    return MeasuredTable.model_validate(_document() | about | {"noise": noise, "seconds": 1.0} | changes)


def _given(folder: Path, document: object) -> tuple[str, str]:
    write_json(folder / "table.json", document)
    return "--latency-table", str(folder / "table.json")


def test_a_given_table_steers_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = (*TINY, "--budget", "latency=0.8,macs=0.9", *_given(tmp_path, _document()), "--out", str(run))
    first = polar(*command)
    assert first.code == 0, first.err
    gates = read_json(run / "gated" / "gates.json")
    opened = {site["name"]: len(site["open"]) for site in gates["sites"]}
    predicted = latency.read(run / "latency-table.json", "ort-fp32").predicted_ms(opened)
    assert gates["achieved"]["latency"] == pytest.approx(predicted / 10)
    assert gates["achieved"]["latency"] <= 0.8
    assert gates["achieved"]["macs"] <= 0.9
    assert polar(*command).up_to_date == ["full", "gates"]
    write_json(tmp_path / "table.json", _document() | {"full_ms": 10.1})  # measured again: the gates are learned again
    assert polar(*command).ran == ["gates"]


def test_surgery_counts_what_it_can_and_leaves_latency_out(tmp_path: Path, miniature: Miniature) -> None:
    run = miniature.copy(tmp_path / "run", "surgery")
    command = (*MINIATURE, "--from", "surgery", "--until", "surgery", "--out", str(run), *_given(tmp_path, _document()))
    assert polar(*command, "--budget", "latency=0.1,macs=0.9").code == 0
    assert polar(*command, "--budget", "latency=0.1,macs=0.1").code == 4


@pytest.fixture
def as_asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Sub-networks that would be measured: here they all keep to the budget."""
    asked: list[dict[str, int]] = []

    def saved(bench: object, opened: Mapping[str, int]) -> float:
        asked.append(dict(opened))
        return 0.2

    monkeypatch.setattr(table.Bench, "saved", saved)
    return asked


def test_what_was_chosen_is_measured_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_asked: list[dict[str, int]]
) -> None:
    monkeypatch.setattr(table, "measure", lambda *_, **__: _measured())
    outcome = polar(*TINY, "--budget", "latency=0.8", "--out", str(tmp_path / "run"))
    assert "what was chosen takes 0.80 of the latency, 0.80 is asked" in outcome.err
    gates = read_json(tmp_path / "run" / "gated" / "gates.json")
    chosen = {site["name"]: len(site["open"]) for site in gates["sites"]}
    assert as_asked == [chosen]


@pytest.mark.usefixtures("as_asked")
def test_a_table_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(gated: Path, target: Any, *, batch: int, **how: Any) -> MeasuredTable:
        asked.append((gated.is_file(), target.name, batch))
        return _measured(seconds=float(len(asked)))  # never the same again

    monkeypatch.setattr(table, "measure", measure)
    run = tmp_path / "run"
    command = (*TINY, "--budget", "latency=0.8", "--out", str(run))
    assert polar(*command).code == 0
    assert asked == [(True, "ort-fp32", 1)]
    made = read_json(run / "latency-table.json")
    assert {name: value for name, value in made.items() if name != "key"} == _measured(seconds=1.0).as_json()
    assert polar(*command).up_to_date == ["full", "gates"]
    (run / "stamps" / "gates.json").unlink()  # as if it had been killed
    assert "gates" in polar(*command).ran
    assert len(asked) == 1
    (run / "latency-table.json").write_text("damaged")
    assert "gates" in polar(*command).ran
    assert len(asked) == 2
    assert "gates" in polar(*command, "--set", "build.tf32=true").ran  # engines of another kind
    assert len(asked) == 3


@pytest.mark.usefixtures("as_asked")
def test_a_table_that_whole_networks_do_not_bear_out_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    likely, times = [], iter([9.9, 8.1])

    def measure(gated: Path, target: Any, **how: Any) -> MeasuredTable:
        path = tmp_path / "measured.json"
        write_json(path, _document())
        likely.append(how["likely"](latency.read(path)))
        return _measured(checks=[{"predicted_ms": 8.0, "ms": next(times)}])

    monkeypatch.setattr(table, "measure", measure)
    run = tmp_path / "run"
    outcome = polar(*TINY, "--budget", "latency=0.8", "--out", str(run))
    assert outcome.code == 0
    assert "24 % off" in outcome.err
    assert read_json(run / "latency-table.json")["checks"] == [{"predicted_ms": 8.0, "ms": 8.1}]
    plain = latency.parsed(_document())
    for state in likely[0]:
        assert plain.predicted_ms(state) <= 8.0
    assert likely[0] == likely[1]
    assert read_json(run / "gated" / "gates.json")["achieved"]["latency"] <= 0.8  # by the scaled table


@pytest.mark.usefixtures("as_asked")
@pytest.mark.parametrize(
    ("measured", "code", "said"),
    [
        (["disturbed", "fine"], 0, "the sites save 45 ms, but the full network takes 20 ms: a busy machine?"),
        (["off", "disturbed"], 0, "45 ms"),  # one that is off is better than none
        (["disturbed", "disturbed"], 3, "measure the latency table while nothing else runs on the machine"),
    ],
)
def test_measurements_that_contradict_each_other_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str], code: int, said: str
) -> None:
    results = iter(measured)

    def measure(gated: Path, target: Any, **how: Any) -> MeasuredTable:
        result = next(results)
        if result == "disturbed":
            raise latency.DisturbedError(
                "the sites save 45 ms, but the full network takes 20 ms",
                "measure the latency table while nothing else runs on the machine",
            )
        return _measured(checks=[{"predicted_ms": 8.0, "ms": 6.7 if result == "off" else 8.0}])

    monkeypatch.setattr(table, "measure", measure)
    outcome = polar(*TINY, "--budget", "latency=0.9", "--out", str(tmp_path / "run"))
    assert outcome.code == code, outcome.err
    assert said in outcome.err
    assert next(results, None) is None


def test_a_budget_out_of_reach_of_the_table_made_here_ends_the_run_before_the_gates_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "measure", lambda *_, **__: _measured())
    outcome = polar(*TINY, "--budget", "latency=0.2", "--out", str(tmp_path / "run"))
    assert outcome.code == 2
    assert "budget latency=0.2 cannot be reached" in outcome.err
    assert "gates 1/" not in outcome.err


def test_a_default_budget_out_of_reach_gives_way_to_half_of_the_macs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked for it."""
    measured = []
    saves_little = [site | {"ms": [9.5 + ms / 20 for ms in site["ms"]]} for site in _document()["sites"]]

    def measure(*_: object, **__: object) -> MeasuredTable:
        measured.append(_measured(sites=saves_little))
        return measured[-1]

    monkeypatch.setattr(table, "measure", measure)
    where = TINY.index("--budget")
    command = (*TINY[:where], *TINY[where + 2 :], "--out", str(tmp_path / "run"))
    for until, stages in (("gates", ["full", "gates"]), ("export", ["export"])):
        outcome = polar(*command, "--until", until)
        assert outcome.code == 0, outcome.err
        assert outcome.ran == stages
        assert ("the default budget latency=0.6 cannot be reached" in outcome.err) == (until == "gates")
    assert read_json(tmp_path / "run/gated/gates.json")["budget"] == {"macs": 0.5}
    assert yaml.safe_load((tmp_path / "run/run.yaml").read_text(encoding="utf-8"))["budget"]["latency"] is None
    assert len(measured) == 1
    asked = polar(*command, "--budget", "latency=0.6", "--until", "gates")
    assert asked.code == 2
    assert "budget latency=0.6 cannot be reached" in asked.err


@pytest.mark.parametrize(
    ("document", "budget", "code", "message"),
    [
        (_document(), "latency=0.2", 2, "budget latency=0.2 cannot be reached"),
        (_document("trt-fp16"), "latency=0.8", 4, "was measured on trt-fp16, the target is ort-fp32"),
        (
            _document() | {"sites": _document()["sites"][1:]},
            "latency=0.8",
            4,
            "'stem.0' is stream of width 12 here, nothing",
        ),
        (_document() | {"batch": 64}, "latency=0.8", 4, "was measured at batch 64, the verdict is at batch 1"),
        ({}, "latency=0.8", 4, "is no latency table"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_anything_is_trained(
    tmp_path: Path, document: dict[str, Any], budget: str, code: int, message: str
) -> None:
    options = ("--budget", budget, *_given(tmp_path, document), "--out", str(tmp_path / "run"))
    for dry in ((), ("--dry-run",)):
        outcome = polar(*TINY, *options, *dry)
        assert outcome.code == code
        assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_without_a_table_the_target_has_to_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise gpu.NoGpuError("no NVIDIA driver (libcuda.so.1 is not found)")

    monkeypatch.setattr(gpu, "first", missing)
    options = ("--budget", "latency=0.8", "--target", "trt-fp16", "--out", str(tmp_path / "run"))
    outcome = polar(*TINY, *options)
    assert outcome.code == 2
    assert "trt-fp16 cannot be measured here: no NVIDIA driver" in outcome.err
    assert "--latency-table" in outcome.err
