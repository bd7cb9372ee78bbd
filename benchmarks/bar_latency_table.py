"""The latency table predicts what networks take that were never measured: some widths, some blocks closed.

    python -m benchmarks.bar_latency_table

On ort-fp32: a table of ResNet-56 is made, then ten networks are drawn (a width in steps of 8 for each site, residual
streams included, each block closed with some probability), cut by surgery, built and timed in pairs against the whole
network. The weights are untrained, which latency does not depend on. The prediction is that of the cost which the gates
are chosen by. The same of ResNet-20, and of torchvision's ResNet-50, in whose blocks layers depend on two widths, is
recorded without a bar. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import write_result
from polar_deploy import latency, models, targets
from polar_deploy.costs import Cost, State
from polar_deploy.engines import table
from polar_deploy.export import Example
from polar_deploy.gating.analysis import analyse
from polar_deploy.gating.deploy import write_open
from polar_deploy.gating.latency import latency_cost
from polar_deploy.surgery.choices import Choices
from polar_deploy.tasks.classification import classifier

TARGET = "ort-fp32"
NETWORKS = {"resnet56": 32, "resnet20": 32, "resnet50": 64}  # and pixels a side
PATTERNS = 10
MEAN_ERROR, RANKS, SECONDS = 0.10, 0.9, 60.0  # the bars


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS), help="resnet56, which is judged, and others")
    names = parser.parse_args().networks.split(",")
    figures = {name: examine(name, NETWORKS[name]) for name in names}
    judged = figures["resnet56"]
    bars = {
        f"ResNet-56 on {TARGET}: mean error of the prediction <= 10 %: {judged['mean_error']:.1%}": (
            judged["mean_error"] <= MEAN_ERROR
        ),
        f"ResNet-56 on {TARGET}: rank correlation >= 0.9: {judged['rank_correlation']:.3f}": (
            judged["rank_correlation"] >= RANKS
        ),
        f"ResNet-56 on {TARGET}: the table takes <= 60 s: {judged['seconds']:.0f} s": judged["seconds"] <= SECONDS,
    }
    return write_result("latency-table", bars, {"target": TARGET, "batch": 1, "networks": figures})


def examine(name: str, size: int) -> dict[str, Any]:
    """Make the table of a network, and hold its predictions against measurements."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        gated = folder / "gated.onnx"
        choices = export_open(name, size, gated)
        shown = partial(print, f"{name}:", flush=True)
        measured = table.measure(gated, targets.parse(TARGET), on_progress=shown)
        document = measured.as_json()
        measured.write(folder / "latency-table.json")
        read = latency.read(folder / "latency-table.json", TARGET)
        cost = latency_cost(read, choices)
        bench = table.Bench(gated, folder, targets.parse(TARGET))
        random = np.random.default_rng(0)
        rows = [judge(bench, choices, cost, draw(choices, random)) for _ in range(PATTERNS)]
    predicted, measured = ([row[key] for row in rows] for key in ("predicted_ms", "measured_ms"))
    return {
        "mean_error": statistics.mean(row["error"] for row in rows),
        "worst_error": max(row["error"] for row in rows),
        "rank_correlation": statistics.correlation(_ranks(predicted), _ranks(measured)),
        "full_ms": read.full_ms,
        "seconds": document["seconds"],
        "engines": document["engines"],
        "noise": document["noise"],
        "patterns": rows,
    }


def export_open(name: str, size: int, path: Path) -> Choices:
    """Write an untrained network with all gates open; returns its gates."""
    torch.manual_seed(0)
    network = models.build(name, classifier(10, size)).eval()
    analysis = analyse(network, Example.of(torch.zeros(2, 3, size, size)))
    write_open(network, analysis, path)
    return analysis.choices


def draw(choices: Choices, random: np.random.Generator) -> State:
    """A network: widths are multiples of 8, how likely blocks close varies."""
    closing = random.uniform(0, 0.6)
    widths = tuple(int(random.choice([*range(8, site.width, 8), site.width])) for site in choices.sites)
    blocks = random.random(len(choices.blocks)) >= closing
    for needed in choices.alive:
        if not blocks[list(needed)].any():
            blocks[min(needed)] = True
    return State(widths, tuple(blocks.tolist()))


def judge(bench: table.Bench, choices: Choices, cost: Cost, state: State) -> dict[str, Any]:
    """Prediction and measurement of one network; the measurement is a ratio to the whole network, timed in pairs."""
    opened = {site.name: width for site, width in zip(choices.sites, state.widths, strict=True)}
    opened |= {block.name: int(kept) for block, kept in zip(choices.blocks, state.blocks, strict=True)}
    predicted = cost.absolute(state)
    measured = cost.full * (1 - bench.saved(opened))
    return {
        "predicted_ms": round(predicted, 4),
        "measured_ms": round(measured, 4),
        "error": round(abs(predicted / measured - 1), 4),
        "noise": round(bench.rounds[-1].noise, 4),
        "blocks_closed": state.blocks.count(False),
    }


def _ranks(values: list[float]) -> list[float]:
    ranks: list[float] = np.argsort(np.argsort(values)).astype(float).tolist()
    return ranks


if __name__ == "__main__":
    sys.exit(main())
