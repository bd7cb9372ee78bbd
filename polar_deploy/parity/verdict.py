"""When the compressed engine counts as good: pass, fail or undecided, each with its reason in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from polar_deploy.config import Verdict
from polar_deploy.engines import timing
from polar_deploy.parity.tally import Tally

Result = Literal["pass", "fail", "undecided"]

EXIT_CODES: dict[Result, int] = {"pass": 0, "fail": 1, "undecided": 5}


@dataclass(frozen=True)
class Judgement:
    """One answer with its reason, one sentence."""

    result: Result
    reason: str


def exit_code(parity: dict[str, Any]) -> int:
    """The command's exit code for the content of parity.json: 0 passed, 1 failed, 5 undecided."""
    result: Result = parity["verdict"]["overall"]["result"]
    return EXIT_CODES[result]


def judge(
    tally: Tally,
    timings: Sequence[timing.Timing],
    verdict: Verdict,
    precision: Mapping[str, Tally] | None = None,
) -> dict[str, Any]:
    """The verdict: accuracy, latency and both together, each pass, fail or undecided with its reason.

    Args:
        tally: the compressed engine against the full engine.
        timings: one a batch size, the verdict's among them.
        verdict: what is asked.
        precision: each engine, "full" and "compressed", against its own FP32 graph.
    """
    at_batch = next(result for result in timings if result.batch == verdict.batch)
    return _document(judge_accuracy(tally, verdict, precision), judge_latency(at_batch, verdict), verdict)


def judge_not_run(lack: str, pruning: Tally, verdict: Verdict) -> dict[str, Any]:
    """The verdict on engines that cannot run here: undecided, whatever their graphs do elsewhere.

    Args:
        lack: what this machine lacks.
        pruning: the FP32 graph of the compressed network against that of the full one, in ONNX Runtime.
        verdict: what is asked.
    """
    built = f"built, not run here ({lack})"
    accuracy = Judgement("undecided", f"{built}; as FP32 graphs in ONNX Runtime, {_change(pruning.drop)}")
    return _document(accuracy, Judgement("undecided", built), verdict)


def judge_accuracy(tally: Tally, verdict: Verdict, precision: Mapping[str, Tally] | None = None) -> Judgement:
    """Pass if at most `max_drop` points are lost to pruning, and to the precision, and no logit is NaN or Inf.

    Two engines that the precision ruins alike would agree with each other, and a ruined full engine is easily matched:
    so what the precision costs each of them is held against the bound, too.
    """
    broken = {"full": tally.full_nonfinite, "compressed": tally.compressed_nonfinite}
    for name, count in broken.items():
        if count:
            return Judgement("fail", f"the {name} engine gives NaN or Inf on {count} of {tally.samples} test images")
    change = _change(tally.drop)
    if tally.drop > verdict.max_drop:
        return Judgement("fail", f"{change}, only {verdict.max_drop:g} is allowed")
    for name, loss in (precision or {}).items():
        if loss.drop > verdict.max_drop:
            cost = f"its precision costs the {name} engine {loss.drop:.2f} points against its own FP32 graph"
            return Judgement("fail", f"{cost}, only {verdict.max_drop:g} is allowed")
    return Judgement("pass", f"{change}, a drop of {verdict.max_drop:g} is allowed")


def judge_latency(result: timing.Timing, verdict: Verdict) -> Judgement:
    """Judge the speed-up, and the latency itself where a bound is set: pass if the whole interval is within."""
    parts = [_speedup(result, verdict)]
    if verdict.max_latency_ms is not None:
        parts.append(_within(result, verdict.max_latency_ms))
    judged = together(*parts)
    throttled = result.best.throttled
    return (
        Judgement(judged.result, f"{judged.reason}; the GPU throttled ({', '.join(throttled)})")
        if throttled
        else judged
    )


def _speedup(result: timing.Timing, verdict: Verdict) -> Judgement:
    speedup, place = result.best.speedup, f"at batch {result.batch}"
    if not result.decided:
        off = f"{100 * result.best.noise:.1f} %, over {100 * timing.NOISE:g} %"
        return Judgement("undecided", f"the machine is too noisy: two copies of one engine differ by {off}, {place}")
    measured = f"the speed-up {place} is {speedup.median:.3f} (95 %: {speedup.low:.3f} to {speedup.high:.3f})"
    if speedup.low >= verdict.min_speedup:
        return Judgement("pass", f"{measured}, {verdict.min_speedup:g} is asked")
    if speedup.high < verdict.min_speedup:
        return Judgement("fail", f"{measured}, below the {verdict.min_speedup:g} asked")
    return Judgement("undecided", f"{measured}, too close to the {verdict.min_speedup:g} asked to tell")


def _within(result: timing.Timing, bound: float) -> Judgement:
    latency = result.best.b
    measured = (
        f"an inference at batch {result.batch} takes {latency.median_ms:.3g} ms "
        f"(95 %: {latency.low_ms:.3g} to {latency.high_ms:.3g})"
    )
    if latency.high_ms <= bound:
        return Judgement("pass", f"{measured}, {bound:g} ms are allowed")
    if latency.low_ms > bound:
        return Judgement("fail", f"{measured}, only {bound:g} ms are allowed")
    return Judgement("undecided", f"{measured}, too close to the {bound:g} ms allowed to tell")


def _document(accuracy: Judgement, latency: Judgement, verdict: Verdict) -> dict[str, Any]:
    return {
        **verdict.model_dump(),
        "accuracy": asdict(accuracy),
        "latency": asdict(latency),
        "overall": asdict(together(accuracy, latency)),
    }


def together(*parts: Judgement) -> Judgement:
    """All in one: any fail fails, else any undecided is undecided; the reason is that of the parts that decided."""
    result: Result
    for result in ("fail", "undecided"):
        reasons = [part.reason for part in parts if part.result == result]
        if reasons:
            return Judgement(result, "; ".join(dict.fromkeys(reasons)))
    return Judgement("pass", "; ".join(part.reason for part in parts))


def _change(drop: float) -> str:
    return f"accuracy {'drops' if drop >= 0 else 'rises'} by {abs(drop):.2f} points"
