from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from polar_deploy import parity
from polar_deploy.config import AcceptanceCriteria
from polar_deploy.documents.parity import Conditions
from polar_deploy.engines.timing import Interval, Latency, Percentile, Timing
from tests.parity.answers import answered
from tests.support.rounds import round_of

VERDICT = AcceptanceCriteria(max_drop=1.0, min_speedup=1.02, batch=1)


def measured(median: float, low: float, high: float, control: float = 1.0, batch: int = 1) -> Timing:
    latency = Latency(1.0, 0.95, 1.05, 0.1, {"p99": Percentile(1.5, 1.4, 1.7), "p99.9": Percentile(3.0, 2.0, None)})
    interval = Interval(control, control, control)
    return Timing(batch, (round_of(latency, latency, Interval(median, low, high), interval, singles=400),), 0)


def tally(drop: float, samples: int = 10_000) -> parity.Paired:
    """So many points are lost, 20 of 10,000 samples one way and the other; ten classes, 90 % right."""
    net, both = round(drop * samples / 100), samples // 500
    lost, gained = both + max(net, 0), both + max(-net, 0)
    return answered(samples, lost=lost, gained=gained, right=samples * 9 // 10 - lost)


GOOD, BAD = tally(0.5), tally(2)
FASTER, SLOWER = measured(1.3, 1.25, 1.35), measured(0.9, 0.85, 0.95)
CLOSE, NOISY = measured(1.03, 1.01, 1.05), measured(1.08, 1.05, 1.1, control=1.021)
SMALL = tally(0.5, samples=1000)  # 95 %: -0.2 to 1.3


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
        (SMALL, FASTER, ("undecided", "pass", "undecided"), 5),
        (SMALL, SLOWER, ("undecided", "fail", "fail"), 1),
    ],
)
def test_truth_table(counts: parity.Paired, timing: Timing, answers: tuple[str, str, str], code: int) -> None:
    judged = parity.judge(counts, [measured(9, 9, 9, batch=64), timing], VERDICT)
    verdict = judged.as_json()
    assert tuple(verdict[part]["result"] for part in ("accuracy", "latency", "overall")) == answers
    assert judged.exit_code == code
    deciding = [verdict[part]["reason"] for part in ("accuracy", "latency") if verdict[part]["result"] == answers[2]]
    assert verdict["overall"]["reason"] == "; ".join(deciding)


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(1.02, 1.1, "pass"), (1.0199, 1.1, "undecided"), (1.0, 1.02, "undecided"), (1.0, 1.0199, "fail")],
)
def test_latency_limits(low: float, high: float, answer: str) -> None:
    assert parity.judge_latency(measured(1.02, low, high), VERDICT).result == answer


@pytest.mark.parametrize(
    ("low", "control", "answer"),
    [(1.045, 1.019, "pass"), (1.035, 1.019, "undecided"), (1.045, 0.982, "pass"), (1.035, 0.982, "undecided")],
)
def test_what_the_control_is_off_is_added_to_the_interval(low: float, control: float, answer: str) -> None:
    """A speed-up of 1.02 is asked: 1.035 proves none on a machine where two copies of one engine differ by 2 %."""
    judgement = parity.judge_latency(measured(1.06, low, 1.08, control), VERDICT)
    assert judgement.result == answer
    assert f"with the noise of the machine: {low / max(control, 1 / control):.3f} to" in judgement.reason


@pytest.mark.parametrize(
    ("low", "high", "control", "answer"),
    [
        (1.05, 1.15, 1.0199, "pass"),
        (1.05, 1.15, 0.9801, "pass"),
        (1.05, 1.15, 1.021, "undecided"),  # 1.021 ** 3 is 1.064
        (1.08, 1.15, 1.021, "undecided"),  # faster, but not by as much as is asked
        (1.09, 1.15, 1.021, "pass"),
        (0.88, 0.95, 1.021, "fail"),
        (0.88, 0.97, 1.021, "undecided"),
        (3.80, 4.18, 0.93, "pass"),
    ],
)
def test_noise_above_its_limit_counts_three_times(low: float, high: float, control: float, answer: str) -> None:
    judgement = parity.judge_latency(measured((low + high) / 2, low, high, control), VERDICT)
    assert judgement.result == answer
    if low == 1.05 and answer == "undecided":
        assert "differ by 2.1 %, over 2 %" in judgement.reason


