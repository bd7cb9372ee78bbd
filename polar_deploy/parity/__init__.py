"""Is the compressed engine as good as the full one, and is it faster? What parity.json holds.

Three comparisons, told apart: the compressed engine against the full one (the verdict), each engine against its own
FP32 graph (what the precision costs), and the graphs against PyTorch and each other (what export and surgery cost).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polar_deploy.config import AcceptanceCriteria, Triple
from polar_deploy.data import Split, normalise
from polar_deploy.data.arrays import read_npz
from polar_deploy.engines import Array, Engine, infer_all, machine, timing
from polar_deploy.errors import ContentError
from polar_deploy.parity.tally import Comparison, Gap, Tally, drop_interval
from polar_deploy.parity.verdict import (
    EXIT_CODES,
    Judgement,
    combine,
    exit_code,
    judge,
    judge_accuracy,
    judge_latency,
    judge_not_run,
    singles_for,
)

__all__ = [
    "EXIT_CODES",
    "Comparison",
    "Gap",
    "Graphs",
    "Judgement",
    "Tally",
    "TestSet",
    "combine",
    "compare",
    "compare_all",
    "drop_interval",
    "exit_code",
    "export_loss",
    "judge",
    "judge_accuracy",
    "judge_latency",
    "judge_not_run",
    "latency_document",
    "not_run",
    "singles_for",
]

GRAPH_IMAGES = 10_000  # of the test set at most, for comparisons with the FP32 graphs, which run on the CPU
_BATCH = 128  # images an inference, for accuracy
# What is compared: name -> (reference, other)
_ENGINES = {"accuracy": ("full", "compressed")}
_GRAPHS = {
    "full": ("full onnx", "full"),
    "compressed": ("compressed onnx", "compressed"),
    "pruning": ("full onnx", "compressed onnx"),
    "surgery": ("gated onnx", "compressed onnx"),
}


@dataclass(frozen=True)
class Graphs:
    """The FP32 ONNX graphs behind the engines, as engines of ONNX Runtime, and what PyTorch gave.

    Attributes:
        full, compressed: what the engines were built from.
        gated: the compressed network before surgery.
        reference: `gated/reference.npz`: `inputs`, and the outputs `full` and `gated` of PyTorch.
    """

    full: Engine
    compressed: Engine
    gated: Engine
    reference: Path

    def named(self) -> dict[str, Engine]:
        """By the names that the comparisons have for them."""
        return {"full onnx": self.full, "compressed onnx": self.compressed, "gated onnx": self.gated}


@dataclass(frozen=True)
class TestSet:
    """The test set as the networks see it: `mean` and `std` are their input normalisation, a channel."""

    __test__ = False  # no test of pytest's

    split: Split
    mean: Triple
    std: Triple

    def __len__(self) -> int:
        return len(self.split.labels)

    def images(self, rows: npt.NDArray[np.int64]) -> Array:
        """Normalised images [B,3,H,W]; `rows` may repeat."""
        return normalise(self.split.images[rows], self.mean, self.std)


def compare(
    full: Engine,
    compressed: Engine,
    test: TestSet,
    criteria: AcceptanceCriteria,
    *,
    graphs: Graphs | None = None,
    batches: Iterable[int] = (1, 64),
) -> dict[str, Any]:
    """Compare two engines on the whole test set and on the clock; return the content of parity.json.

    Args:
        full, compressed: the engines.
        test: the test set.
        criteria: when the compressed engine counts as good.
        graphs: the FP32 graphs; None leaves out what is compared with them.
        batches: batch sizes to time, beside the verdict's own.

    Raises:
        ContentError: an empty test set, images that do not fit the network, a reference that is not one.
        UsageError: no such reference.
    """
    found = compare_all({"full": full, "compressed": compressed}, graphs.named() if graphs else {}, test)
    rows = np.arange(max({*batches, criteria.batch})) % len(test)
    singles = singles_for(criteria)
    timings = [
        timing.compare(full, compressed, test.images(rows[:size]), singles=singles)
        for size in sorted({*batches, criteria.batch})
    ]
    tally = found["accuracy"].tally
    precision = {name: found[name].tally for name in ("full", "compressed")} if graphs else None
    return {
        **_head(None, found, graphs),
        "latency": [latency_document(full, compressed, test.images(rows[: each.batch]), each) for each in timings],
        "verdict": judge(tally, timings, criteria, precision),
    }


def not_run(lack: str, test: TestSet, criteria: AcceptanceCriteria, graphs: Graphs) -> dict[str, Any]:
    """The content of parity.json for engines that cannot run here: what their FP32 graphs say, and no more.

    Args:
        lack: what this machine lacks.
        test: the test set.
        criteria: what is asked.
        graphs: the FP32 graphs.

    Raises:
        As `compare`.
    """
    found = compare_all({}, graphs.named(), test)
    return {
        **_head(f"built, not run here: {lack}", found, graphs),
        "latency": [],
        "verdict": judge_not_run(lack, found["pruning"].tally, criteria),
    }


def export_loss(graphs: Graphs) -> dict[str, Any]:
    """Compare both exported graphs with what PyTorch gave for the same inputs: the relative difference of each."""
    arrays = read_npz(graphs.reference, "inputs", "full", "gated")
    result: dict[str, Any] = {"samples": len(arrays["inputs"])}
    for name, engine in (("full", graphs.full), ("gated", graphs.gated)):
        logits, expected = infer_all(engine, arrays["inputs"]), arrays[name]
        _require_same_shape(f"{graphs.reference}, '{name}'", expected, "the network", logits)
        gap = Gap()
        gap.add(expected, logits)
        result[name] = gap.relative
    return result


def compare_all(engines: Mapping[str, Engine], graphs: Mapping[str, Engine], test: TestSet) -> dict[str, Comparison]:
    """Run all over the test set, the graphs over `GRAPH_IMAGES` of it; compare whatever pairs there are.

    Args:
        engines: "full" and "compressed", as far as they run here.
        graphs: FP32 graphs, as `Graphs.named` names them.
        test: the test set.

    Returns:
        "accuracy", the compressed engine against the full one, and what else `_GRAPHS` lists.
    """
    if len(test) == 0:
        raise ContentError("the test set is empty", "give it a test set with at least one image")
    sampled = np.zeros(len(test), bool)
    sampled[np.random.default_rng(0).permutation(len(test))[:GRAPH_IMAGES]] = True
    named = {*engines, *graphs}
    found = {name: Comparison() for name, pair in (_ENGINES | _GRAPHS).items() if named.issuperset(pair)}
    for start in range(0, len(test), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(test)))
        images, labels, chosen = test.images(rows), test.split.labels[rows], sampled[rows]
        logits = {name: infer_all(engine, images) for name, engine in engines.items()}
        _add(found, _ENGINES, logits, labels)
        if graphs and chosen.any():
            logits = {name: values[chosen] for name, values in logits.items()}
            logits |= {name: infer_all(engine, images[chosen]) for name, engine in graphs.items()}
            _add(found, _GRAPHS, logits, labels[chosen])
    return found


def _add(
    found: Mapping[str, Comparison],
    pairs: Mapping[str, tuple[str, str]],
    logits: Mapping[str, Array],
    labels: npt.NDArray[np.int64],
) -> None:
    for name, (reference, other) in pairs.items():
        if name in found:
            _require_same_shape(f"the {reference} network", logits[reference], f"the {other} one", logits[other])
            found[name].add(logits[reference], logits[other], labels)


def _head(lack: str | None, found: Mapping[str, Comparison], graphs: Graphs | None) -> dict[str, Any]:
    """All of parity.json but latency and verdict; None where nothing was compared."""
    accuracy, surgery = found.get("accuracy"), found.get("surgery")
    return {
        "schema": 1,
        "machine": machine.describe(),
        "not_run": lack,
        "accuracy": accuracy.tally.as_dict() if accuracy else None,
        "classes": accuracy.tally.classes() if accuracy else None,
        "worst_classes": accuracy.tally.worst() if accuracy else None,
        "worst_samples": [asdict(each) for each in accuracy.tally.worst_samples] if accuracy else None,
        "precision": {name: found[name].as_dict() for name in ("full", "compressed")} if accuracy and graphs else None,
        "graphs": found["pruning"].tally.as_dict() if graphs else None,
        "export": export_loss(graphs) if graphs else None,
        "surgery": {"relative_difference": surgery.gap.relative, "scale": surgery.gap.scale} if surgery else None,
    }


def latency_document(full: Engine, compressed: Engine, images: Array, result: timing.Timing) -> dict[str, Any]:
    """One batch size in parity.json: every round, throughput and energy, with the engines by their names."""
    rounds = [asdict(measured) for measured in result.rounds]
    for measured in rounds:
        measured["full"], measured["compressed"] = measured.pop("a"), measured.pop("b")
        quantiles = measured.pop("a_quantiles_ms"), measured.pop("b_quantiles_ms")
        measured["quantiles_ms"] = dict(zip(("full", "compressed"), map(list, quantiles), strict=True))
    pair = {"full": (full, result.best.a), "compressed": (compressed, result.best.b)}
    return {
        "batch": result.batch,
        "decided": result.decided,
        "different": result.different,
        "chosen": result.chosen,
        "rounds": rounds,
        "images_per_second": {name: 1000 * result.batch / latency.median_ms for name, (_, latency) in pair.items()},
        "energy_mj": {name: timing.energy(engine, images) for name, (engine, _) in pair.items()},
    }


def _require_same_shape(first: str, one: Array, second: str, other: Array) -> None:
    if one.shape != other.shape:
        what = f"{first} gives outputs of shape {one.shape}, {second} of {other.shape}"
        raise ContentError(what, "compare networks of the same classes; run export and surgery again")
