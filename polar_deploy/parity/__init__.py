"""Is the compressed engine as good as the full one, and is it faster? What parity.json holds.

Three comparisons, told apart: the compressed engine against the full one (the verdict), each engine against its own
FP32 graph (what the precision costs), and the graphs against PyTorch and each other (what export and surgery cost).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polar_deploy.config import AcceptanceCriteria
from polar_deploy.data.arrays import read_npz
from polar_deploy.documents import parity as documents
from polar_deploy.documents.parity import (
    EXIT_CODES,
    BatchLatency,
    Compared,
    Export,
    Judged,
    Judgement,
)
from polar_deploy.documents.part import Pair
from polar_deploy.engines import Array, Engine, infer_all, machine, timing
from polar_deploy.errors import ContentError
from polar_deploy.parity.paired import Comparison, Gap, Paired
from polar_deploy.parity.verdict import (
    combine,
    judge,
    judge_accuracy,
    judge_latency,
    judge_not_run,
    singles_for,
)
from polar_deploy.tasks import Metric, Samples
from polar_deploy.tensors import Arrays, count, take

__all__ = [
    "EXIT_CODES",
    "Comparison",
    "Gap",
    "Graphs",
    "Judgement",
    "Paired",
    "batch_latency",
    "combine",
    "compare",
    "compare_all",
    "export_loss",
    "judge",
    "judge_accuracy",
    "judge_latency",
    "judge_not_run",
    "not_run",
    "singles_for",
]

GRAPH_SAMPLES = 10_000  # of the test set at most, for comparisons with the FP32 graphs, which run on the CPU
_BATCH = 128  # samples an inference, for accuracy
# Seconds and rounds at a batch size that is only told: 600 single inferences of 64 samples, five times, take minutes.
_NOT_JUDGED = (1.0, 8.0), 2
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
        reference: `gated/reference.npz`: `inputs/NAME`, and PyTorch's outputs `full/NAME` and `gated/NAME`.
    """

    full: Engine
    compressed: Engine
    gated: Engine
    reference: Path

    def named(self) -> dict[str, Engine]:
        """By the names that the comparisons have for them."""
        return {"full onnx": self.full, "compressed onnx": self.compressed, "gated onnx": self.gated}


def compare(
    full: Engine,
    compressed: Engine,
    test: Samples,
    metric: Metric | None,
    criteria: AcceptanceCriteria,
    *,
    graphs: Graphs | None = None,
    batches: Iterable[int] = (1, 64),
) -> Compared:
    """Compare two engines on the whole test set and on the clock.

    Args:
        full, compressed: the engines.
        test: the test set.
        metric: what its samples are judged by; None: outputs are compared, and accuracy stays undecided.
        criteria: when the compressed engine counts as good.
        graphs: the FP32 graphs; None leaves out what is compared with them.
        batches: batch sizes to time, beside the verdict's own.

    Raises:
        ContentError: an empty test set, inputs that do not fit the network, a reference that is not one.
        UsageError: no such reference.
    """
    found = compare_all({"full": full, "compressed": compressed}, graphs.named() if graphs else {}, test, metric)
    rows = np.arange(max({*batches, criteria.batch})) % len(test)
    singles = singles_for(criteria)
    timings, latency = [], []
    for size in sorted({*batches, criteria.batch}):
        seconds, tries = (timing.SECONDS, timing.MAX_ROUNDS) if size == criteria.batch else _NOT_JUDGED
        inputs = test.read(rows[:size])[0]
        timings.append(timing.compare(full, compressed, inputs, seconds=seconds, max_rounds=tries, singles=singles))
        latency.append(batch_latency(full, compressed, inputs, timings[-1]))
    precision = {name: found[name].paired for name in ("full", "compressed")} if graphs else None
    return _compared(
        None, found, metric, graphs, latency, judge(found["accuracy"].paired, timings, criteria, precision)
    )


def not_run(lack: str, test: Samples, metric: Metric | None, criteria: AcceptanceCriteria, graphs: Graphs) -> Compared:
    """The same for engines that cannot run here: what their FP32 graphs say, and no more.

    Args:
        lack: what this machine lacks.
        test: the test set.
        metric: as for `compare`.
        criteria: what is asked.
        graphs: the FP32 graphs.

    Raises:
        As `compare`.
    """
    found = compare_all({}, graphs.named(), test, metric)
    verdict = judge_not_run(lack, found["pruning"].paired, criteria)
    return _compared(f"built, not run here: {lack}", found, metric, graphs, [], verdict)


