"""Is the compressed engine as good as the full one, and is it faster? What parity.json holds, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polar_deploy.config import Triple, Verdict
from polar_deploy.data import Split, normalise
from polar_deploy.data.arrays import read_npz
from polar_deploy.engines import Array, Engine, machine, timing
from polar_deploy.errors import ContentError

Result = Literal["pass", "fail", "undecided"]

EXIT_CODES: dict[Result, int] = {"pass": 0, "fail": 1, "undecided": 5}
_BATCH = 128  # images an inference, for accuracy
_Z95 = 1.959964  # 97.5th percentile of the normal distribution


@dataclass(frozen=True)
class Judgement:
    """One answer with its reason, one sentence."""

    result: Result
    reason: str


@dataclass
class Tally:
    """What both engines answered over the test set. A sample with NaN or Inf in its logits counts as wrong."""

    samples: int = 0
    full_right: int = 0
    compressed_right: int = 0
    lost: int = 0  # right in the full engine alone
    gained: int = 0  # right in the compressed engine alone
    agreed: int = 0  # same answer, right or wrong
    full_nonfinite: int = 0  # samples
    compressed_nonfinite: int = 0

    def add(self, full: Array, compressed: Array, labels: npt.NDArray[np.int64]) -> None:
        """Count a batch: logits [B,classes] of both engines, labels [B]."""
        answers, others = _answers(full), _answers(compressed)
        right, other_right = answers == labels, others == labels
        self.samples += len(labels)
        self.full_right += int(right.sum())
        self.compressed_right += int(other_right.sum())
        self.lost += int((right & ~other_right).sum())
        self.gained += int((~right & other_right).sum())
        self.agreed += int(((answers == others) & (answers >= 0)).sum())
        self.full_nonfinite += int((answers < 0).sum())
        self.compressed_nonfinite += int((others < 0).sum())

    def as_dict(self) -> dict[str, Any]:
        """Accuracies and agreement in percent, drop and its paired 95 % interval in percentage points, counts."""
        share = 100 / self.samples
        return {
            "samples": self.samples,
            "full": self.full_right * share,
            "compressed": self.compressed_right * share,
            "drop": (self.lost - self.gained) * share,
            "interval": list(drop_interval(self.lost, self.gained, self.samples)),
            "agreement": self.agreed * share,
            "lost": self.lost,
            "gained": self.gained,
            "nonfinite": {"full": self.full_nonfinite, "compressed": self.compressed_nonfinite},
        }


@dataclass
class Gap:
    """Largest difference between two sets of logits, and the largest logit: what "relative" is measured by."""

    difference: float = 0.0
    scale: float = 0.0

    def add(self, reference: Array, other: Array) -> None:
        """Take in two arrays [B,classes]. Samples that are not finite in both are left out: `Tally` counts them."""
        finite = np.isfinite(reference).all(axis=1) & np.isfinite(other).all(axis=1)
        reference, other = reference[finite].astype(np.float64), other[finite].astype(np.float64)
        self.difference = max(self.difference, float(np.abs(reference - other).max(initial=0.0)))
        self.scale = max(self.scale, float(np.abs(reference).max(initial=0.0)))

    @property
    def relative(self) -> float | None:
        """Difference as a share of the scale; None where the scale is 0 and the difference is not."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.scale if self.scale else None


def compare(
    full: Engine,
    compressed: Engine,
    test: Split,
    *,
    mean: Triple,
    std: Triple,
    verdict: Verdict,
    gated: Engine | None = None,
    reference: Path | None = None,
    batches: Iterable[int] = (1, 64),
) -> dict[str, Any]:
    """Compare two engines on the whole test set and on the clock; return the content of parity.json.

    Args:
        full, compressed: the engines.
        test: the test set.
        mean, std: the input normalisation of both networks, a channel.
        verdict: when the compressed engine counts as good.
        gated: the gated ONNX file as an engine. Compared with the compressed engine on the test set, and with PyTorch.
        reference: `gated/reference.npz`: `inputs`, and the outputs `full` and `gated` of PyTorch. Needs `gated`.
        batches: batch sizes to time, beside the verdict's own.

    Raises:
        ContentError: an empty test set, images that do not fit the network, a reference that is not one.
        UsageError: no such reference.
    """
    count = len(test.labels)
    if count == 0:
        raise ContentError("the test set is empty", "give it a test set with at least one image")

    def batch_of(rows: npt.NDArray[np.int64]) -> Array:
        return normalise(test.images[rows], mean, std)

    tally, gap = Tally(), Gap()
    for start in range(0, count, _BATCH):
        rows = np.arange(start, min(start + _BATCH, count))
        images, labels = batch_of(rows), test.labels[rows]
        expected, logits = full.infer(images), compressed.infer(images)
        _require_same_shape("the full network", expected, "the compressed one", logits)
        tally.add(expected, logits, labels)
        if gated:
            reproduced = gated.infer(images)
            _require_same_shape("the gated network", reproduced, "the compressed one", logits)
            gap.add(reproduced, logits)
    export = export_loss(full, gated, reference) if gated and reference else None
    sizes = sorted({*batches, verdict.batch})
    timings = [timing.compare(full, compressed, batch_of(np.arange(size) % count)) for size in sizes]
    return {
        "schema": 1,
        "machine": machine.describe(),
        "accuracy": tally.as_dict(),
        "export": export,
        "surgery": {"relative_difference": gap.relative, "scale": gap.scale} if gated else None,
        "latency": [_latency(result) for result in timings],
        "verdict": judge(tally, timings, verdict),
    }


