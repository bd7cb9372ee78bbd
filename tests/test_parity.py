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
from polar_deploy.engines.timing import Interval, Latency, Round, Timing
from polar_deploy.errors import ContentError, UsageError
from tests.engines.networks import TimedEngine, classifier, saved, steady

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
VERDICT = Verdict(max_drop=1.0, min_speedup=1.02, batch=1)
RNG = np.random.default_rng(7)


class TableEngine(TimedEngine):
    """Gives row i of `logits` for the image whose first pixel is i."""

    def __init__(self, logits: Array, milliseconds: float = 2.0, twin: float | None = None) -> None:
        super().__init__(steady(milliseconds), steady(twin or milliseconds))
        self.logits = logits

    def infer(self, images: Array) -> Array:
        return self.logits[np.rint(images[:, 0, 0, 0] * 255).astype(int)]


def numbered(labels: np.ndarray) -> Split:
    images = np.zeros((len(labels), 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(labels))
    return Split(images, labels)


def answering(classes: np.ndarray) -> Array:
    """Logits of 3 classes whose largest is the given one."""
    return np.eye(3, dtype=np.float32)[classes] + RNG.uniform(0, 0.5, (len(classes), 3)).astype(np.float32)


def validate(document: dict) -> None:
    path = Path(polar_deploy.__file__).parent / "schemas/parity.schema.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(content)
    Draft202012Validator(content).validate(json.loads(json.dumps(document, allow_nan=False)))


# --------------------------------------------------------------------------- accuracy


def test_counts_are_those_of_a_plain_loop() -> None:
    labels, first, second = (RNG.integers(0, 3, 200) for _ in range(3))
    result = parity.compare(
        TableEngine(answering(first)), TableEngine(answering(second)), numbered(labels), verdict=VERDICT, **PLAIN
    )
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


@pytest.mark.parametrize(("lost", "gained", "samples"), [(60, 30, 1000), (150, 150, 10_000), (25, 60, 500)])
def test_drop_interval_agrees_with_a_bootstrap(lost: int, gained: int, samples: int) -> None:
    shares = np.array([lost, gained, samples - lost - gained]) / samples
    draws = np.random.default_rng(0).multinomial(samples, shares, size=20_000)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / samples, [2.5, 97.5])
    width = high - low
    assert parity.drop_interval(lost, gained, samples) == pytest.approx((low, high), abs=0.06 * width)


@pytest.mark.parametrize("shares", [(0.01, 0.01), (0.03, 0.01), (0.002, 0.0), (0.2, 0.1)])
def test_drop_interval_covers_the_truth(shares: tuple[float, float]) -> None:
    samples = 300
    draws = np.random.default_rng(1).multinomial(samples, [*shares, 1 - sum(shares)], size=4000)
    truth = 100 * (shares[0] - shares[1])
    intervals = [parity.drop_interval(int(lost), int(gained), samples) for lost, gained, _ in draws]
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.94


def test_drop_interval_is_open_to_doubt_without_any_discordant_pair() -> None:
    low, high = parity.drop_interval(0, 0, 100)
    assert -3 < low < 0 < high < 3
    assert low == -high


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("broken", ["full", "compressed"])
def test_nan_and_inf_fail_whatever_the_rest_says(bad: float, broken: str) -> None:
    labels = np.arange(50) % 3
    logits = {"full": answering(labels), "compressed": answering(labels)}
    logits[broken][[3, 7], labels[[3, 7]]] = bad
    full, compressed = TableEngine(logits["full"], 2.0), TableEngine(logits["compressed"], 1.0)
    gated = TableEngine(logits["full"])
    result = parity.compare(full, compressed, numbered(labels), verdict=VERDICT, gated=gated, **PLAIN)
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
        parity.compare(engine, engine, numbered(np.zeros(0, np.int64)), verdict=VERDICT, **PLAIN)


def test_networks_of_different_classes_are_refused() -> None:
    labels = np.arange(30) % 3
    three, four = TableEngine(answering(labels)), TableEngine(np.zeros((30, 4), np.float32))
    with pytest.raises(ContentError, match=r"the full network .* \(30, 3\), the compressed one of \(30, 4\)"):
        parity.compare(three, four, numbered(labels), verdict=VERDICT, **PLAIN)
    with pytest.raises(ContentError, match="the gated network"):
        parity.compare(three, three, numbered(labels), verdict=VERDICT, gated=four, **PLAIN)


