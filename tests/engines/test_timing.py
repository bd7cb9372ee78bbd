from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import binom

from polar_deploy.documents.parity import Conditions
from polar_deploy.engines import timing
from polar_deploy.engines.timing import compare, median_interval
from tests.support.classifiers import BusyEngine, TimedEngine, noisy, steady
from tests.support.rounds import round_of

IMAGES = {"input": np.zeros((2, 3, 8, 8), np.float32)}


def pair(a_ms: float, b_ms: float, seed: int) -> tuple[TimedEngine, TimedEngine]:
    return TimedEngine(noisy(a_ms, seed), noisy(a_ms, seed + 1)), TimedEngine(noisy(b_ms, seed + 2))


@pytest.mark.parametrize("n", [6, 7, 12, 50, 199, 204, 1500])
def test_interval_has_the_smallest_ranks_that_keep_95_percent(n: int) -> None:
    interval = median_interval([float(value) for value in np.random.default_rng(n).permutation(n) + 1])
    rank = int(interval.low)
    assert interval.high == n + 1 - rank
    assert interval.median == (n + 1) / 2
    below = [sum(math.comb(n, count) for count in range(k)) / 2**n for k in (rank, rank + 1)]  # P(X < k), X ~ B(n, 1/2)
    assert 1 - 2 * below[0] >= 0.95 > 1 - 2 * below[1]


def test_interval_covers_the_median_of_a_skewed_distribution() -> None:
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.lognormal(size=40)) for _ in range(2000)]
    covered = np.mean([interval.low <= 1 <= interval.high for interval in intervals])
    assert 0.95 <= covered <= 0.975  # exact, so never below; steps of ranks put it a little above