def exit_code(parity: dict[str, Any]) -> int:
    """The command's exit code for the content of parity.json: 0 passed, 1 failed, 5 undecided."""
    result: Result = parity["verdict"]["overall"]["result"]
    return EXIT_CODES[result]


def drop_interval(lost: int, gained: int, samples: int) -> tuple[float, float]:
    """95 % interval of the drop in percentage points, from the pairs that only one engine gets right.

    The adjusted Wald interval for matched pairs: half a sample more in each of the four cells, that is b = lost + 1/2,
    c = gained + 1/2, n = samples + 2; (b - c)/n +- z sqrt(b + c - (b - c)^2/n)/n. Near its nominal coverage also where
    there are few such pairs or none (Agresti and Min, Statistics in Medicine 24, 2005, pp. 729-740).
    """
    b, c, n = lost + 0.5, gained + 0.5, samples + 2
    half = _Z95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return 100 * max(-1.0, (b - c) / n - half), 100 * min(1.0, (b - c) / n + half)


def export_loss(full: Engine, gated: Engine, reference: Path) -> dict[str, Any]:
    """Compare both networks with what PyTorch gave for the same inputs: the relative difference of each."""
    arrays = read_npz(reference, "inputs", "full", "gated")
    result: dict[str, Any] = {"samples": len(arrays["inputs"])}
    for name, engine in (("full", full), ("gated", gated)):
        logits, expected = engine.infer(arrays["inputs"]), arrays[name]
        _require_same_shape(f"{reference}, '{name}'", expected, "the network", logits)
        gap = Gap()
        gap.add(expected, logits)
        result[name] = gap.relative
    return result


def judge(tally: Tally, timings: Sequence[timing.Timing], verdict: Verdict) -> dict[str, Any]:
    """The verdict: accuracy, latency and both together, each pass, fail or undecided with its reason."""
    at_batch = next(result for result in timings if result.batch == verdict.batch)
    accuracy, latency = judge_accuracy(tally, verdict), judge_latency(at_batch, verdict)
    return {
        **verdict.model_dump(),
        "accuracy": asdict(accuracy),
        "latency": asdict(latency),
        "overall": asdict(_overall(accuracy, latency)),
    }


def judge_accuracy(tally: Tally, verdict: Verdict) -> Judgement:
    """Pass if the drop on the whole test set is at most `max_drop` points and no logit is NaN or Inf."""
    broken = {"full": tally.full_nonfinite, "compressed": tally.compressed_nonfinite}
    for name, count in broken.items():
        if count:
            return Judgement("fail", f"the {name} engine gives NaN or Inf on {count} of {tally.samples} test images")
    drop = 100 * (tally.lost - tally.gained) / tally.samples
    change = f"accuracy {'drops' if drop >= 0 else 'rises'} by {abs(drop):.2f} points"
    if drop <= verdict.max_drop:
        return Judgement("pass", f"{change}, a drop of {verdict.max_drop:g} is allowed")
    return Judgement("fail", f"{change}, only {verdict.max_drop:g} is allowed")


def judge_latency(result: timing.Timing, verdict: Verdict) -> Judgement:
    """Pass if the whole interval of the speed-up reaches `min_speedup`, fail if none of it does."""
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


def _overall(accuracy: Judgement, latency: Judgement) -> Judgement:
    """Any fail fails, else any undecided is undecided; the reason is that of the parts that decided."""
    parts = (accuracy, latency)
    for result in ("fail", "undecided"):
        reasons = [part.reason for part in parts if part.result == result]
        if reasons:
            return Judgement(result, "; ".join(reasons))
    return Judgement("pass", "; ".join(part.reason for part in parts))


def _require_same_shape(first: str, one: Array, second: str, other: Array) -> None:
    if one.shape != other.shape:
        what = f"{first} gives outputs of shape {one.shape}, {second} of {other.shape}"
        raise ContentError(what, "compare networks of the same classes; run export and surgery again")


def _answers(logits: Array) -> npt.NDArray[np.int64]:
    """Class of each sample [B]; -1 where a logit is NaN or Inf."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


def _latency(result: timing.Timing) -> dict[str, Any]:
    """One batch size in parity.json: every round, with the engines by their names."""
    rounds = [asdict(measured) for measured in result.rounds]
    for measured in rounds:
        measured["full"], measured["compressed"] = measured.pop("a"), measured.pop("b")
    return {"batch": result.batch, "decided": result.decided, "chosen": result.chosen, "rounds": rounds}
