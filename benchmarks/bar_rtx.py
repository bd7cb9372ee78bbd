"""Engines of TensorRT for RTX, built and not run: whole and cut networks in three precisions, each one found again.

    python -m benchmarks.bar_rtx [--cache FOLDER]

ResNet-20 and ResNet-56 for CIFAR, ResNet-50 and MobileNetV2 of torchvision, with random weights: which types an engine
computes in does not depend on them, and nothing is said about accuracy or speed. The cut networks have lost half of
the channels between the convolutions of a block, by this project's surgery. Calibration images are noise. Needs no
GPU; five minutes on one core, most of it INT8, and more where torchvision's networks are not in the cache yet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks import surgery_models
from benchmarks.common import write_cifar_network, write_result
from polar_deploy import engines, targets
from polar_deploy.config import Build
from polar_deploy.errors import PolarDeployError
from polar_deploy.surgery import compress
from polar_deploy.workspace import read_json

CIFAR, TORCHVISION = ("resnet20", "resnet56"), ("resnet50", "mobilenet_v2")
TARGETS = ("rtx-fp32", "rtx-fp16", "rtx-int8")
_BOTH = ("full", "compressed")
IMAGES = 32  # for calibration


def whole(name: str, cache: Path) -> onnx.ModelProto:
    """An untrained network."""
    if name in TORCHVISION:
        return surgery_models.export(name, surgery_models.build(name), cache)
    torch.manual_seed(0)
    path = cache / f"{name}-32.onnx"
    if not path.is_file():
        write_cifar_network(name, path)
    return onnx.load(path)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the second half of the channels of each activation that one convolution alone reads."""
    readers = surgery_models.readers_of(model)
    inner = [site for site in surgery_models.sites(model) if _operators(readers, site.tensor) == ["Conv"]]
    masks = {site: np.arange(site.width) < site.width // 2 for site in inner}
    return compress(surgery_models.gated(model, masks)).model


def _operators(readers: Mapping[str, list[onnx.NodeProto]], tensor: str) -> list[str]:
    return [node.op_type for node in readers[tensor]]


def build(name: str, target: targets.Target, folder: Path) -> dict[str, Any]:
    """Both engines of a network for a target: what they compute in, and how long it took."""
    full, compressed = folder / "full-source.onnx", folder / "compressed-source.onnx"
    images = surgery_models.random_images(onnx.load(full), IMAGES)
    row: dict[str, Any] = {"network": name, "target": target.name}
    try:
        calibration = {onnx.load(full).graph.input[0].name: images} if target.precision == "int8" else None
        made = engines.build_all(full, compressed, folder / target.name, target, Build(), calibration).as_json()
    except PolarDeployError as error:
        return row | {"error": str(error)}
    return row | {
        "result": "built, not run here",
        **{key: _figures(made, key, folder / target.name) for key in _BOTH},
    }


def _figures(made: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    entry, layers = made["engines"][name], read_json(folder / f"{name}.layers.json")["layers"]
    computing = [layer["type"] for layer in layers if layer["op"] in ("convolution", "matrix_multiply")]
    return {
        "macs": entry["macs"],
        "found": entry["precision"]["found"],
        "computing": {kind: computing.count(kind) for kind in sorted(set(computing))},
        "kept": len(entry["precision"]["high_precision_layers"]),
        "plan_bytes": entry["files"][f"{name}.plan"]["bytes"],
        "capabilities": entry["plan"]["capabilities"],
        "seconds": entry["seconds"],
    }


def right(row: dict[str, Any]) -> bool:
    """Whether both engines compute in the target's precision: all of their layers, for INT8 more than half."""
    precision = targets.parse(row["target"]).precision
    for counts in (row[name]["computing"] for name in _BOTH if name in row):
        share = counts.get(precision, 0) / sum(counts.values())
        if share < 1 and not (precision == "int8" and share > 0.5):
            return False
    return "error" not in row


def show(row: dict[str, Any]) -> None:
    """One line."""
    told = row.get("error") or ", ".join(f"{key} {row[key]['computing']} {row[key]['seconds']} s" for key in _BOTH)
    print(f"{row['network']:14}{row['target']:10}{told}", flush=True)


def main() -> int:
    """Run the bar; 0 if it is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where exported networks are kept")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in (*CIFAR, *TORCHVISION):
            folder = Path(place) / name
            folder.mkdir()
            model = whole(name, arguments.cache or Path(place))
            onnx.save(model, folder / "full-source.onnx")
            onnx.save(halved(model), folder / "compressed-source.onnx")
            for target in TARGETS:
                rows.append(build(name, targets.parse(target), folder))
                show(rows[-1])
    bars = {f"{row['network']} {row['target']}: built, precision found": right(row) for row in rows}
    return write_result(
        "rtx",
        bars,
        {"tensorrt_rtx": targets.identity(targets.parse("rtx-fp32")), "calibration_images": IMAGES, "engines": rows},
    )


if __name__ == "__main__":
    sys.exit(main())
