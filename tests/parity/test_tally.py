from __future__ import annotations

import numpy as np
import pytest

from polar_deploy import parity


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


def logits_of(answers: list[int], classes: int = 3) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[answers]


def test_classes_are_counted_each_and_the_worst_named_first() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    tally = parity.Tally()
    tally.add(logits_of([0, 0, 0, 1, 1, 1, 2, 0]), logits_of([0, 0, 1, 1, 0, 0, 2, 2]), labels)
    assert tally.classes() == [
        {"class": 0, "samples": 4, "full": 75.0, "compressed": 50.0, "drop": 25.0},
        {"class": 1, "samples": 2, "full": 100.0, "compressed": 0.0, "drop": 100.0},
        {"class": 2, "samples": 2, "full": 50.0, "compressed": 100.0, "drop": -50.0},
    ]
    assert tally.worst() == [1, 0]  # class 2 gains
    assert tally.drop == pytest.approx(100 * (1 + 2 - 1) / 8)


def test_at_most_ten_classes_are_the_worst() -> None:
    labels = np.arange(12)
    tally = parity.Tally()
    tally.add(logits_of(list(range(12)), 12), logits_of([0] * 12, 12), labels)
    assert tally.worst() == list(range(1, 11))


def test_the_surest_wrong_answers_are_kept_with_their_places() -> None:
    """Two batches; of the rows that only the full engine gets right, a not finite one has no answer to be sure of."""
    tally = parity.Tally()
    odds = np.log(np.array([[1, 3, 0.001], [9, 1, 0.001], [1, 1, 0.001]], np.float32))
    tally.add(logits_of([0, 0, 0]), odds, np.zeros(3, np.int64))  # lost, right, and a tie, which the first one wins
    broken = np.array([[np.nan, 0, 0], *np.log([[1, 8, 1], [1, 1, 98]])], np.float32)
    tally.add(logits_of([0, 0, 1]), broken, np.array([0, 0, 1]))
    found = [(each.index, each.label, each.answer) for each in tally.worst_samples]
    assert found == [(5, 1, 2), (4, 0, 1), (0, 0, 1)]
    assert [each.confidence for each in tally.worst_samples] == [98.0, 80.0, pytest.approx(74.98, abs=0.01)]
    many = np.eye(2, dtype=np.float32)[np.ones(20, int)] * np.linspace(1, 3, 20, dtype=np.float32)[:, None]
    tally.add(logits_of([0] * 20, 2), many, np.zeros(20, np.int64))
    assert [each.index for each in tally.worst_samples] == [5, *range(25, 14, -1)]  # a dozen, those that are surest
