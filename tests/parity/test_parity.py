from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polar_deploy import parity
from polar_deploy.config import AcceptanceCriteria, Normalize
from polar_deploy.data import Split
from polar_deploy.engines import Array
from polar_deploy.tasks.accuracy import Accuracy
from polar_deploy.tasks.classification import Pictures
from polar_deploy.tensors import Arrays, count
from tests.support.classifiers import TimedEngine, steady
from tests.support.schemas import valid

VERDICT = AcceptanceCriteria(max_drop=1.0, min_speedup=1.02, batch=1)
RNG = np.random.default_rng(7)
FILES = {"files": {"full/model.onnx": "0" * 64}, "class_names": ["a"]}  # which the stage adds


class TableEngine(TimedEngine):
    """Gives row i of `logits` for the image whose first pixel is i."""

    def __init__(self, logits: Array, milliseconds: float = 2.0, twin: float | None = None) -> None:
        super().__init__(steady(milliseconds), steady(twin or milliseconds))
        self.logits = logits

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        return {"logits": self.logits[np.rint(inputs["input"][:, 0, 0, 0] * 255).astype(int)]}


def numbered(labels: np.ndarray) -> Pictures:
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return Pictures(Split(images, labels), Normalize(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """PyTorch's outputs for three images, all zero."""
    path = tmp_path / "reference.npz"
    zeros = np.zeros((3, 3), np.float32)
    np.savez(path, **{"inputs/input": np.zeros((3, 3, 8, 8), np.float32), "full/logits": zeros, "gated/logits": zeros})
    return path


def graphs(full: Array, compressed: Array, gated: Array, reference: Path) -> parity.Graphs:
    return parity.Graphs(*map(TableEngine, (full, compressed, gated)), reference)


def answering(classes: np.ndarray) -> Array:
    """Logits of 3 classes whose largest is the given one."""
    return np.eye(3, dtype=np.float32)[classes] + RNG.uniform(0, 0.5, (len(classes), 3)).astype(np.float32)


# --------------------------------------------------------------------------- losses told apart


def test_a_loss_of_pruning_is_told_from_one_of_precision(reference: Path) -> None:
    """The full graph is right on all, its engine loses 1 of 100; the compressed graph loses 10, its engine 5 more."""
    labels = np.arange(100) % 3
    wrong = (labels + 1) % 3
    answers = {n: np.where(np.arange(100) < n, wrong, labels) for n in (0, 1, 10, 15)}
    full, engine = TableEngine(answering(answers[1])), TableEngine(answering(answers[15]))
    same = graphs(answering(answers[0]), answering(answers[10]), answering(answers[10]), reference)
    result = parity.compare(
        full, engine, numbered(labels), Accuracy(), AcceptanceCriteria(max_drop=4.0), graphs=same
    ).as_json()
    valid("parity", result | FILES)
    assert result["accuracy"]["drop"] == pytest.approx(14)
    assert result["graphs"]["drop"] == pytest.approx(10)
    assert result["precision"]["full"]["drop"] == pytest.approx(1)
    assert result["precision"]["compressed"]["drop"] == pytest.approx(5)
    assert result["precision"]["compressed"]["agreement"] == pytest.approx(95)
    assert [each["class"] for each in result["classes"]] == [0, 1, 2]
    assert sum(each["samples"] * each["drop"] for each in result["classes"]) == pytest.approx(1400)


def test_engines_that_cannot_run_are_judged_by_nothing(reference: Path) -> None:
    labels = np.arange(60) % 3
    good = answering(labels)
    found = parity.not_run(
        "no NVIDIA driver", numbered(labels), Accuracy(), VERDICT, graphs(good, good, good, reference)
    )
    result = found.as_json()
    valid("parity", result | FILES)
    assert result["not_run"] == "built, not run here: no NVIDIA driver"
    assert result["accuracy"] is result["precision"] is result["classes"] is None
    assert result["latency"] == []
    assert result["graphs"]["compressed"] == 100
    assert found.verdict.exit_code == 5


def test_graphs_see_a_sample_of_a_large_test_set(monkeypatch: pytest.MonkeyPatch, reference: Path) -> None:
    monkeypatch.setattr(parity, "GRAPH_SAMPLES", 20)
    labels = np.arange(200) % 3
    good = answering(labels)
    engine, same = TableEngine(good), graphs(good, good, good, reference)
    result = parity.compare(engine, TableEngine(good), numbered(labels), Accuracy(), VERDICT, graphs=same).as_json()
    assert result["accuracy"]["samples"] == 200
    assert result["graphs"]["samples"] == result["precision"]["full"]["samples"] == 20
    assert result["precision"]["full"]["relative_difference"] == 0  # rows are those of the engine's


class NarrowEngine(TableEngine):
    """Takes batches of 4 to 16 alone."""

    batches = (4, 16)

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        assert 4 <= count(inputs) <= 16
        return super().infer(inputs)


def test_engines_get_the_batches_that_they_take() -> None:
    labels = np.arange(130) % 3  # 130 = 8 * 16 + 2
    narrow = NarrowEngine(answering(labels))
    verdict = AcceptanceCriteria(batch=8)
    result = parity.compare(
        narrow, NarrowEngine(narrow.logits), numbered(labels), Accuracy(), verdict, batches=(4, 16)
    ).as_json()
    assert result["accuracy"]["samples"] == 130
    assert result["accuracy"]["full"] == 100
    assert [each["batch"] for each in result["latency"]] == [4, 8, 16]
    first = result["latency"][0]
    assert first["images_per_second"]["full"] == pytest.approx(4 * 1000 / 2.0)
