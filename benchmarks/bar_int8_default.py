"""What a user of ort-int8 gets by default: the compressed INT8 engine beside the full INT8 engine, at batch 1.

    python -m benchmarks.bar_int8_default

Reads ../shared. ResNet-20 from its public weights on CIFAR-10, no budget given. About twelve minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, SHARED, report_of, run_pipeline, write_result
from tests.support.shared import cifar_folder

SPEEDUP = 1.4  # the bar


def main() -> int:
    """Run the bar; 0 if it is met."""
    if not SHARED.is_dir():
        print("skipped: no data and weights in ../shared")
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given = ("--recipe", str(ROOT / "benchmarks/cifar10-resnet20.yaml"), "--target", "ort-int8")
        weights = ("--full-weights", str(SHARED / "models/resnet20.npz"))
        run = run_pipeline(folder / "run", *given, *weights, "--data-dir", str(cifar_folder(folder, "cifar10")))
    speedup = next(each["speedup"] for each in report_of(run)["latency"] if each["batch"] == 1)
    bars = {
        f"ort-int8, ResNet-20, default budget: >= {SPEEDUP}x at batch 1: {speedup['median']:.2f}x": (
            speedup["median"] >= SPEEDUP
        )
    }
    return write_result("int8-default", bars, run)


if __name__ == "__main__":
    sys.exit(main())
