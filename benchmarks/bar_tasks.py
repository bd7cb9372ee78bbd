"""Own pictures as a new user tries them: one command from a folder to a bundle, without code where they are classified.

The pictures are made: 240 of four classes in a folder each, for a network of torchvision; 200 of discs and squares in
noise, with masks, and with boxes as COCO lays them out, for networks of one's own. All bundles are verified in an
environment of the core and ONNX Runtime alone, which pip makes: so it needs a package index. Twenty minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import edge_environment, run_pipeline, verify_bundle, write_result
from tests.support import objects, shapes

OF_A_CLASS, PICTURES, BUDGET, MOST_LOST = 60, 200, 0.6, 5.0
COMMON = ("--budget", f"macs={BUDGET}", "--max-drop", str(MOST_LOST), "--batch", "1,8,64")
COMMON = (*COMMON, "--set", "input_size=64", "--set", "training.crop_scale=1", "--set", "training.crop_padding=6")
TASKS = {
    "classification": "resnet18",
    "segmentation": "tests.support.shapes:unet",
    "detection": "tests.support.objects:detector",
}
EPOCHS = {"segmentation": ("--epochs", "40"), "detection": ("--epochs", "40")}  # classes have their default, 100
DATA = {"classification": "folder:classes", "segmentation": "pairs:masks", "detection": "coco:boxes"}
# Of the full network, so that there is something to lose.
LEAST = {"classification": 80.0, "segmentation": 80.0, "detection": 60.0}


def main() -> int:
    """Run the bars; 0 if all are met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paint(folder / "classes", OF_A_CLASS)
        shapes.paint(folder / "masks", PICTURES)
        objects.draw(folder / "boxes", PICTURES)
        python, packages = edge_environment(folder / "environment")
        figures = {task: _tried(folder / task, task, python) for task in TASKS}
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


def paint(folder: Path, count: int) -> None:
    """`count` JPEGs of each class: a disc, a ring, a square, a cross; of any size, place and colour, in noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:80, :80] - 39.5
    for name in ("cross", "disc", "ring", "square"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            size = rng.uniform(14, 26)
            y, x = (np.abs(each - rng.uniform(-12, 12)) / size for each in (rows, columns))
            away = np.hypot(y, x)
            figure = {
                "cross": (np.minimum(y, x) < 0.25) & (np.maximum(y, x) < 1),
                "disc": away < 1,
                "ring": (away < 1) & (away > 0.6),
                "square": np.maximum(y, x) < 0.9,
            }[name]
            ground, colour = rng.integers(30, 120, 3), rng.integers(140, 226, 3)
            pixels = np.where(figure[..., None], colour, ground) + rng.normal(0, 25, (80, 80, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number:02}.jpg")


def _tried(folder: Path, task: str, python: Path) -> dict[str, Any]:
    """One run, and its bundle verified on the other side."""
    where = ("--data", DATA[task], "--data-dir", str(folder.parent))
    run = run_pipeline(folder, "--task", task, "--model", TASKS[task], *where, *COMMON, *EPOCHS.get(task, ()))
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
