"""What INT8 costs in accuracy and gains in time on a CPU: public and compressed CIFAR-10 networks, whole test set.

    python -m benchmarks.bar_int8 [--run FOLDER] [--calibrations]

`--run` takes a finished run of bar_cifar10_resnet20.py, whose compressed network is measured; without it the run is
made, which takes half an hour. `--calibrations` also records how methods and numbers of images compare. The speed-up
is a bar where the CPU has VNNI only.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks.common import ROOT, SHARED, resnet20_run, write_cifar_network, write_result
from polar_deploy import cpu, data, engines, targets
from polar_deploy.config import Build, Calibration
from polar_deploy.documents.build import Built
from polar_deploy.engines import Array, Engine, timing
from tests.support.shared import cifar_folder, cifar_split

FP32, INT8 = targets.parse("ort-fp32"), targets.parse("ort-int8")
BATCH = 16
MAX_DROP, MAX_DROP_COMPRESSED, MIN_SPEEDUP = 0.3, 0.5, 1.5  # the bars: points, points, times
RECIPE = ROOT / "benchmarks" / "cifar10-resnet20.yaml"
CALIBRATIONS = (
    *(Calibration(method="minmax", images=images) for images in (64, 512)),
    *(Calibration(method="percentile", percentile=share) for share in (99.9, 99.99, 99.999)),
    Calibration(method="percentile", images=64),
    Calibration(method="entropy"),
)


@dataclass(frozen=True)
class Images:
    """CIFAR-10, normalised: training images in random order, the test images and their labels."""

    train: Array
    test: Array
    labels: npt.NDArray[np.int64]


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run of bar_cifar10_resnet20.py")
    parser.add_argument("--calibrations", action="store_true", help="compare ways to calibrate, too")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        print("skipped: no data and weights in ../shared")
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        full, images = folder / "resnet56.onnx", load_images()
        write_cifar_network("resnet56", full, trained=True)
        run = arguments.run or resnet20_run(folder / "run", cifar_folder(folder, "cifar10"))
        figures = {
            "resnet56": measure(full, folder / "full", images),
            "compressed_resnet20": measure(run / "compressed" / "model.onnx", folder / "compressed", images),
        }
        compared = compare(full, folder / "calibrations", images) if arguments.calibrations else []
    return write_result("int8", _bars(**figures), {**figures, "calibrations": compared})


def measure(onnx: Path, folder: Path, images: Images) -> dict[str, Any]:
    """Accuracy of ort-int8 against ort-fp32 on the test set, and speed in pairs on one thread."""
    wide, _ = _engine(onnx, folder / FP32.name, FP32, images, Build())
    narrow, entry = _engine(onnx, folder / INT8.name, INT8, images, Build())
    figures = {
        "precision": entry["precision"],
        "build_seconds": entry["seconds"],
        **accuracy(narrow, logits(wide, images), images),
        "speed": [_speed(timing.compare(wide, narrow, {"input": images.test[:batch]})) for batch in (1, BATCH)],
    }
    print(f"{onnx.parent.name}/{onnx.name}: {figures}", flush=True)
    return figures


def compare(onnx: Path, folder: Path, images: Images) -> list[dict[str, Any]]:
    """Accuracy of ort-int8 for every way to calibrate."""
    wide, _ = _engine(onnx, folder / FP32.name, FP32, images, Build())
    expected, rows = logits(wide, images), []
    for index, calibration in enumerate(CALIBRATIONS):
        narrow, entry = _engine(onnx, folder / str(index), INT8, images, Build(calibration=calibration))
        rows.append({**entry["precision"]["calibration"], **accuracy(narrow, expected, images)})
        print(rows[-1], flush=True)
    return rows


def _engine(
    onnx: Path, folder: Path, target: targets.Target, images: Images, options: Build
) -> tuple[Engine, dict[str, Any]]:
    """Build an engine and load it; the engine, and its entry in build.json."""
    calibration = {"input": images.train[: options.calibration.images]}
    entry = engines.build(onnx, folder, "full", target, options, calibration)
    Built(schema=2, target=target.name, engines={"full": entry}).write(folder / "build.json")
    return engines.load(folder, "full", target), entry.as_json()


def logits(engine: Engine, images: Images) -> Array:
    return engines.infer_all(engine, {"input": images.test})["logits"]


def accuracy(engine: Engine, expected: Array, images: Images) -> dict[str, Any]:
    """Of an INT8 engine, against the logits of FP32: points, percent, and RMS of the difference as a share."""
    found = logits(engine, images)
    fp32, int8 = (float(100 * (each.argmax(axis=1) == images.labels).mean()) for each in (expected, found))
    return {
        "top1": {"fp32": fp32, "int8": int8},
        "drop": round(fp32 - int8, 4),
        "agreement": float(100 * (expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
        "relative_error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
    }


def _speed(result: timing.Timing) -> dict[str, Any]:
    best = result.best
    return {
        "batch": result.batch,
        "decided": result.decided,
        "noise": best.noise,
        "speedup": asdict(best.speedup),
        "fp32_ms": best.full.median_ms,
        "int8_ms": best.compressed.median_ms,
    }


def _bars(resnet56: dict[str, Any], compressed_resnet20: dict[str, Any]) -> dict[str, bool]:
    drop, smaller = resnet56["drop"], compressed_resnet20["drop"]
    bars = {
        f"ResNet-56: INT8 loses at most {MAX_DROP} points: {drop:.2f}": drop <= MAX_DROP,
        f"compressed ResNet-20: INT8 loses at most {MAX_DROP_COMPRESSED} points: {smaller:.2f}": (
            smaller <= MAX_DROP_COMPRESSED
        ),
    }
    if any("vnni" in each for each in cpu.instructions()):
        speed = resnet56["speed"][-1]
        bars[f"ResNet-56: at least {MIN_SPEEDUP} times as fast at batch {BATCH}: {speed['speedup']['median']:.2f}"] = (
            speed["decided"] and speed["speedup"]["low"] >= MIN_SPEEDUP
        )
    return bars


def load_images() -> Images:
    """Calibrate on training images only, drawn over all classes."""
    normal = yaml.safe_load(RECIPE.read_text())["normalize"]
    train, _ = cifar_split("cifar10", "train")
    test, labels = cifar_split("cifar10", "test")
    most = max(each.images for each in (Calibration(), *CALIBRATIONS))
    chosen = np.random.default_rng(0).permutation(len(train))[:most]
    calibration, images = (data.normalise(each, normal["mean"], normal["std"]) for each in (train[chosen], test))
    return Images(calibration, images, labels)


if __name__ == "__main__":
    sys.exit(main())