def export_loss(graphs: Graphs) -> Export:
    """Compare both exported graphs with what PyTorch gave for the same inputs: the relative difference of each."""
    arrays = read_npz(graphs.reference)
    parts: dict[str, dict[str, Array]] = {"inputs": {}, "full": {}, "gated": {}}
    for key, values in arrays.items():
        part, _, name = key.partition("/")
        parts.get(part, {})[name] = values
    if lacking := next((part for part, each in parts.items() if not each), None):
        problem = f"{graphs.reference} has no arrays '{lacking}/…', only {', '.join(arrays) or 'nothing'}"
        raise ContentError(problem, "run again with --from export")
    off: dict[str, float | None] = {}
    for name, engine in (("full", graphs.full), ("gated", graphs.gated)):
        found, comparison = infer_all(engine, parts["inputs"]), Comparison(None)
        _require_same_shape(f"{graphs.reference}, '{name}'", parts[name], "the network", found)
        comparison.add(parts[name], found, {})
        off[name] = comparison.difference().relative_difference
    return Export(samples=count(parts["inputs"]), full=off["full"], gated=off["gated"])


def compare_all(
    engines: Mapping[str, Engine], graphs: Mapping[str, Engine], test: Samples, metric: Metric | None
) -> dict[str, Comparison]:
    """Run all over the test set, the graphs over `GRAPH_SAMPLES` of it; compare whatever pairs there are.

    Args:
        engines: "full" and "compressed", as far as they run here.
        graphs: FP32 graphs, as `Graphs.named` names them.
        test: the test set.
        metric: as for `compare`.

    Returns:
        "accuracy", the compressed engine against the full one, and what else `_GRAPHS` lists.
    """
    if len(test) == 0:
        raise ContentError("the test set is empty", "give it a test set with at least one sample")
    sampled = np.zeros(len(test), bool)
    sampled[np.random.default_rng(0).permutation(len(test))[:GRAPH_SAMPLES]] = True
    named = {*engines, *graphs}
    found = {name: Comparison(metric) for name, pair in (_ENGINES | _GRAPHS).items() if named.issuperset(pair)}
    for start in range(0, len(test), _BATCH):
        rows = np.arange(start, min(start + _BATCH, len(test)))
        (inputs, targets), chosen = test.read(rows), sampled[rows]
        outputs = {name: infer_all(engine, inputs) for name, engine in engines.items()}
        _add(found, _ENGINES, outputs, targets)
        if graphs and chosen.any():
            inputs, targets = take(inputs, chosen), take(targets, chosen)
            outputs = {name: take(each, chosen) for name, each in outputs.items()}
            outputs |= {name: infer_all(engine, inputs) for name, engine in graphs.items()}
            _add(found, _GRAPHS, outputs, targets)
    return found


def _add(
    found: Mapping[str, Comparison],
    pairs: Mapping[str, tuple[str, str]],
    outputs: Mapping[str, Arrays],
    targets: Arrays,
) -> None:
    for name, (reference, other) in pairs.items():
        if name in found:
            _require_same_shape(f"the {reference} network", outputs[reference], f"the {other} one", outputs[other])
            found[name].add(outputs[reference], outputs[other], targets)


def _compared(
    lack: str | None,
    found: Mapping[str, Comparison],
    metric: Metric | None,
    graphs: Graphs | None,
    latency: list[BatchLatency],
    verdict: Judged,
) -> Compared:
    engines, surgery = found.get("accuracy"), found.get("surgery")
    pair, pruning = engines.paired if engines else None, found["pruning"].paired if graphs else None
    losses = {name: found[name].loss() for name in ("full", "compressed")} if engines and graphs else None
    return Compared(
        schema=1,
        machine=machine.describe(),
        not_run=lack,
        metric=documents.Metric(name=metric.name, unit=metric.unit) if metric else None,
        accuracy=pair.accuracy() if pair else None,
        classes=pair.classes() if pair else None,
        worst_classes=pair.worst_classes() if pair else None,
        worst_samples=pair.worst_samples() if pair else None,
        precision=Pair(**losses) if losses else None,
        graphs=pruning.accuracy() if pruning else None,
        outputs=engines.difference() if engines else None,
        export=export_loss(graphs) if graphs else None,
        surgery=surgery.difference() if surgery else None,
        latency=latency,
        verdict=verdict,
    )


def batch_latency(full: Engine, compressed: Engine, inputs: Arrays, result: timing.Timing) -> BatchLatency:
    """One batch size in parity.json: every round, throughput and energy, with the engines by their names."""
    pair = {"full": (full, result.best.full), "compressed": (compressed, result.best.compressed)}
    return BatchLatency(
        batch=result.batch,
        decided=result.decided,
        different=result.different,
        chosen=result.chosen,
        rounds=list(result.rounds),
        images_per_second=Pair(
            **{name: 1000 * result.batch / latency.median_ms for name, (_, latency) in pair.items()}
        ),
        energy_mj=Pair(**{name: timing.energy(engine, inputs) for name, (engine, _) in pair.items()}),
    )


def _require_same_shape(first: str, one: Arrays, second: str, other: Arrays) -> None:
    shapes = [{name: list(values.shape) for name, values in outputs.items()} for outputs in (one, other)]
    if shapes[0] != shapes[1]:
        what = f"{first} gives outputs of shape {_listed(shapes[0])}, {second} of {_listed(shapes[1])}"
        raise ContentError(what, "compare networks of the same task; run export and surgery again")


def _listed(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
