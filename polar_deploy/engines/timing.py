"""Which of two engines is faster, on a machine that does other things as well.

Both engines run in one process, one sample of each in turn and in every order, so that what disturbs one disturbs the
other. The answer is the median of the paired ratios. A second instance of the first engine takes part as
a control: what it seems to differ from its twin is the machine's doing. Where that is more than 2 %, only a difference
several times as large tells anything. (Measured: minima, means and one engine after the other are off by up to 15 %
there.)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polar_deploy.documents.parity import NOISE, Interval, Latency, Percentile, Percentiles, Round
from polar_deploy.documents.part import Pair
from polar_deploy.engines.base import Engine, Timer
from polar_deploy.tensors import Arrays, count

SINGLES = 600  # single inferences, for the percentiles of a verdict
PERCENTILES: dict[Percentiles, float] = {"p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
QUANTILES = 40  # steps of the distribution that is kept
MAX_ROUNDS = 5  # of a comparison, as long as the control is off
SECONDS = (2.0, 30.0)  # least and most time that a round spends in inferences
MIN_PAIRS = 12  # however long an inference takes: below, the interval of the median says little
# Of a, b and the control: each comes first, second and last equally often, and equally often right after each other
# one but never after itself. Where that is not so, what the one before left in the caches favours one of them.
_ORDERS = ((0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2), (1, 2, 0), (2, 0, 1))
_MIN_SAMPLE_MS = 1.0  # one sample: as many inferences as take the fastest engine this long; calls cost microseconds
_WARM_UP_SECONDS = 3.0  # at most
_WARM_UP_WINDOW = 5  # samples; warm when their median stays within 5 % from one window to the next


@dataclass(frozen=True)
class Timing:
    """All rounds, and which one counts: the first whose control is good, else the one whose control is best."""

    batch: int
    rounds: tuple[Round, ...]
    chosen: int

    @property
    def best(self) -> Round:
        """The round that counts."""
        return self.rounds[self.chosen]

    @property
    def decided(self) -> bool:
        """False: the control is off by more than `NOISE`, and that may be why one engine seems faster."""
        speedup = self.best.speedup_with_noise
        return self.best.noise <= NOISE or not speedup.low <= 1 <= speedup.high

    @property
    def different(self) -> bool:
        """True: one engine is faster than the other by more than `NOISE`, and the interval excludes a tie."""
        speedup = self.best.speedup
        return self.decided and abs(speedup.median - 1) > NOISE and not speedup.low <= 1 <= speedup.high


def compare(
    a: Engine,
    b: Engine,
    inputs: Arrays,
    *,
    pairs: int = 200,
    seconds: tuple[float, float] = SECONDS,
    max_rounds: int = MAX_ROUNDS,
    singles: int = 0,
) -> Timing:
    """Time engine `a` against engine `b` on one batch.

    A round whose control is off is followed by another, with all three loaded afresh (see `afresh`). Whether to go on,
    and which round counts, depends on the control alone and never on the result.

    Args:
        a: the reference, the full engine of what is returned.
        b: what is compared with it, the compressed one.
        inputs: the batch, by name.
        pairs: samples of each engine, rounded up to a multiple of 6.
        seconds: least and most time that a round spends in inferences, warm-up aside. Short inferences get more pairs,
            long ones fewer, but at least `MIN_PAIRS`.
        max_rounds: how often to try, at least once.
        singles: how many inferences of each engine to time one by one, as far as that is possible in the time of
            `seconds`; where a sample is one inference, samples are taken, and at least as many.
    """
    rounds = [_round(a, b, a.duplicate(), inputs, pairs, seconds, singles)]
    while len(rounds) < max_rounds and rounds[-1].noise > NOISE:
        rounds += afresh(a, b, inputs, rounds=1, pairs=pairs, seconds=seconds, singles=singles)
    chosen = min(range(len(rounds)), key=lambda index: rounds[index].noise)
    return Timing(count(inputs), tuple(rounds), chosen)


def afresh(
    a: Engine,
    b: Engine,
    inputs: Arrays,
    *,
    rounds: int,
    pairs: int,
    seconds: tuple[float, float],
    singles: int = 0,
) -> list[Round]:
    """Time engine `a` against engine `b` as `compare` does, `rounds` times, each time with new copies of both.

    Two copies of one engine differ by a few percent for as long as they live, by where their buffers lie in memory
    (measured with ONNX Runtime on a CPU: a standard deviation of 1.5 %). More samples of the same copies do not help.
    """
    copies = ((a.duplicate(), b.duplicate(), a.duplicate()) for _ in range(rounds))
    return [_round(*each, inputs, pairs, seconds, singles) for each in copies]


def energy(engine: Engine, inputs: Arrays, seconds: float = 2.0) -> float | None:
    """Millijoules of one inference on a batch of inputs, as the device counts them over `seconds`; None: it does not.

    The count is the whole device's, idle power included, and is renewed some ten times a second.
    """
    if _counted(engine) is None:
        return None
    timer, inferences, spent = engine.timer(inputs), 0, 0.0
    at_once = math.ceil(100 / timer(1))  # a tenth of a second
    start = _counted(engine) or 0.0
    while spent < 1000 * seconds:
        spent += timer(at_once) * at_once
        inferences += at_once
    return ((_counted(engine) or 0.0) - start) / inferences


def _counted(engine: Engine) -> float | None:
    """Millijoules since the driver was loaded, or None."""
    state = engine.conditions()
    return None if state is None else state.energy_mj


def median_interval(values: Sequence[float]) -> Interval:
    """The median of at least 6 values with its exact 95 % interval, whatever their distribution.

    The number of values below the true median is binomial (n, 1/2), so the k-th smallest and the k-th largest value
    enclose it with a confidence of 1 - 2 P(X < k) (David and Nagaraja, Order Statistics, 3rd ed., section 7.1). k is
    the largest that keeps 95 %.
    """
    ordered, n = sorted(values), len(values)
    tail, k = 1, 0  # tail: P(X <= k) in units of 2^-n
    while 40 * tail <= 2**n:  # 2 P <= 5 %, in whole numbers: 2^-n is no float for n > 1074
        k += 1
        tail += math.comb(n, k)
    if k == 0:
        raise ValueError(f"{n} values are too few for a 95 % interval of their median")
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def percentile(values: Sequence[float], share: float) -> Percentile:
    """A percentile of values with its exact 95 % interval, whatever their distribution.

    The number of values below the true one is binomial (n, share): the k-th smallest lies above it with P(X < k), the
    r-th smallest below it with P(X >= r), each 2.5 % at most (David and Nagaraja, as in `median_interval`).

    Args:
        values: at least one.
        share: of the values that lie below, such as 0.99.
    """
    ordered, n = np.sort(np.asarray(values, np.float64)), len(values)
    counts = np.arange(n + 1)
    logs = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)])
    below = np.cumsum(np.exp(logs + counts * math.log(share) + (n - counts) * math.log1p(-share)))  # P(X <= k)
    first = int(np.searchsorted(below, 0.025, side="right"))  # the largest k with P(X <= k - 1) <= 2.5 %
    last = int(np.searchsorted(below, 0.975 - 1e-12)) + 1  # the smallest r with P(X <= r - 1) >= 97.5 %
    high = float(ordered[last - 1]) if last <= n else None
    return Percentile(float(np.quantile(ordered, share)), float(ordered[max(first, 1) - 1]), high)


def singles_needed(share: float) -> int:
    """How many single inferences the interval of a percentile needs for a finite upper end."""
    return math.ceil(math.log(0.025) / math.log(share))


def _round(
    a: Engine, b: Engine, twin: Engine, inputs: Arrays, pairs: int, seconds: tuple[float, float], singles: int
) -> Round:
    timers = [engine.timer(inputs) for engine in (a, b, twin)]
    before = a.conditions()
    measured = _measure(timers, pairs, seconds, singles)
    return measured.model_copy(update={"before": before, "after": a.conditions()})


def _measure(timers: Sequence[Timer], pairs: int, seconds: tuple[float, float], singles: int) -> Round:
    """One round: `timers` of a, b and a's twin."""
    inferences = _warm_up(timers)
    samples: list[list[float]] = []
    spent, (least, most) = 0.0, seconds
    if inferences == 1:
        pairs = max(pairs, singles)
    while len(samples) < MIN_PAIRS or (spent < most and (len(samples) < pairs or spent < least)):
        for order in _ORDERS:
            times = [0.0] * len(timers)
            for index in order:
                times[index] = timers[index](inferences)
            samples.append(times)
            spent += sum(times) * inferences / 1000
    a, b, twin = zip(*samples, strict=True)
    alone = (a, b) if inferences == 1 else _one_by_one(timers[:2], singles, most)
    first, second = (_latency(times, each) for times, each in zip((a, b), alone, strict=True))
    return Round(
        pairs=len(samples),
        inferences=inferences,
        singles=len(alone[0]),
        speedup=_ratio(a, b),
        control=_ratio(a, twin),
        before=None,
        after=None,
        full=first,
        compressed=second,
        quantiles_ms=Pair(full=_quantiles(a), compressed=_quantiles(b)),
    )


