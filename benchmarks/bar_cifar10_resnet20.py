"""Real input: the public ResNet-20 for CIFAR-10, halved in 6 epochs on a CPU.

Reads ../shared (the data as lossless WebP strips, the weights as .npz); half an hour on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, SHARED, run_pipeline, write_result
from tests.support.shared import cifar_folder

FULL_TOP1 = (91.73, 0.05)  # what the weights' author reports, and the tolerance


def main() -> int:
    """Run the bars; 0 if all are met."""
    if not SHARED.is_dir():
        print("skipped: no data and weights in ../shared")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = cifar_folder(Path(folder), "cifar10")
        run = run_pipeline(
            Path(folder) / "run",
            *("--recipe", str(ROOT / "benchmarks" / "cifar10-resnet20.yaml")),
            *("--data-dir", str(data), "--full-weights", str(SHARED / "models" / "resnet20.npz")),
        )
    report = run["report"]
    passed = report["verdict"]["overall"]["result"]
    bars = {
        "full network scores 91.73 +- 0.05": abs(report["accuracy"]["full"] - FULL_TOP1[0]) <= FULL_TOP1[1],
        "0.49 <= MACs <= 0.50 of full": 0.49 <= report["macs"]["ratio"] <= 0.5,
        "gated and compressed ONNX agree to 1e-5 of the scale": run["surgery"]["relative_difference"] <= 1e-5,
        "exit code tells the verdict": run["exit_code"] == {"pass": 0, "fail": 1, "undecided": 5}[passed],
    }
    return write_result("cifar10-resnet20", bars, {"run": run})


if __name__ == "__main__":
    sys.exit(main())
