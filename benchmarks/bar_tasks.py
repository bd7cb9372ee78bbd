"""Segmentation and detection as a new user tries them: a folder of 200 pictures, a network of one's own, one command.

The pictures are made: discs and squares in noise, with masks, and with boxes as COCO lays them out. Both bundles are
verified in an environment of the core and ONNX Runtime alone, which pip makes: so it needs a package index.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import edge_environment, run_pipeline, verify_bundle, write_result
from tests.support import objects, shapes

PICTURES, BUDGET, MOST_LOST = 200, 0.6, 5.0
COMMON = ("--budget", f"macs={BUDGET}", "--max-drop", str(MOST_LOST), "--epochs", "40", "--batch", "1,8,64")
COMMON = (*COMMON, "--set", "input_size=64", "--set", "training.crop_scale=1", "--set", "training.crop_padding=6")
TASKS = {"segmentation": "tests.support.shapes:unet", "detection": "tests.support.objects:detector"}
LEAST = {"segmentation": 80.0, "detection": 60.0}  # of the full network, so that there is something to lose


def main() -> int:
    """Run the bars; 0 if all are met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes.paint(folder / "masks", PICTURES)
        objects.draw(folder / "boxes", PICTURES)
        data = {"segmentation": "pairs:masks", "detection": "coco:boxes"}
        python, packages = edge_environment(folder / "environment")
        figures = {task: _tried(folder / task, task, data[task], python) for task in TASKS}
    bars = {"no torch in the environment that verifies": "torch" not in packages}
    for task, found in figures.items():
        metric, accuracy = found["metric"]["name"], found["accuracy"]
        bars |= {
            f"{task}: {metric} of the full network is {LEAST[task]:g} % or more": accuracy["full"] >= LEAST[task],
            f"{task}: at most {MOST_LOST:g} points are lost": accuracy["drop"] <= MOST_LOST,
            f"{task}: faster at batch 64": found["speedup"]["64"]["low"] > 1,
            f"{task}: the bundle is verified without torch": found["verify_no_timing"]["exit_code"] == 0,
            f"{task}: and timed there, faster again": found["verify"]["exit_code"] == 0,
        }
    return write_result("tasks", bars, {"packages": packages, **figures})


def _tried(folder: Path, task: str, data: str, python: Path) -> dict[str, Any]:
    """One run, and its bundle verified on the other side."""
    where = ("--data", data, "--data-dir", str(folder.parent))
    run = run_pipeline(folder, "--task", task, "--model", TASKS[task], *where, *COMMON)
    report = run["report"]
    if report is None or not (folder / "bundle").is_dir():
        raise SystemExit(f"{task}: no bundle, exit code {run['exit_code']}")
    kept = ("metric", "accuracy", "macs", "params", "bytes", "training", "verdict")
    return {
        "command": run["command"],
        "exit_code": run["exit_code"],
        "seconds": run["seconds"],
        **{key: report[key] for key in kept},
        "speedup": {str(each["batch"]): each["speedup_with_noise"] for each in report["latency"]},
        "verify_no_timing": verify_bundle(python, folder / "bundle", "--no-timing"),
        "verify": verify_bundle(python, folder / "bundle"),
    }


if __name__ == "__main__":
    sys.exit(main())
