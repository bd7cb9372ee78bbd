"""When the compressed engine counts as good: pass, fail or undecided, each with its reason in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from polar_deploy.config import AcceptanceCriteria
from polar_deploy.documents.parity import NOISE, Judged, Judgement, Percentile, Percentiles, Result
from polar_deploy.engines import timing
from polar_deploy.parity.paired import Paired
from polar_deploy.tasks.accuracy import Z95
from polar_deploy.tasks.metric import signed


def judge(
    pair: Paired | None,
    timings: Sequence[timing.Timing],
    criteria: AcceptanceCriteria,
    precision: Mapping[str, Paired | None] | None = None,
) -> Judged:
    """The verdict: accuracy, latency and both together, each pass, fail or undecided with its reason.

    Args:
        pair: the compressed engine against the full engine; None: the task has no metric.
        timings: one a batch size, the verdict's among them.
        criteria: what is asked.
        precision: each engine, "full" and "compressed", against its own FP32 graph.
    """
    at_batch = next(result for result in timings if result.batch == criteria.batch)
    return _document(judge_accuracy(pair, criteria, precision), judge_latency(at_batch, criteria), criteria)


def judge_not_run(lack: str, pruning: Paired | None, criteria: AcceptanceCriteria) -> Judged:
    """The verdict on engines that cannot run here: undecided, whatever their graphs do elsewhere.

    Args:
        lack: what this machine lacks.
        pruning: the FP32 graph of the compressed network against that of the full one, in ONNX Runtime.
        criteria: what is asked.
    """
    built = f"built, not run here ({lack})"
    change = f"; as FP32 graphs in ONNX Runtime, {_change(pruning)}" if pruning else ""
    return _document(Judgement("undecided", f"{built}{change}"), Judgement("undecided", built), criteria)


def judge_accuracy(
    pair: Paired | None, criteria: AcceptanceCriteria, precision: Mapping[str, Paired | None] | None = None
) -> Judgement:
    """Pass if at most `max_drop` is lost to pruning, and to the precision, and no output is NaN or Inf.

    A test of non-inferiority: pass if the drop's whole 95 % interval lies within `max_drop`, so that a network that
    loses more passes in 2.5 % of cases; fail if none of it does; between, too few samples. Each network has to be
    better than chance. Two engines that the precision ruins alike would agree with each other, and a ruined full engine
    is easily matched: so what the precision costs each of them is held against the bound, too. Where the task has no
    metric, nothing says which outputs are good enough.
    """
    if pair is None:
        return Judgement("undecided", "the task has no metric: outputs were compared, and nobody knows what is enough")
    for name, samples in pair.nonfinite.items():
        if samples:
            return Judgement("fail", f"the {name} engine gives NaN or Inf on {samples} of {pair.samples} test samples")
    pruning = _within_drop(pair, _change(pair), criteria, rises=pair.drop < 0)
    parts = [pruning, *_better_than_chance(pair)]
    parts.extend(_precision(precision or {}, criteria))
    judged = combine(*parts)
    return pruning if judged.result == "pass" else judged


def _precision(losses: Mapping[str, Paired | None], criteria: AcceptanceCriteria) -> list[Judgement]:
    """Hold what the precision costs each engine against the bound; what is the same for both is said once."""
    alike: dict[tuple[float, tuple[float, float], int], list[str]] = {}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    for name, loss in known.items():
        alike.setdefault((loss.drop, loss.interval, loss.samples), []).append(name)
    judgements = []
    for names in alike.values():
        loss = known[names[0]]
        engines = f"the {names[0]} engine" if len(names) == 1 else "either engine"
        lost = f"{loss.drop:.2f} {loss.metric.difference_unit}".rstrip()
        cost = f"the precision costs {engines} {lost} against its own FP32 graph"
        judgements.append(_within_drop(loss, cost, criteria))
    return judgements


def _within_drop(pair: Paired, change: str, criteria: AcceptanceCriteria, *, rises: bool = False) -> Judgement:
    """Hold a drop against `max_drop`; `change` says what it is, or by how much the score `rises`."""
    low, high = pair.interval
    asked = criteria.max_drop
    if criteria.accuracy_rule == "point":
        low = high = pair.drop
    else:
        ends = (-high, -low) if rises else (low, high)
        change = f"{change} (95 %: {signed(ends[0])} to {signed(ends[1])})"
    if not math.isfinite(pair.drop):
        return Judgement("undecided", f"{pair.metric.name} is not known of these {pair.samples:,} test samples")
    if high <= asked:
        return Judgement("pass", f"{change}, a drop of {asked:g} is allowed")
    if low > asked:
        return Judgement("fail", f"{change}, only {asked:g} is allowed")
    needed = pair.samples_to_decide(asked)
    enough = f"some {_rounded_up(needed):,} would do" if needed else "no number would do"
    few = f"{pair.samples:,} test samples are too few to tell, {enough} if the drop stays the same"
    return Judgement("undecided", f"{change}, a drop of {asked:g} is allowed: {few}")


def _rounded_up(number: int) -> int:
    """Two digits of a number, and zeros."""
    step = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // step) * step


def _better_than_chance(pair: Paired) -> list[Judgement]:
    """Whether each network does better than one that knows nothing, where the metric tells what that would score.

    One-sided score test at 2.5 %; a test set on which that one is always right tells nothing.
    """
    chance = pair.metric.chance(pair.full)
    if chance is None:
        return []
    expected, error = chance
    if error == 0 and expected > 0:
        reason = "an answer that never changes is right on all test samples: nothing can be learned from them"
        return [Judgement("undecided", reason)]
    parts = []
    for name, score in zip(("full", "compressed"), pair.scores, strict=True):
        own, best = (pair.metric.told(each, 2) for each in (score, expected))
        told = f"the {name} network: {own}; the best answer that never changes: {best}"
        if score <= expected:
            parts.append(Judgement("fail", f"{told}: it is no better than chance"))
        elif score - expected <= Z95 * error:
            parts.append(Judgement("undecided", f"{told}: too few samples to tell it from chance"))
    return parts


def judge_latency(result: timing.Timing, criteria: AcceptanceCriteria) -> Judgement:
    """Judge the speed-up, and the latency itself where a bound is set: pass if the whole interval is within."""
    parts = [_speedup(result, criteria)]
    if criteria.max_latency_ms is not None:
        parts.append(_within(result, criteria.max_latency_ms, criteria.latency_percentile))
    judged = combine(*parts)
    throttled = result.best.throttled
    return (
        Judgement(judged.result, f"{judged.reason}; the GPU throttled ({', '.join(throttled)})")
        if throttled
        else judged
    )


def singles_for(criteria: AcceptanceCriteria) -> int:
    """How many inferences to time one by one, so that the percentile that is asked has an upper end."""
    asked = criteria.latency_percentile
    if criteria.max_latency_ms is None or asked == "p50":
        return timing.SINGLES
    return max(timing.SINGLES, 2 * timing.singles_needed(timing.PERCENTILES[asked]))


def _speedup(result: timing.Timing, criteria: AcceptanceCriteria) -> Judgement:
    """Hold the speed-up against what is asked, the noise of the machine included in its interval."""
    speedup, noise, place = result.best.speedup_with_noise, result.best.noise, f"at batch {result.batch}"
    interval = f"95 %, with the noise of the machine: {speedup.low:.3f} to {speedup.high:.3f}"
    measured = f"the speed-up {place} is {speedup.median:.3f} ({interval})"
    if speedup.low >= criteria.min_speedup:
        return Judgement("pass", f"{measured}, {criteria.min_speedup:g} is asked")
    if speedup.high < criteria.min_speedup:
        return Judgement("fail", f"{measured}, below the {criteria.min_speedup:g} asked")
    if noise > NOISE:
        off = f"{100 * noise:.1f} %, over {100 * NOISE:g} %"
        return Judgement("undecided", f"the machine is too noisy: two copies of one engine differ by {off}, {place}")
    return Judgement("undecided", f"{measured}, too close to the {criteria.min_speedup:g} asked to tell")


def _within(result: timing.Timing, bound: float, percentile: Literal["p50"] | Percentiles) -> Judgement:
    """Hold a percentile of the compressed engine's latency against a bound in milliseconds."""
    latency, place = result.best.compressed, f"an inference at batch {result.batch}"
    if percentile == "p50":
        found = Percentile(latency.median_ms, latency.low_ms, latency.high_ms)
        name, needed = f"the median of {place}", 0
    else:
        found, name = latency.tail[percentile], f"{percentile} of {place}"
        needed = timing.singles_needed(timing.PERCENTILES[percentile])
    if found.low_ms > bound and found.high_ms is None:
        return Judgement("fail", f"{name} is above {found.low_ms:.3g} ms (95 %), only {bound:g} ms are allowed")
    if found.high_ms is None:
        few = f"too few samples, {result.best.singles}, for an upper end: {needed} are needed"
        return Judgement("undecided", f"{name} is {found.value_ms:.3g} ms, {few}")
    measured = f"{name} is {found.value_ms:.3g} ms (95 %: {found.low_ms:.3g} to {found.high_ms:.3g})"
    if found.high_ms <= bound:
        return Judgement("pass", f"{measured}, {bound:g} ms are allowed")
    if found.low_ms > bound:
        return Judgement("fail", f"{measured}, only {bound:g} ms are allowed")
    return Judgement("undecided", f"{measured}, too close to the {bound:g} ms allowed to tell")


def _document(accuracy: Judgement, latency: Judgement, criteria: AcceptanceCriteria) -> Judged:
    overall = combine(accuracy, latency)
    return Judged(**criteria.model_dump(), accuracy=accuracy, latency=latency, overall=overall)


def combine(*parts: Judgement) -> Judgement:
    """All in one: any fail fails, else any undecided is undecided; the reason is that of the parts that decided."""
    result: Result
    for result in ("fail", "undecided"):
        reasons = [part.reason for part in parts if part.result == result]
        if reasons:
            return Judgement(result, "; ".join(dict.fromkeys(reasons)))
    return Judgement("pass", "; ".join(part.reason for part in parts))


def _change(pair: Paired) -> str:
    change = f"{abs(pair.drop):.2f} {pair.metric.difference_unit}".rstrip()
    return f"{pair.metric.name} {'drops' if pair.drop >= 0 else 'rises'} by {change}"
