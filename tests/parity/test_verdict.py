from __future__ import annotations

from dataclasses import replace

import pytest

from polar_deploy import parity
from polar_deploy.config import Verdict
from polar_deploy.engines.timing import Interval, Latency, Round, Timing

VERDICT = Verdict(max_drop=1.0, min_speedup=1.02, batch=1)


def measured(median: float, low: float, high: float, control: float = 1.0, batch: int = 1) -> Timing:
    latency = Latency(1.0, 0.95, 1.05, 1.1, 0.1)
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


@pytest.mark.parametrize(
    ("bound", "answer"), [(1.05, "pass"), (1.049, "undecided"), (0.95, "undecided"), (0.949, "fail")]
)
def test_latency_itself_may_be_bounded(bound: float, answer: str) -> None:
    judgement = parity.judge_latency(FASTER, Verdict(max_latency_ms=bound))
    assert judgement.result == answer
    assert "an inference at batch 1 takes 1 ms (95 %: 0.95 to 1.05)" in judgement.reason
    assert parity.judge_latency(SLOWER, Verdict(max_latency_ms=bound)).result == "fail"


def test_precision_is_held_against_the_bound_of_its_own() -> None:
    ruined = parity.judge_accuracy(tally(0), VERDICT, precision={"compressed": tally(3)})
    assert ruined.result == "fail"
    assert "precision costs the compressed engine 3.00 points against its own FP32 graph" in ruined.reason
    weak = parity.judge_accuracy(tally(-3), VERDICT, precision={"full": tally(20), "compressed": tally(0)})
    assert weak.result == "fail"  # the full engine is ruined: no art to match it
    assert "costs the full engine 20.00 points" in weak.reason
    assert parity.judge_accuracy(GOOD, VERDICT, precision={"full": tally(1), "compressed": tally(1)}).result == "pass"
    assert (
        parity.judge_accuracy(BAD, VERDICT, precision={"compressed": tally(-5)}).result == "fail"
    )  # none makes up for the other


def test_throttling_is_said() -> None:
    hot = {"throttle": ["thermal slowdown"], "energy_mj": None}
    timing = replace(FASTER, rounds=(replace(FASTER.best, before={"throttle": []}, after=hot),))
    judgement = parity.judge_latency(timing, VERDICT)
    assert judgement.result == "pass"
    assert judgement.reason.endswith("the GPU throttled (thermal slowdown)")


@pytest.mark.parametrize("drop", [-3, 0, 50])
def test_what_did_not_run_is_never_judged(drop: int) -> None:
    verdict = parity.judge_not_run("no NVIDIA driver", tally(drop), VERDICT)
    assert parity.exit_code({"verdict": verdict}) == 5
    assert [verdict[part]["result"] for part in ("accuracy", "latency", "overall")] == ["undecided"] * 3
    assert verdict["latency"]["reason"] == "built, not run here (no NVIDIA driver)"
    assert f"by {abs(drop)}.00 points" in verdict["accuracy"]["reason"]