def test_a_better_network_passes_where_no_drop_is_allowed() -> None:
    strict = AcceptanceCriteria(max_drop=0.0)
    better = parity.judge_accuracy(tally(-3), strict)
    assert better.result == "pass"
    assert better.reason.startswith("accuracy rises by 3.00 points (95 %: +2.6")
    assert better.reason.endswith("a drop of 0 is allowed")
    assert parity.judge_accuracy(tally(1), strict).result == "fail"
    equal = parity.judge_accuracy(tally(0), strict)  # that two networks are equal cannot be shown
    assert equal.result == "undecided"
    assert "no number would do" in equal.reason


def test_a_rise_is_told_with_the_interval_of_the_rise() -> None:
    """1 point more, between 0.8 and 1.2; a drop is told with that of the drop."""
    rise, drop = (parity.judge_accuracy(tally(points), VERDICT).reason for points in (-1.0, 0.5))
    ends = [tuple(map(float, re.search(r"95 %: (\S+) to (\S+)\)", each).groups())) for each in (rise, drop)]
    assert rise.startswith("accuracy rises by 1.00 points")
    assert 0.5 < ends[0][0] < 1.0 < ends[0][1] < 1.5
    assert drop.startswith("accuracy drops by 0.50 points")
    assert 0 < ends[1][0] < 0.5 < ends[1][1] < 1.0