# --------------------------------------------------------------------------- verdict


def measured(median: float, low: float, high: float, control: float = 1.0, batch: int = 1) -> Timing:
    latency = Latency(1.0, 1.1, 0.1)
    interval = Interval(control, control, control)
    return Timing(batch, (Round(204, 1, latency, latency, Interval(median, low, high), interval),), 0)


def tally(drop: int, samples: int = 100) -> parity.Tally:
    """`drop` more samples lost than gained."""
    return parity.Tally(samples=samples, full_right=90, compressed_right=90 - drop, lost=drop + 2, gained=2)


GOOD, BAD = tally(1), tally(2)
FASTER, SLOWER = measured(1.3, 1.25, 1.35), measured(0.9, 0.85, 0.95)
CLOSE, NOISY = measured(1.03, 1.01, 1.05), measured(1.3, 1.25, 1.35, control=1.021)


@pytest.mark.parametrize(
    ("counts", "timing", "answers", "code"),
    [
        (GOOD, FASTER, ("pass", "pass", "pass"), 0),
        (GOOD, SLOWER, ("pass", "fail", "fail"), 1),
        (GOOD, CLOSE, ("pass", "undecided", "undecided"), 5),
        (GOOD, NOISY, ("pass", "undecided", "undecided"), 5),
        (BAD, FASTER, ("fail", "pass", "fail"), 1),
        (BAD, SLOWER, ("fail", "fail", "fail"), 1),
        (BAD, CLOSE, ("fail", "undecided", "fail"), 1),
        (BAD, NOISY, ("fail", "undecided", "fail"), 1),
    ],
)
def test_truth_table(counts: parity.Tally, timing: Timing, answers: tuple[str, str, str], code: int) -> None:
    verdict = parity.judge(counts, [measured(9, 9, 9, batch=64), timing], VERDICT)
    assert tuple(verdict[part]["result"] for part in ("accuracy", "latency", "overall")) == answers
    assert parity.exit_code({"verdict": verdict}) == code
    deciding = [verdict[part]["reason"] for part in ("accuracy", "latency") if verdict[part]["result"] == answers[2]]
    assert verdict["overall"]["reason"] == "; ".join(deciding)


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(1.02, 1.1, "pass"), (1.0199, 1.1, "undecided"), (1.0, 1.02, "undecided"), (1.0, 1.0199, "fail")],
)
def test_latency_limits(low: float, high: float, answer: str) -> None:
    assert parity.judge_latency(measured(1.02, low, high), VERDICT).result == answer


@pytest.mark.parametrize(("control", "answer"), [(1.0199, "pass"), (0.9801, "pass"), (1.021, "undecided")])
def test_control_limits(control: float, answer: str) -> None:
    judgement = parity.judge_latency(measured(1.3, 1.2, 1.4, control), VERDICT)
    assert judgement.result == answer
    if answer == "undecided":
        assert "differ by 2.1 %, over 2 %" in judgement.reason


def test_a_better_network_passes_where_no_drop_is_allowed() -> None:
    strict = Verdict(max_drop=0.0)
    assert parity.judge_accuracy(tally(0), strict).result == "pass"
    better = parity.judge_accuracy(tally(-3), strict)
    assert better == parity.Judgement("pass", "accuracy rises by 3.00 points, a drop of 0 is allowed")
    assert parity.judge_accuracy(tally(1, samples=10_000), strict).result == "fail"


def test_latency_is_judged_at_the_verdict_batch() -> None:
    labels = np.arange(30) % 3
    full, compressed = TableEngine(answering(labels), 2.0), TableEngine(answering(labels), 1.0)
    verdict = Verdict(batch=16)
    result = parity.compare(full, compressed, numbered(labels), verdict=verdict, batches=(1,), **PLAIN)
    assert [measured["batch"] for measured in result["latency"]] == [1, 16]
    assert "at batch 16 is 2.000" in result["verdict"]["latency"]["reason"]
    assert parity.exit_code(result) == 0


