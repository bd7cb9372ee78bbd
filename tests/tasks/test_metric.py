"""Metrics: what they score, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from polar_deploy import parity
from polar_deploy.config import AcceptanceCriteria
from polar_deploy.errors import ContentError
from polar_deploy.tasks import Arrays, Metric, Statistics
from polar_deploy.tasks.accuracy import Accuracy
from polar_deploy.tasks.metric import Floats


class Ratio(Metric):
    """Hits over tries, both of a sample: its score is no mean of the samples' own."""

    name, unit = "hits", "%"

    def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
        return np.stack([outputs["hits"], targets["tries"]], axis=1)

    def score(self, totals: Floats) -> Floats:
        return 100 * totals[:, 0] / totals[:, 1]


class Best(Metric):
    """Largest value among the samples: no function of a sum."""

    name, unit = "best", "m"

    def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
        return outputs["value"][:, None]

    def scores(self, statistics: Statistics, weights: Floats) -> Floats:
        return np.where(weights > 0, statistics[:, 0], -np.inf).max(axis=1)


def test_a_score_is_that_of_the_sum() -> None:
    statistics = Ratio().statistics({"hits": np.array([1.0, 2.0])}, {"tries": np.array([1.0, 9.0])})
    assert Ratio().of_all(statistics) == 30
    weighted = Ratio().scores(statistics, np.array([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0]]))
    assert weighted.tolist() == pytest.approx([100, 200 / 9, 100 * 11 / 18])


def test_a_metric_that_is_no_function_of_a_sum_has_an_interval_too() -> None:
    values = np.random.default_rng(0).normal(size=(2, 200))
    full, compressed = (Best().statistics({"value": each}, {}) for each in values)
    pair = parity.Paired(Best(), full, compressed)
    assert pair.drop == values[0].max() - values[1].max()
    low, high = pair.interval
    assert low <= pair.drop <= high


def tries(samples: int, rate: float, loss: float, rng: np.random.Generator) -> tuple[Statistics, Statistics]:
    """Each sample has its own number of tries, and its own rate; the second network loses the share `loss` of hits."""
    count = rng.integers(5, 60, samples)
    rates = np.clip(rng.normal(rate, 0.1, samples), 0, 1)
    hits = rng.binomial(count, rates)
    kept = rng.binomial(hits, 1 - loss)
    return np.stack([hits, count], axis=1).astype(float), np.stack([kept, count], axis=1).astype(float)


def test_the_bootstraps_interval_holds_the_truth_in_95_of_100_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is what 400,000 samples say."""
    monkeypatch.setattr("polar_deploy.tasks.metric.RESAMPLES", 400)
    rng, metric = np.random.default_rng(0), Ratio()
    full, compressed = tries(400_000, 0.6, 0.05, rng)
    truth = metric.of_all(full) - metric.of_all(compressed)
    inside = 0
    for _ in range(300):
        low, high = metric.drop_interval(*tries(120, 0.6, 0.05, rng))(1.0)
        inside += low <= truth <= high
    assert 0.91 <= inside / 300 <= 0.98  # give or take 1.3 points


def answers(samples: int, lost: float, gained: float, rng: np.random.Generator) -> tuple[Statistics, Statistics]:
    draw, labels = rng.random(samples), np.zeros(samples, int)
    full = np.where(draw < gained, 1, 0)
    compressed = np.where((draw >= gained) & (draw < gained + lost), 1, 0)
    made = (Accuracy().statistics({"logits": np.eye(2)[each]}, {"label": labels}) for each in (full, compressed))
    first, second = made
    return first, second


def test_with_many_answers_the_bootstrap_and_tangos_interval_agree() -> None:
    full, compressed = answers(20_000, 0.03, 0.01, np.random.default_rng(3))
    exact = Accuracy().drop_interval(full, compressed)(1.0)
    sampled = Metric.drop_interval(Accuracy(), full, compressed)(1.0)
    assert sampled == pytest.approx(exact, abs=0.06 * (exact[1] - exact[0]))


def test_more_samples_of_the_same_kind_narrow_the_interval() -> None:
    at = Ratio().drop_interval(*tries(200, 0.6, 0.05, np.random.default_rng(1)))
    widths = [np.subtract(*at(times)[::-1]) for times in (1.0, 4.0)]
    assert widths[0] == pytest.approx(2 * widths[1])


def test_pairs_are_resampled_together() -> None:
    """Two networks that are the same differ by nothing, however unlike the samples are."""
    same, _ = tries(50, 0.5, 0.0, np.random.default_rng(2))
    assert Ratio().drop_interval(same, same)(1.0) == (0, 0)


def test_the_worst_samples_are_those_that_lose_most_by_themselves() -> None:
    full = np.array([[5.0, 10.0], [9.0, 10.0], [1.0, 1.0], [3.0, 10.0]])
    compressed = np.array([[4.0, 10.0], [2.0, 10.0], [1.0, 1.0], [6.0, 10.0]])
    worst = Ratio().worst(full, compressed, 3)
    assert worst == [{"index": 1, "full": 90.0, "compressed": 20.0}, {"index": 0, "full": 50.0, "compressed": 40.0}]


def test_accuracy_counts_what_is_not_finite_as_wrong() -> None:
    logits = np.array([[np.nan, 0.0], [0.0, 1.0], [np.inf, 0.0]])
    statistics = Accuracy().statistics({"logits": logits}, {"label": np.array([0, 1, 0])})
    assert Accuracy().of_all(statistics) == pytest.approx(100 / 3)
    assert np.isfinite(statistics).all()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"hits": np.array([1.0, np.nan])}, None),
        (
            {"hits": np.array([1.0, 1.0]), "broken": np.ones(2)},
            "hold NaN or Inf for 1 samples whose outputs are finite",
        ),
        ({"hits": np.array([1.0, 1.0]), "flat": np.ones(2)}, r"have the shape \[2\], for 2 samples"),
    ],
)
def test_statistics_have_to_be_numbers_where_outputs_are(outputs: dict[str, np.ndarray], message: str | None) -> None:
    class Odd(Ratio):
        def statistics(self, outputs: Arrays, targets: Arrays) -> Statistics:
            if "flat" in outputs:
                return outputs["flat"]
            found = super().statistics(outputs, targets)
            found[0, 1] = np.nan if "broken" in outputs else found[0, 1]
            return found

    comparison, targets = parity.Comparison(Odd()), {"tries": np.array([2.0, 2.0])}
    if message:
        with pytest.raises(ContentError, match=message):
            comparison.add(outputs, outputs, targets)
        return
    comparison.add(outputs, outputs, targets)
    assert comparison.paired is not None
    assert comparison.paired.nonfinite == {"full": 1, "compressed": 1}
    assert parity.judge_accuracy(comparison.paired, AcceptanceCriteria()).result == "fail"


def test_without_a_metric_outputs_are_compared_and_nothing_is_decided() -> None:
    comparison = parity.Comparison(None)
    comparison.add({"a": np.array([[2.0]]), "b": np.array([4, 4])}, {"a": np.array([[1.5]]), "b": np.array([4, 3])}, {})
    assert comparison.paired is None
    found = comparison.difference().as_json()
    assert found == {"relative_difference": 0.25, "scale": 2.0, "outputs": {"a": 0.25, "b": 0.25}}
    assert parity.judge_accuracy(None, AcceptanceCriteria()).result == "undecided"