def _one_by_one(timers: Sequence[Timer], singles: int, most: float) -> list[list[float]]:
    """Time single inferences of two engines in turn, for `most` seconds at most."""
    times: list[list[float]] = [[], []]
    spent = 0.0
    while len(times[0]) < singles and spent < most:
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for index in order:
            times[index].append(timers[index](1))
            spent += times[index][-1] / 1000
    return times


def _warm_up(timers: Sequence[Timer]) -> int:
    """Run all engines until their times are stable; return how many inferences make a sample."""
    deadline = time.monotonic() + _WARM_UP_SECONDS
    before = [math.inf] * len(timers)
    while True:
        now = [statistics.median(timer(1) for _ in range(_WARM_UP_WINDOW)) for timer in timers]
        stable = all(math.isclose(old, new, rel_tol=0.05) for old, new in zip(before, now, strict=True))
        if stable or time.monotonic() >= deadline:
            return math.ceil(_MIN_SAMPLE_MS / min(now))
        before = now


def _latency(times: Sequence[float], singles: Sequence[float]) -> Latency:
    lower, upper = np.percentile(times, [25, 75])
    median = median_interval(times)
    tail = {name: percentile(singles, share) for name, share in PERCENTILES.items()} if singles else {}
    return Latency(median.median, median.low, median.high, float(upper - lower), tail)


def _quantiles(times: Sequence[float]) -> tuple[float, ...]:
    """The distribution: quantiles from 0 to 100 % in `QUANTILES` steps, rounded to nanoseconds."""
    return tuple(np.percentile(times, np.linspace(0, 100, QUANTILES + 1)).round(6).tolist())


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    return median_interval([a / b for a, b in zip(numerators, denominators, strict=True)])
