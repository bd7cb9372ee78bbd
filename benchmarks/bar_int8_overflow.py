"""INT8 on a CPU whose kernels overflow with weights of 8 bits: what that costs, and what 7 bits cost instead.

Reads ../shared. The public ResNet-20 on CIFAR-10's test set, in ONNX Runtime: with 8 bits as a machine with VNNI would
write it, which sees nothing of the overflow, and as this one writes it by default. Only on x86 without VNNI; two
minutes on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bar_int8 import INT8, Images, accuracy, load_images, logits
from benchmarks.common import SHARED, write_cifar_network, write_result
from polar_deploy import engines, onnx_files, precision
from polar_deploy.config import Build
from polar_deploy.engines import Array
from polar_deploy.engines.ort import OrtEngine
from polar_deploy.precision import qdq, saturation
from polar_deploy.precision.proof import Kernels, Reference, spread

MAX_DROP = 0.3  # points, as in bar_int8


def main() -> int:
    """Run the bars; 0 if all are met."""
    here = engines.kernels(INT8)
    assert here is not None
    if not SHARED.is_dir() or not saturation.saturates(here, qdq.ORT):
        print("skipped: no data and weights in ../shared, or kernels that do not overflow")
        return 0
    with tempfile.TemporaryDirectory() as place:
        onnx, found = Path(place) / "resnet20.onnx", load_images()
        write_cifar_network("resnet20", onnx, trained=True)
        wide = logits(OrtEngine(onnx), found)
        rows = {
            "8 bits, of a machine with VNNI": written(onnx, found, wide, Build(reduce_range=False), None, here),
            "as by default": written(onnx, found, wide, Build(), here, here),
        }
    eight, default = rows.values()
    bars = {
        "with 8 bits the kernels compute something else": eight["kernels_off_by"] > default["kernels_off_by"],
        "by default weights have 7 bits, and no layer stays FP32": default["reduce_range"] and not default["fp32"],
        f"by default at most {MAX_DROP} points are lost: {default['drop']:.2f}": default["drop"] <= MAX_DROP,
    }
    return write_result("int8-overflow", bars, {**rows})


def written(
    onnx: Path, found: Images, wide: Array, options: Build, proof: Kernels | None, here: Kernels
) -> dict[str, Any]:
    """The INT8 network that is made with or without a proof by kernels, as the kernels here run it."""
    typed, calibration = onnx.with_name("typed.onnx"), {"input": found.train[: options.calibration.images]}
    types = precision.write(onnx, typed, INT8, options, calibration, proof)
    model, samples = onnx_files.read(typed, check=False), spread(calibration)
    return {
        "reduce_range": (types.calibration or {})["reduce_range"],
        "fp32": len(types.high_precision_layers),
        "kernels_off_by": Reference.of(model, samples, typed).error(model, here),
        **accuracy(OrtEngine(typed), wide, found),
    }


if __name__ == "__main__":
    sys.exit(main())
