"""The whole command for tasks of the user's own: 1-D audio, and two inputs with two outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from polar_deploy.workspace import read_json
from tests.conftest import Outcome, polar
from tests.support.kills import DECIDED, verdict
from tests.support.schemas import valid

COMMON = ("--budget", "0.6", "--max-drop", "100", "--min-speedup", "0.2", "--set", "training.threads=1")
COMMON = (*COMMON, "--set", "training.lr=0.02")


def run(tmp_path: Path, task: str, model: str, *more: str) -> tuple[Path, Outcome]:
    where = ("--task", f"tests.support.own_tasks:{task}", "--model", f"tests.support.own_tasks:{model}")
    return tmp_path / "run", polar(*where, *COMMON, *more, "--out", tmp_path / "run")


def graph_of(path: Path) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    graph = onnx.load(path).graph

    def shapes(values: Any) -> dict[str, list[int]]:
        return {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim][1:] for value in values}

    return shapes(graph.input), shapes(graph.output)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    return run(tmp_path_factory.mktemp("audio"), "tones", "listener")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    return run(tmp_path_factory.mktemp("two"), "heights", "surveyor")


def test_audio_goes_through_the_whole_chain(audio: tuple[Path, Outcome]) -> None:
    folder, outcome = audio
    assert outcome.code == DECIDED[verdict(folder)], outcome.err
    assert graph_of(folder / "compressed/model.onnx") == ({"sound": [1, 256]}, {"scores": [3]})
    parity, report = read_json(folder / "parity.json"), read_json(folder / "report.json")
    valid("parity", parity)
    valid("report", report)
    assert parity["accuracy"]["full"] > 80  # of three tones
    assert [each["name"] for each in report["classes"]] == ["low", "middle", "high"]
    assert report["macs"]["ratio"] <= 0.6
    assert "tones" in report["task"]


def test_two_inputs_and_two_outputs_go_through_the_whole_chain(two: tuple[Path, Outcome]) -> None:
    folder, outcome = two
    assert outcome.code == DECIDED[verdict(folder)], outcome.err
    inputs, outputs = graph_of(folder / "compressed/model.onnx")
    assert inputs == {"signal": [2, 12, 12], "sensor": []}
    assert outputs == {"guess": [4], "height": [1]}
    parity, report = read_json(folder / "parity.json"), read_json(folder / "report.json")
    valid("parity", parity)
    valid("report", report)
    assert parity["metric"] == {"name": "R2", "unit": ""}
    assert 0.5 < parity["accuracy"]["full"] <= 1
    low, high = parity["accuracy"]["interval"]
    assert low <= parity["accuracy"]["drop"] <= high
    assert parity["classes"] is None
    assert set(parity["outputs"]["outputs"]) == {"height", "guess"}
    assert "R2" in outcome.out
    with np.load(folder / "gated/reference.npz") as stored:
        assert set(stored) == {f"{part}/{name}" for part in ("full", "gated") for name in outputs} | {
            "inputs/signal",
            "inputs/sensor",
        }
        assert stored["inputs/sensor"].dtype == np.int64


@pytest.mark.parametrize("target", ["ort-int8"])
def test_integers_are_calibrated_around(target: str, two: tuple[Path, Outcome], tmp_path: Path) -> None:
    """The same networks in INT8: the index stays an index, layers that read floats are rounded."""
    import shutil

    folder, _ = two
    shutil.copytree(folder, tmp_path / "run")
    _, outcome = run(tmp_path, "heights", "surveyor", "--target", target, "--until", "parity")
    assert outcome.code in (0, 5), outcome.err
    built = read_json(tmp_path / "run/engines/build.json")
    assert built["engines"]["compressed"]["precision"]["found"].get("int8", 0) >= 1
    inputs, _ = graph_of(tmp_path / "run/engines/compressed.onnx")
    assert inputs == {"signal": [2, 12, 12], "sensor": []}


def test_without_a_metric_it_is_undecided(tmp_path: Path) -> None:
    folder, outcome = run(tmp_path, "unjudged", "surveyor", "--until", "parity")
    assert outcome.code == 5
    parity = read_json(folder / "parity.json")
    valid("parity", parity)
    assert parity["accuracy"] is None
    assert parity["outputs"]["relative_difference"] >= 0
    assert "no metric" in parity["verdict"]["accuracy"]["reason"]