@pytest.mark.parametrize("share", [0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("n", [12, 100, 367, 368, 1000, 5000])
def test_interval_of_a_percentile_has_the_smallest_ranks_that_keep_95_percent(share: float, n: int) -> None:
    found = timing.percentile([float(value) for value in np.random.default_rng(n).permutation(n) + 1], share)
    below = binom(n, share).cdf  # of a number of values
    assert found.low_ms == 1 or below(found.low_ms - 1) <= 0.025 < below(found.low_ms)
    if found.high_ms is None:
        assert below(n - 1) < 0.975
        assert n < timing.singles_needed(share)
    else:
        assert below(found.high_ms - 1) >= 0.975 > below(found.high_ms - 2)
        assert n >= timing.singles_needed(share)


def test_a_99th_percentile_needs_368_values() -> None:
    assert [timing.singles_needed(share) for share in (0.9, 0.99)] == [36, 368]


def test_percentiles_are_those_of_single_inferences() -> None:
    """Every twentieth inference takes ten times as long: the mean of ten hides that from a sample's percentiles."""

    class Stumbling(TimedEngine):
        def timer(self, images: np.ndarray) -> timing.Timer:
            calls = itertools.count(1)

            def milliseconds(inferences: int) -> float:
                return sum(1.0 if next(calls) % 20 == 0 else 0.1 for _ in range(inferences)) / inferences

            return milliseconds

        def duplicate(self) -> TimedEngine:
            return Stumbling(self.times)

    result = compare(Stumbling(steady(1)), Stumbling(steady(1)), IMAGES, singles=600).best
    assert result.inferences > 1
    assert result.singles == 600
    assert (result.compressed.tail["p90"].value_ms, result.compressed.tail["p99"].value_ms) == (0.1, 1.0)
    assert compare(Stumbling(steady(1)), Stumbling(steady(1)), IMAGES).best.compressed.tail == {}


def test_as_many_samples_as_single_inferences_are_asked_for() -> None:
    engine = TimedEngine(steady(3.0))
    assert compare(engine, engine, IMAGES, singles=400).best.singles >= 400
    slow = TimedEngine(steady(1000.0))  # there is no time for so many
    best = compare(slow, slow, IMAGES, singles=400).best
    assert best.singles == 12
    assert best.full.tail["p99"].high_ms is None


def test_noise_of_the_control_widens_the_interval_of_the_speedup() -> None:
    latency = timing.Latency(1.0, 1.0, 1.0, 0.0)
    speedup, control = timing.Interval(1.05, 1.03, 1.07), timing.Interval(1.0, 0.98, 1.01)
    found = round_of(latency, latency, speedup, control).speedup_with_noise
    assert (found.median, found.low, found.high) == pytest.approx((1.05, 1.03 * 0.98, 1.07 / 0.98))


def test_interval_of_five_values_is_refused() -> None:
    with pytest.raises(ValueError, match="5 values are too few"):
        median_interval([1, 2, 3, 4, 5])


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_ten_percent_slower_is_found_and_equal_is_not_called_different(seed: int) -> None:
    slower = compare(*pair(2.0, 2.2, seed), IMAGES)
    assert slower.different
    assert slower.best.speedup.low < 1 / 1.1 < slower.best.speedup.high
    assert not compare(*pair(2.0, 2.0, seed), IMAGES).different


def test_order_favours_no_engine() -> None:
    assert sorted(timing._ORDERS) == sorted(itertools.permutations(range(3)))
    turns = [index for order in timing._ORDERS for index in order]
    neighbours = Counter(zip(turns, [*turns[1:], turns[0]], strict=True))
    assert neighbours == dict.fromkeys(itertools.permutations(range(3), 2), 3)


def test_ten_percent_slower_is_found_on_the_real_clock() -> None:
    result = compare(BusyEngine(30_000), BusyEngine(33_000), IMAGES, pairs=60, seconds=(0, 1))
    # A machine that is too busy to tell is an honest answer too, but never the wrong sign.
    assert result.best.speedup.median < 0.97 or not result.decided


def everywhere(milliseconds: float) -> dict[str, timing.Percentile]:
    """The percentiles of 204 equal times: too few for an upper end of the highest two."""
    known = timing.Percentile(milliseconds, milliseconds, milliseconds)
    open_ended = timing.Percentile(milliseconds, milliseconds, None)
    return {"p90": known, "p95": known, "p99": open_ended, "p99.9": open_ended}


def test_figures_of_known_times() -> None:
    a = TimedEngine(itertools.cycle([4.0]), steady(4.0))
    result = compare(a, TimedEngine(steady(2.0)), IMAGES, pairs=200)
    assert result.batch == 2
    assert result.best.pairs == 204  # a multiple of the six orders
    assert result.best.full == timing.Latency(4.0, 4.0, 4.0, 0.0, everywhere(4.0))
    assert result.best.compressed == timing.Latency(2.0, 2.0, 2.0, 0.0, everywhere(2.0))
    assert result.best.speedup == timing.Interval(2.0, 2.0, 2.0)
    assert result.best.control == timing.Interval(1.0, 1.0, 1.0)
    assert result.decided
    assert len(result.rounds) == 1


def test_the_distribution_of_samples_is_kept() -> None:
    """A steady engine, and one that takes 1, 2 or 3 ms equally often: a third of the quantiles each."""
    result = compare(TimedEngine(steady(3.0), steady(3.0)), TimedEngine(itertools.cycle([1.0, 2.0, 3.0])), IMAGES)
    assert set(result.best.quantiles_ms.full) == {3.0}
    quantiles = result.best.quantiles_ms.compressed
    assert list(quantiles) == sorted(quantiles)
    assert [round(quantiles.count(ms) / len(quantiles), 1) for ms in (1.0, 2.0, 3.0)] == [0.3, 0.3, 0.3]


def test_noise_shared_by_all_engines_cancels() -> None:
    """The machine slows down by half in the middle: the paired ratio does not see it."""
    started = itertools.count()

    def drifting(milliseconds: float) -> Iterator[float]:
        while True:
            yield milliseconds * (2.0 if next(started) > 300 else 1.0)

    a, b = TimedEngine(drifting(3.0), drifting(3.0)), TimedEngine(drifting(1.5))
    best = compare(a, b, IMAGES).best
    assert best.speedup.low == best.speedup.high == 2.0
    assert best.full.iqr_ms == 3.0


@pytest.mark.parametrize(
    ("milliseconds", "decided"), [(1.0, True), (1.45, True), (1.55, False), (2.75, True), (2.6, False)]
)
def test_a_bad_control_is_measured_five_times_and_counts_three_times(milliseconds: float, decided: bool) -> None:
    """Copies differ by 1.1, so that up to 1.1 ** 3 = 1.33 may be the machine's doing."""

    class Uneven(TimedEngine):
        """Every other copy takes 2.2 ms, the rest 2.0 ms."""

        copies = itertools.count()

        def duplicate(self) -> TimedEngine:
            return TimedEngine(steady(2.0 if next(self.copies) % 2 else 2.2))

    result = compare(Uneven(steady(2.0)), TimedEngine(steady(milliseconds)), IMAGES)
    assert len(result.rounds) == 5
    assert (result.decided, result.different) == (decided, decided)
    assert result.best.noise == pytest.approx(1 - 1 / 1.1)
    low, high = 2 / milliseconds / 1.1**3, 2 / milliseconds * 1.1**3
    found = result.best.speedup_with_noise
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


class Copies(TimedEngine):
    """Its copies take the milliseconds that `made` says, one after the other."""

    def __init__(self, first: float, *made: float) -> None:
        super().__init__(steady(first))
        self.made = iter(made)

    def duplicate(self) -> TimedEngine:
        return TimedEngine(steady(next(self.made)))


def test_round_is_chosen_by_its_control_alone() -> None:
    """All copies differ; the third round has the only good control, and not the largest speed-up."""
    result = compare(Copies(2.0, 2.2, 2.0, 2.1, 2.0, 2.01), Copies(1.0, 0.5, 1.6), IMAGES)
    assert [measured.speedup.median for measured in result.rounds] == [2.0, 4.0, 1.25]
    assert result.chosen == 2
    assert result.decided


def test_each_round_has_copies_of_its_own() -> None:
    """Two copies of one engine differ: a slow one must not be in every round."""
    a, b = Copies(9.0, 2.0, 2.2, 2.4, 2.4), Copies(9.0, 1.0, 1.2)
    rounds = timing.afresh(a, b, IMAGES, rounds=2, pairs=12, seconds=(0.0, 1.0))
    assert [(each.full.median_ms, each.compressed.median_ms) for each in rounds] == [(2.0, 1.0), (2.4, 1.2)]
    assert [each.speedup_over_both for each in rounds] == pytest.approx([2.1, 2.0])


def test_short_inferences_are_timed_many_at_once_and_more_often() -> None:
    a = TimedEngine(steady(0.3), steady(0.3))
    result = compare(a, TimedEngine(steady(0.1)), IMAGES)
    assert result.best.inferences == 10  # 10 × 0.1 ms = 1 ms
    assert a.samples[-1] == 10
    assert result.best.pairs == 288  # 7 ms a pair: 286 of them make two seconds


@pytest.mark.parametrize(
    ("milliseconds", "pairs"), [(3.0, 228), (4.0, 204), (100.0, 102), (1000.0, 12), (60_000.0, 12)]
)
def test_pairs_by_the_length_of_an_inference(milliseconds: float, pairs: int) -> None:
    engine = TimedEngine(steady(milliseconds))
    assert compare(engine, engine, IMAGES, seconds=(2.0, 30.0)).best.pairs == pairs


def test_warm_up_waits_for_stable_times() -> None:
    falling = itertools.chain((10.0 * 0.8**step for step in range(15)), steady(2.0))
    a = TimedEngine(falling, steady(2.0))
    result = compare(a, TimedEngine(steady(2.0)), IMAGES)
    assert result.best.full.tail["p99"].value_ms == 2.0  # none of the first, slow samples was counted


class CountingEngine(TimedEngine):
    """Uses 3 mJ an inference, 5 before anything is asked of it; hot once it has run."""

    def conditions(self) -> Conditions:
        throttle = ["thermal"] if self.samples else []
        return Conditions(name="a GPU", throttle=throttle, energy_mj=5 + 3 * sum(self.samples))


def test_energy_is_that_of_an_inference() -> None:
    engine = CountingEngine(steady(4.0))
    assert timing.energy(engine, IMAGES, seconds=1.0) == 3.0
    assert sum(engine.samples) >= 250
    assert timing.energy(TimedEngine(steady(4.0)), IMAGES) is None


def test_conditions_are_those_before_and_after_a_round() -> None:
    result = compare(CountingEngine(steady(2.0), steady(2.0)), TimedEngine(steady(1.0)), IMAGES)
    assert result.best.before == Conditions(name="a GPU", throttle=[], energy_mj=5)
    assert result.best.after is not None
    assert result.best.after.energy_mj > 5 + 3 * 200
    assert result.best.throttled == ["thermal"]
