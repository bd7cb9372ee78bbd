from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from polar_deploy import parity
from polar_deploy.tasks.accuracy import Accuracy, drop_interval
from tests.parity.answers import answered


@pytest.mark.parametrize(("lost", "gained", "samples"), [(60, 30, 1000), (150, 150, 10_000), (25, 60, 500)])
def test_drop_interval_agrees_with_a_bootstrap(lost: int, gained: int, samples: int) -> None:
    shares = np.array([lost, gained, samples - lost - gained]) / samples
    draws = np.random.default_rng(0).multinomial(samples, shares, size=20_000)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / samples, [2.5, 97.5])
    width = high - low
    assert drop_interval(lost, gained, samples) == pytest.approx((low, high), abs=0.06 * width)


def wrong_passes(samples: int, lost: float, gained: float) -> float:
    """How often the upper end is at most the true drop, exactly: over all counts that the two shares may give."""
    truth, found = 100 * (lost - gained) + 1e-9, 0.0
    most = int(binom.isf(1e-7, samples, lost)) + 1
    for count, chance in enumerate(binom.pmf(np.arange(most + 1), samples, lost)):
        others = np.arange(int(binom.isf(1e-7, samples - count, gained / (1 - lost))) + 1 if gained else 1)
        chances = binom.pmf(others, samples - count, gained / (1 - lost))
        passes = [drop_interval(count, int(other), samples)[1] <= truth for other in others]
        found += chance * float(chances @ passes)
    return found


@pytest.mark.parametrize("samples", [100, 360, 1000])
@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.0), (0.0125, 0.0025), (0.02, 0.01), (0.02, 0.0)])
def test_the_truth_lies_above_the_upper_end_in_a_fortieth_of_cases(samples: int, lost: float, gained: float) -> None:
    """Also where hardly any pair differs; a Wald interval, adjusted or not, lets through up to 13 % there."""
    assert wrong_passes(samples, lost, gained) <= 0.0265


def test_drop_interval_where_no_pair_differs() -> None:
    """None of n samples is lost: that leaves the drop d open with n d = z sqrt(n d (1 - d)), so d = z^2 / (n + z^2)."""
    for samples in (100, 360, 10_000):
        low, high = drop_interval(0, 0, samples)
        assert high == pytest.approx(100 * 3.841459 / (samples + 3.841459), rel=1e-5)
        assert low == -high


def test_where_no_drop_is_allowed_it_is_mcnemars_test() -> None:
    """(lost - gained) / sqrt(lost + gained) against 1.96: 7 / 3 decides, 5 / sqrt(7) does not."""
    assert drop_interval(1, 8, 500)[1] < 0 < drop_interval(1, 6, 500)[1]
    assert drop_interval(8, 1, 500)[0] > 0 > drop_interval(6, 1, 500)[0]


@pytest.mark.parametrize(
    ("lost", "gained", "samples", "bound"), [(0, 0, 360, 1.0), (2, 1, 719, 0.5), (30, 10, 1000, 1)]
)
def test_number_of_samples_that_would_decide(lost: int, gained: int, samples: int, bound: float) -> None:
    needed = answered(samples, lost=lost, gained=gained).samples_to_decide(bound)
    assert needed is not None
    for count, decided in ((needed, True), (needed - 1, False)):
        low, high = drop_interval(lost * count / samples, gained * count / samples, count)
        assert (high <= bound or low > bound) == decided


def test_no_number_of_samples_decides_a_drop_that_is_the_bound() -> None:
    assert answered(1000, lost=15, gained=5).samples_to_decide(1.0) is None


def test_gap_is_measured_by_the_largest_logit() -> None:
    gap = parity.Gap()
    gap.add(np.array([[1.0, -4.0]], np.float32), np.array([[1.5, -4.0]], np.float32))
    gap.add(np.array([[2.0, np.nan], [0.0, 1.0]], np.float32), np.array([[9.0, 9.0], [0.0, 1.25]], np.float32))
    assert gap.relative == 0.5 / 4.0
    assert parity.Gap().relative == 0.0
    assert gap.nonfinite == 1
    dead = parity.Gap()
    dead.add(np.ones((2, 3), np.float32), np.full((2, 3), np.nan, np.float32))
    assert (dead.relative, dead.nonfinite) == (None, 2)
    assert parity.Gap(difference=1.0, scale=0.0).relative is None


def paired(*batches: tuple[np.ndarray, np.ndarray, np.ndarray]) -> parity.Paired:
    """Of logits of both networks, and labels."""
    comparison = parity.Comparison(Accuracy())
    for full, compressed, labels in batches:
        comparison.add({"logits": full}, {"logits": compressed}, {"label": labels})
    assert comparison.paired is not None
    return comparison.paired


def logits_of(answers: list[int], classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


def test_classes_are_counted_each_and_the_worst_named_first() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    pair = paired((logits_of([0, 0, 0, 1, 1, 1, 2, 0]), logits_of([0, 0, 1, 1, 0, 0, 2, 2]), labels))
    assert [each.as_json() for each in pair.classes() or ()] == [
        {"class": 0, "samples": 4, "full": 75.0, "compressed": 50.0, "drop": 25.0},
        {"class": 1, "samples": 2, "full": 100.0, "compressed": 0.0, "drop": 100.0},
        {"class": 2, "samples": 2, "full": 50.0, "compressed": 100.0, "drop": -50.0},
    ]
    assert pair.worst_classes() == [1, 0]  # class 2 gains
    assert pair.drop == pytest.approx(100 * (1 + 2 - 1) / 8)


def test_at_most_ten_classes_are_the_worst() -> None:
    labels = np.arange(12)
    pair = paired((logits_of(list(range(12)), 12), logits_of([0] * 12, 12), labels))
    assert pair.worst_classes() == list(range(1, 11))


def test_the_surest_wrong_answers_are_kept_with_their_places() -> None:
    """Two batches; of the rows that only the full engine gets right, a not finite one has no answer to be sure of."""
    odds = np.log(np.array([[1, 3, 0.001], [9, 1, 0.001], [1, 1, 0.001]], np.float32))
    broken = np.array([[np.nan, 0, 0], *np.log([[1, 8, 1], [1, 1, 98]])], np.float32)
    batches = [
        (logits_of([0, 0, 0]), odds, np.zeros(3, np.int64)),  # lost, right, and a tie, which the first one wins
        (logits_of([0, 0, 1]), broken, np.array([0, 0, 1])),
    ]
    worst = paired(*batches).worst_samples()
    assert [(each.index, each.label, each.answer) for each in worst] == [(5, 1, 2), (4, 0, 1), (0, 0, 1)]
    assert [each.confidence for each in worst] == [98.0, 80.0, pytest.approx(74.98, abs=0.01)]
    assert paired(*batches).nonfinite == {"full": 0, "compressed": 1}
    many = np.eye(2, dtype=np.float32)[np.ones(20, int)] * np.linspace(1, 3, 20, dtype=np.float32)[:, None]
    batches.append((logits_of([0] * 20, 2), many, np.zeros(20, np.int64)))
    worst = paired(*batches).worst_samples()
    assert [each.index for each in worst] == [5, *range(25, 14, -1)]  # a dozen, those that are surest
