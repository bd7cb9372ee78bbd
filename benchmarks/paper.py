"""The paper's claim: half of the connections go, in MACs and in parameters, for less than a point of accuracy.

    python -m benchmarks.paper cifar10 --seeds 0,1 --work FOLDER [--set training.amp=bf16]

Reads ../shared. ResNet-20, 40 epochs, one thread: from the public weights on CIFAR-10, from a full network that trains
as long on CIFAR-100. A run is the command itself, as far as its verdict. It takes two hours of a core without bfloat16,
and goes on in the same folder if it was stopped; seeds can run side by side, one call each, and the call for all of
them sums up. `benchmarks/results/paper-DATA.json`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.common import ROOT, SHARED, report_of, run_pipeline, write_result
from tests.support.shared import cifar_folder

WEIGHTS = {"cifar10": SHARED / "models" / "resnet20.npz"}
MOST_LOST = 1.0  # points, in the mean over the seeds
SEEDS = 2


def main() -> int:
    """Run what is not there yet; 0 if the claim holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("cifar10", "cifar100"))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--set", action="append", default=[], help="settings of all runs")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        print("skipped: no data and weights in ../shared")
        return 0
    data = arguments.work / arguments.data
    if not (data / "test.npz").is_file():
        cifar_folder(arguments.work, arguments.data)
    given = ("--recipe", str(ROOT / "benchmarks" / f"paper-{arguments.data}.yaml"), "--data-dir", str(data))
    for each in arguments.set:
        given += ("--set", each)
    if arguments.data in WEIGHTS:
        given += ("--full-weights", str(WEIGHTS[arguments.data]))
    seeds = arguments.seeds.split(",")
    folders = {seed: arguments.work / f"{arguments.data}-{seed}" for seed in seeds}
    runs = {seed: run_pipeline(folder, *given, "--seed", seed) for seed, folder in folders.items()}
    reports = [report_of(run) for run in runs.values()]
    drop = statistics.mean(each["accuracy"]["drop"] for each in reports)
    bars = {
        f"{SEEDS} seeds or more": len(runs) >= SEEDS,
        "at most half of the MACs left": all(each["macs"]["ratio"] <= 0.5 for each in reports),
        "at most half of the parameters left": all(each["params"]["ratio"] <= 0.5 for each in reports),
        f"less than {MOST_LOST} points lost, in the mean": drop < MOST_LOST,
    }
    return write_result(f"paper-{arguments.data}", bars, {"drop": round(drop, 3), "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
