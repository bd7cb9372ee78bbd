"""What a gated run costs: beside the build before gates were read off the graph, and beside training the full network.

Reads ../shared. ResNet-20 from its public weights, half of the MACs, ten epochs over a fifth of CIFAR-10 (seconds grow
with the images, so ratios stay), teacher included, one thread; each run is the command, up to its training stage, and
the other build a checkout that sees the same libraries. One at a time: keep the machine quiet. A quarter of an hour.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.bar_choice import OLD, checkout
from benchmarks.common import ROOT, SHARED, write_result
from tests.support.shared import cifar_folder

EPOCHS = 10
IMAGES = 10_000


def main() -> int:
    """Run the bars; 0 if all are met."""
    if not SHARED.is_dir():
        print("skipped: no data and weights in ../shared")
        return 0
    with tempfile.TemporaryDirectory() as folder, checkout(OLD) as old:
        work = Path(folder)
        data = cifar_folder(work, "cifar10", IMAGES, 500)
        given = ("--full-weights", str(SHARED / "models" / "resnet20.npz"), "--budget")
        runs = {
            "before": train(old, work / "before", data, "gates", *given, "macs=0.5"),
            "gated": train(ROOT, work / "gated", data, "gates", *given, "macs=0.5"),
            "gated_latency": train(ROOT, work / "latency", data, "gates", *given, "latency=0.5"),
            "full": train(ROOT, work / "full", data, "full"),
        }
    amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    after_freeze = runs["gated"]["epoch_after_freeze"] / runs["before"]["epoch_after_freeze"]
    whole = runs["gated"]["seconds"] / runs["before"]["seconds"]
    beside_full = runs["gated"]["seconds"] / runs["full"]["seconds"]
    least, most = (0.4, 0.5) if amx else (0.65, 0.75)
    bars = {
        f"an epoch after the freeze takes at most {least} of before": after_freeze <= least,
        f"the gated run takes at most {most} of before": whole <= most,
        "the gated run takes at most 0.9 of training the full network as long": beside_full <= 0.9,
    }
    latency_beside_full = runs["gated_latency"]["seconds"] / runs["full"]["seconds"]  # no bar: for comparison
    ratios = {"after_freeze": after_freeze, "whole": whole, "beside_full": beside_full}
    ratios |= {"latency_beside_full": latency_beside_full}
    return write_result(
        "training-cost",
        bars,
        {"amx": amx, "images": IMAGES, "ratios": {k: round(v, 3) for k, v in ratios.items()}, "runs": runs},
    )


def train(package: Path, out: Path, data: Path, stage: str, *arguments: str) -> dict[str, Any]:
    """Train with one build; seconds of each epoch, all of them together, and of one after the freeze (median)."""
    recipe = str(ROOT / "benchmarks" / "cifar10-resnet20.yaml")
    command = [sys.executable, "-m", "polar_deploy.pipeline", "--recipe", recipe, "--data-dir", str(data)]
    command += ["--epochs", str(EPOCHS), "--out", str(out), "--until", stage, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=package, env=environment, stdout=subprocess.DEVNULL, check=True)
    log = out / ("full" if stage == "full" else "gated") / "training.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    frozen = next((each["epoch"] for each in records if "freeze" in each), None)
    seconds = [each["seconds"] for each in records]
    later = [each["seconds"] for each in records if frozen is not None and each["epoch"] > frozen]
    return {
        "seconds": round(sum(seconds), 1),
        "epochs": seconds,
        "frozen_in_epoch": frozen,
        "epoch_after_freeze": statistics.median(later) if later else None,
        "val_score": records[-1]["val_accuracy" if package != ROOT else "val_score"],  # as that build names it
    }


if __name__ == "__main__":
    sys.exit(main())