def test_too_few_images_are_said_and_how_many_would_do() -> None:
    judgement = parity.judge_accuracy(SMALL, VERDICT)
    assert judgement.result == "undecided"
    assert judgement.reason.startswith("accuracy drops by 0.50 points (95 %: ")
    words = re.search(r"1,000 test samples are too few to tell, some ([\d,]+) would do", judgement.reason)
    assert words
    enough = int(words[1].replace(",", ""))
    assert 1000 < enough < 2500
    assert parity.judge_accuracy(tally(0.5, samples=enough // 1000 * 1000 + 1000), VERDICT).result == "pass"


def test_the_drop_as_counted_decides_where_that_is_asked() -> None:
    point = AcceptanceCriteria(accuracy_rule="point")
    assert [parity.judge_accuracy(tally(drop, samples=1000), point).result for drop in (1.0, 1.1)] == ["pass", "fail"]


@pytest.mark.parametrize(
    ("right", "answer", "words"),
    [
        (250, "fail", r"the full network: accuracy 25\.00 %; the best answer .* 25\.00 %: it is no better than chance"),
        (270, "undecided", r"the full network: accuracy 27\.00 %.* too few samples to tell it from chance"),
        (280, "pass", ""),
    ],
)
def test_networks_at_chance_prove_nothing_by_agreeing(right: int, answer: str, words: str) -> None:
    """Four classes: a quarter is right by chance, give or take 1.4 points."""
    judgement = parity.judge_accuracy(answered(1000, right=right, labels=np.arange(1000) % 4), VERDICT)
    assert judgement.result == answer
    assert not words or re.search(words, judgement.reason)


def test_a_compressed_network_at_chance_is_no_network() -> None:
    """However large a drop is allowed. The commonest class is 40 % of the test set."""
    pair = answered(1000, right=400, lost=500, labels=np.repeat([0, 1, 2], [400, 300, 300]))
    judgement = parity.judge_accuracy(pair, AcceptanceCriteria(max_drop=100))
    assert judgement.result == "fail"
    assert "the compressed network: accuracy 40.00 %" in judgement.reason


def test_a_test_set_of_one_class_tells_nothing() -> None:
    judgement = parity.judge_accuracy(answered(1000, right=1000, labels=np.full(1000, 3)), VERDICT)
    assert judgement.result == "undecided"


@pytest.mark.parametrize(
    ("bound", "answer"), [(1.05, "pass"), (1.049, "undecided"), (0.95, "undecided"), (0.949, "fail")]
)
def test_latency_itself_may_be_bounded(bound: float, answer: str) -> None:
    judgement = parity.judge_latency(FASTER, AcceptanceCriteria(max_latency_ms=bound))
    assert judgement.result == answer
    assert "the median of an inference at batch 1 is 1 ms (95 %: 0.95 to 1.05)" in judgement.reason
    assert parity.judge_latency(SLOWER, AcceptanceCriteria(max_latency_ms=bound)).result == "fail"


@pytest.mark.parametrize(
    ("percentile", "bound", "answer", "words"),
    [
        ("p99", 1.7, "pass", r"p99 of an inference at batch 1 is 1\.5 ms \(95 %: 1\.4 to 1\.7\)"),
        ("p99", 1.6, "undecided", "too close"),
        ("p99", 1.3, "fail", r"only 1\.3 ms are allowed"),
        ("p99.9", 9.0, "undecided", "too few samples, 400, for an upper end: 3688 are needed"),
        ("p99.9", 1.9, "fail", r"above 2 ms"),
    ],
)
def test_a_percentile_may_be_bounded(percentile: str, bound: float, answer: str, words: str) -> None:
    judgement = parity.judge_latency(FASTER, AcceptanceCriteria(max_latency_ms=bound, latency_percentile=percentile))
    assert judgement.result == answer
    assert re.search(words, judgement.reason)


def test_as_many_single_inferences_as_a_percentile_needs() -> None:
    asked = {
        name: parity.singles_for(AcceptanceCriteria(max_latency_ms=1, latency_percentile=name))
        for name in ("p50", "p99.9")
    }
    assert asked["p50"] >= 368
    assert asked["p99.9"] >= 3688


def test_precision_is_held_against_the_bound_of_its_own() -> None:
    ruined = parity.judge_accuracy(tally(0), VERDICT, precision={"compressed": tally(3)})
    assert ruined.result == "fail"
    assert "precision costs the compressed engine 3.00 points against its own FP32 graph" in ruined.reason
    weak = parity.judge_accuracy(tally(-3), VERDICT, precision={"full": tally(20), "compressed": tally(0)})
    assert weak.result == "fail"  # the full engine is ruined: no art to match it
    assert "costs the full engine 20.00 points" in weak.reason
    assert (
        parity.judge_accuracy(GOOD, VERDICT, precision={"full": tally(0.5), "compressed": tally(0.5)}).result == "pass"
    )
    assert (
        parity.judge_accuracy(BAD, VERDICT, precision={"compressed": tally(-5)}).result == "fail"
    )  # none makes up for the other


def test_what_the_precision_costs_both_engines_alike_is_said_once() -> None:
    few = answered(200, lost=0, gained=0, right=180)
    reason = parity.judge_accuracy(few, VERDICT, precision={"full": few, "compressed": few}).reason
    assert reason.count("costs either engine 0.00 points against its own FP32 graph") == 1
    assert reason.count("too few to tell") == 2  # for the drop, and for the precision


def test_throttling_is_said() -> None:
    cool = Conditions(name="a GPU", throttle=[], energy_mj=None)
    hot = Conditions(name="a GPU", throttle=["thermal slowdown"], energy_mj=None)
    timing = replace(FASTER, rounds=(FASTER.best.model_copy(update={"before": cool, "after": hot}),))
    judgement = parity.judge_latency(timing, VERDICT)
    assert judgement.result == "pass"
    assert judgement.reason.endswith("the GPU throttled (thermal slowdown)")


@pytest.mark.parametrize("drop", [-3, 0, 50])
def test_what_did_not_run_is_never_judged(drop: int) -> None:
    judged = parity.judge_not_run("no NVIDIA driver", tally(drop), VERDICT)
    assert judged.exit_code == 5
    verdict = judged.as_json()
    assert [verdict[part]["result"] for part in ("accuracy", "latency", "overall")] == ["undecided"] * 3
    assert verdict["latency"]["reason"] == "built, not run here (no NVIDIA driver)"
    assert f"by {abs(drop)}.00 points" in verdict["accuracy"]["reason"]
