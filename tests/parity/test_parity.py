from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import polar_deploy
from polar_deploy import parity
from polar_deploy.config import Verdict
from polar_deploy.data import Split
from polar_deploy.engines import Array
from polar_deploy.engines.ort import OrtEngine
from polar_deploy.errors import ContentError, UsageError
from tests.engines.networks import TimedEngine, classifier, saved, steady

VERDICT = Verdict(max_drop=1.0, min_speedup=1.02, batch=1)
RNG = np.random.default_rng(7)


class TableEngine(TimedEngine):
    """Gives row i of `logits` for the image whose first pixel is i."""

    def __init__(self, logits: Array, milliseconds: float = 2.0, twin: float | None = None) -> None:
        super().__init__(steady(milliseconds), steady(twin or milliseconds))
        self.logits = logits

    def infer(self, images: Array) -> Array:
        return self.logits[np.rint(images[:, 0, 0, 0] * 255).astype(int)]


def numbered(labels: np.ndarray) -> parity.TestSet:
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return parity.TestSet(Split(images, labels), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """PyTorch's outputs for three images, all zero."""
    path = tmp_path / "reference.npz"
    np.savez(path, inputs=np.zeros((3, 3, 8, 8), np.float32), full=np.zeros((3, 3)), gated=np.zeros((3, 3)))
    return path


def graphs(full: Array, compressed: Array, gated: Array, reference: Path) -> parity.Graphs:
    return parity.Graphs(*map(TableEngine, (full, compressed, gated)), reference)


def answering(classes: np.ndarray) -> Array:
    """Logits of 3 classes whose largest is the given one."""
    return np.eye(3, dtype=np.float32)[classes] + RNG.uniform(0, 0.5, (len(classes), 3)).astype(np.float32)


def validate(document: dict) -> None:
    path = Path(polar_deploy.__file__).parent / "schemas/parity.schema.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(content)
    Draft202012Validator(content).validate(json.loads(json.dumps(document, allow_nan=False)))


def test_counts_are_those_of_a_plain_loop() -> None:
    labels, first, second = (RNG.integers(0, 3, 200) for _ in range(3))
    result = parity.compare(TableEngine(answering(first)), TableEngine(answering(second)), numbered(labels), VERDICT)
    validate(result)
    rows = list(zip(labels, first, second, strict=True))
    accuracy = result["accuracy"]
    assert accuracy["samples"] == 200
    assert accuracy["full"] == pytest.approx(sum(a == y for y, a, _ in rows) / 2)
    assert accuracy["compressed"] == pytest.approx(sum(b == y for y, _, b in rows) / 2)
    assert accuracy["drop"] == pytest.approx(accuracy["full"] - accuracy["compressed"])
    assert accuracy["agreement"] == pytest.approx(sum(a == b for _, a, b in rows) / 2)
    assert accuracy["lost"] == sum(a == y != b for y, a, b in rows)
    assert accuracy["gained"] == sum(b == y != a for y, a, b in rows)
    assert result["export"] is None
    assert result["surgery"] is None
    assert [measured["batch"] for measured in result["latency"]] == [1, 64]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("broken", ["full", "compressed"])
def test_nan_and_inf_fail_whatever_the_rest_says(bad: float, broken: str, reference: Path) -> None:
    labels = np.arange(50) % 3
    logits = {"full": answering(labels), "compressed": answering(labels)}
    logits[broken][[3, 7], labels[[3, 7]]] = bad
    full, compressed = TableEngine(logits["full"], 2.0), TableEngine(logits["compressed"], 1.0)
    same = graphs(logits["full"], logits["compressed"], logits["compressed"], reference)
    result = parity.compare(full, compressed, numbered(labels), VERDICT, graphs=same)
    validate(result)
    assert result["accuracy"]["nonfinite"] == {"full": 0, "compressed": 0, broken: 2}
    assert result["accuracy"][broken] == 96.0  # they count as wrong, also where argmax would happen to be right
    assert result["accuracy"]["agreement"] == 96.0
    assert result["verdict"]["latency"]["result"] == "pass"
    assert result["verdict"]["overall"]["result"] == "fail"
    assert f"the {broken} engine gives NaN or Inf on 2 of 50" in result["verdict"]["overall"]["reason"]
    assert parity.exit_code(result) == 1


def test_empty_test_set_is_refused() -> None:
    engine = TableEngine(np.zeros((0, 3), np.float32))
    with pytest.raises(ContentError, match="test set is empty"):
        parity.compare(engine, engine, numbered(np.zeros(0, np.int64)), VERDICT)


def test_networks_of_different_classes_are_refused(reference: Path) -> None:
    labels = np.arange(30) % 3
    three, four = answering(labels), np.zeros((30, 4), np.float32)
    with pytest.raises(ContentError, match=r"the full network .* \(30, 3\), the compressed one of \(30, 4\)"):
        parity.compare(TableEngine(three), TableEngine(four), numbered(labels), VERDICT)
    odd = graphs(three, three, four, reference)
    with pytest.raises(ContentError, match="the gated onnx network"):
        parity.compare(TableEngine(three), TableEngine(three), numbered(labels), VERDICT, graphs=odd)


def test_latency_is_judged_at_the_verdict_batch() -> None:
    labels = np.arange(30) % 3
    full, compressed = TableEngine(answering(labels), 2.0), TableEngine(answering(labels), 1.0)
    verdict = Verdict(batch=16)
    result = parity.compare(full, compressed, numbered(labels), verdict, batches=(1,))
    assert [measured["batch"] for measured in result["latency"]] == [1, 16]
    assert "at batch 16 is 2.000" in result["verdict"]["latency"]["reason"]
    assert parity.exit_code(result) == 0


def test_broken_control_leaves_it_undecided_with_all_rounds_on_record() -> None:
    labels = np.arange(30) % 3
    full, compressed = TableEngine(answering(labels), 2.0, twin=2.2), TableEngine(answering(labels), 1.0)
    result = parity.compare(full, compressed, numbered(labels), VERDICT)
    validate(result)
    assert len(result["latency"][0]["rounds"]) == 3
    assert parity.exit_code(result) == 5


def test_export_and_surgery_lines(tmp_path: Path) -> None:
    labels = np.arange(40) % 3
    full, gated = TableEngine(answering(labels)), TableEngine(answering(labels))
    compressed = TableEngine(gated.logits.copy())
    compressed.logits[33, 2] += 0.5
    inputs = numbered(labels).images(np.arange(8))
    torch_full, torch_gated = full.logits[:8].copy(), gated.logits[:8].copy()
    torch_gated[5, 0] += 0.25
    reference = tmp_path / "reference.npz"
    np.savez(reference, inputs=inputs, full=torch_full, gated=torch_gated)

    same = parity.Graphs(full, compressed, gated, reference)
    result = parity.compare(full, compressed, numbered(labels), VERDICT, graphs=same)
    validate(result)
    assert result["surgery"]["scale"] == pytest.approx(np.abs(gated.logits).max())
    assert result["surgery"]["relative_difference"] == pytest.approx(0.5 / np.abs(gated.logits).max(), rel=1e-5)
    assert result["export"]["samples"] == 8
    assert result["export"]["full"] == 0
    assert result["export"]["gated"] == pytest.approx(0.25 / np.abs(torch_gated).max(), rel=1e-5)


def test_reference_that_is_none(tmp_path: Path) -> None:
    engine = TableEngine(np.zeros((8, 3), np.float32))
    lost = parity.Graphs(engine, engine, engine, tmp_path / "reference.npz")
    inputs = np.zeros((8, 3, 8, 8), np.float32)
    path = lost.reference
    with pytest.raises(UsageError, match=r"reference\.npz"):
        parity.export_loss(lost)
    path.write_bytes(b"PK but not a zip")
    with pytest.raises(ContentError, match=r"reference\.npz"):
        parity.export_loss(lost)
    np.savez(path, inputs=inputs, full=np.zeros((8, 3)))
    with pytest.raises(ContentError, match="gated"):
        parity.export_loss(lost)
    np.savez(path, inputs=inputs, full=np.zeros((8, 4)), gated=np.zeros((8, 3)))
    with pytest.raises(ContentError, match=r"'full' gives outputs of shape \(8, 4\), the network of \(8, 3\)"):
        parity.export_loss(lost)


def test_real_engines(tmp_path: Path) -> None:
    """A network against itself: same answers, and never called faster."""
    small = OrtEngine(saved(classifier(4), tmp_path / "small.onnx"))
    split = Split(RNG.integers(0, 256, (300, 8, 8, 3)).astype(np.uint8), RNG.integers(0, 4, 300))
    test = parity.TestSet(split, (0.5, 0.5, 0.5), (0.2, 0.3, 0.4))
    reference = tmp_path / "reference.npz"
    inputs = test.images(np.arange(8))
    np.savez(reference, inputs=inputs, full=small.infer(inputs), gated=small.infer(inputs))
    itself = parity.Graphs(small, small, small, reference)
    result = parity.compare(small, small.duplicate(), test, VERDICT, graphs=itself, batches=())
    validate(result)
    images = (split.images / 255 - np.array(test.mean)) / np.array(test.std)
    answers = small.infer(images.transpose(0, 3, 1, 2).astype(np.float32)).argmax(axis=1)
    assert result["accuracy"]["full"] == pytest.approx(100 * np.mean(answers == split.labels))
    assert result["accuracy"]["agreement"] == 100
    assert result["surgery"]["relative_difference"] == 0
    assert result["verdict"]["accuracy"]["result"] == "pass"
    assert result["verdict"]["latency"]["result"] in {"fail", "undecided"}  # no faster than itself


# --------------------------------------------------------------------------- losses told apart


def test_a_loss_of_pruning_is_told_from_one_of_precision(reference: Path) -> None:
    """The full graph is right on all, its engine loses 1 of 100; the compressed graph loses 10, its engine 5 more."""
    labels = np.arange(100) % 3
    wrong = (labels + 1) % 3
    answers = {n: np.where(np.arange(100) < n, wrong, labels) for n in (0, 1, 10, 15)}
    full, engine = TableEngine(answering(answers[1])), TableEngine(answering(answers[15]))
    same = graphs(answering(answers[0]), answering(answers[10]), answering(answers[10]), reference)
    result = parity.compare(full, engine, numbered(labels), Verdict(max_drop=4.0), graphs=same)
    validate(result)
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
    result = parity.not_run("no NVIDIA driver", numbered(labels), VERDICT, graphs(good, good, good, reference))
    validate(result)
    assert result["not_run"] == "built, not run here: no NVIDIA driver"
    assert result["accuracy"] is result["precision"] is result["classes"] is None
    assert result["latency"] == []
    assert result["graphs"]["compressed"] == 100
    assert parity.exit_code(result) == 5


def test_graphs_see_a_sample_of_a_large_test_set(monkeypatch: pytest.MonkeyPatch, reference: Path) -> None:
    monkeypatch.setattr(parity, "GRAPH_IMAGES", 20)
    labels = np.arange(200) % 3
    good = answering(labels)
    engine, same = TableEngine(good), graphs(good, good, good, reference)
    result = parity.compare(engine, TableEngine(good), numbered(labels), VERDICT, graphs=same)
    assert result["accuracy"]["samples"] == 200
    assert result["graphs"]["samples"] == result["precision"]["full"]["samples"] == 20
    assert result["precision"]["full"]["relative_difference"] == 0  # rows are those of the engine's


class NarrowEngine(TableEngine):
    """Takes batches of 4 to 16 alone."""

    batches = (4, 16)

    def infer(self, images: Array) -> Array:
        assert 4 <= len(images) <= 16
        return super().infer(images)


def test_engines_get_the_batches_that_they_take() -> None:
    labels = np.arange(130) % 3  # 130 = 8 * 16 + 2
    narrow = NarrowEngine(answering(labels))
    verdict = Verdict(batch=8)
    result = parity.compare(narrow, NarrowEngine(narrow.logits), numbered(labels), verdict, batches=(4, 16))
    assert result["accuracy"]["samples"] == 130
    assert result["accuracy"]["full"] == 100
    assert [each["batch"] for each in result["latency"]] == [4, 8, 16]
    first = result["latency"][0]
    assert first["images_per_second"]["full"] == pytest.approx(4 * 1000 / 2.0)