def test_broken_control_leaves_it_undecided_with_all_rounds_on_record() -> None:
    labels = np.arange(30) % 3
    full, compressed = TableEngine(answering(labels), 2.0, twin=2.2), TableEngine(answering(labels), 1.0)
    result = parity.compare(full, compressed, numbered(labels), verdict=VERDICT, **PLAIN)
    validate(result)
    assert len(result["latency"][0]["rounds"]) == 3
    assert parity.exit_code(result) == 5


# --------------------------------------------------------------------------- differences


def test_gap_is_measured_by_the_largest_logit() -> None:
    gap = parity.Gap()
    gap.add(np.array([[1.0, -4.0]], np.float32), np.array([[1.5, -4.0]], np.float32))
    gap.add(np.array([[2.0, np.nan], [0.0, 1.0]], np.float32), np.array([[9.0, 9.0], [0.0, 1.25]], np.float32))
    assert gap.relative == 0.5 / 4.0
    assert parity.Gap().relative == 0.0
    assert parity.Gap(difference=1.0, scale=0.0).relative is None


def test_export_and_surgery_lines(tmp_path: Path) -> None:
    labels = np.arange(40) % 3
    full, gated = TableEngine(answering(labels)), TableEngine(answering(labels))
    compressed = TableEngine(gated.logits.copy())
    compressed.logits[33, 2] += 0.5
    inputs = numbered(labels).images[:8].transpose(0, 3, 1, 2).astype(np.float32) / 255
    torch_full, torch_gated = full.logits[:8].copy(), gated.logits[:8].copy()
    torch_gated[5, 0] += 0.25
    reference = tmp_path / "reference.npz"
    np.savez(reference, inputs=inputs, full=torch_full, gated=torch_gated)

    result = parity.compare(
        full, compressed, numbered(labels), verdict=VERDICT, gated=gated, reference=reference, **PLAIN
    )
    validate(result)
    assert result["surgery"]["scale"] == pytest.approx(np.abs(gated.logits).max())
    assert result["surgery"]["relative_difference"] == pytest.approx(0.5 / np.abs(gated.logits).max(), rel=1e-5)
    assert result["export"]["samples"] == 8
    assert result["export"]["full"] == 0
    assert result["export"]["gated"] == pytest.approx(0.25 / np.abs(torch_gated).max(), rel=1e-5)


def test_reference_that_is_none(tmp_path: Path) -> None:
    engine = TableEngine(np.zeros((8, 3), np.float32))
    inputs = np.zeros((8, 3, 8, 8), np.float32)
    path = tmp_path / "reference.npz"
    with pytest.raises(UsageError, match=r"reference\.npz"):
        parity.export_loss(engine, engine, path)
    path.write_bytes(b"PK but not a zip")
    with pytest.raises(ContentError, match=r"reference\.npz"):
        parity.export_loss(engine, engine, path)
    np.savez(path, inputs=inputs, full=np.zeros((8, 3)))
    with pytest.raises(ContentError, match="gated"):
        parity.export_loss(engine, engine, path)
    np.savez(path, inputs=inputs, full=np.zeros((8, 4)), gated=np.zeros((8, 3)))
    with pytest.raises(ContentError, match=r"'full' gives outputs of shape \(8, 4\), the network of \(8, 3\)"):
        parity.export_loss(engine, engine, path)


def test_real_engines(tmp_path: Path) -> None:
    """A network against itself: same answers, and never called faster."""
    small = OrtEngine(saved(classifier(4), tmp_path / "small.onnx"))
    test = Split(RNG.integers(0, 256, (300, 8, 8, 3)).astype(np.uint8), RNG.integers(0, 4, 300))
    norm = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.3, 0.4)}
    result = parity.compare(small, small.duplicate(), test, verdict=VERDICT, gated=small, batches=(), **norm)
    validate(result)
    images = (test.images / 255 - np.array(norm["mean"])) / np.array(norm["std"])
    answers = small.infer(images.transpose(0, 3, 1, 2).astype(np.float32)).argmax(axis=1)
    assert result["accuracy"]["full"] == pytest.approx(100 * np.mean(answers == test.labels))
    assert result["accuracy"]["agreement"] == 100
    assert result["surgery"]["relative_difference"] == 0
    assert result["verdict"]["accuracy"]["result"] == "pass"
    assert result["verdict"]["latency"]["result"] in {"fail", "undecided"}  # no faster than itself
