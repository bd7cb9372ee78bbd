"""Widths in TensorRT as NVIDIA documents them: `python -m benchmarks.devices.tensorrt`. Nothing is measured, or asked.

The page is https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/data-format-desc.html: channels are packed,
by 8 in NHWC8, which FP16 and BF16 use, by 32 in CHW32, which INT8 uses, and rounded up to whole packs.
"""

from __future__ import annotations

from datetime import date
from functools import partial

from benchmarks.devices.staircase import Costs, sweeps, write
from polar_deploy.devices.device import REFERENCE

PACKS = {"fp16": 8, "bf16": 8, "int8": 32}
METHOD = (
    "multiply-accumulates with channels rounded up to whole packs of the format (NHWC8, CHW32); kernels are chosen on "
    "the GPU, and may like other widths: a latency table tells"
)


def costs(pack: int, width: int, everything: bool) -> Costs:
    """A pixel's multiply-accumulates of each kind of layer."""
    packed = -(-width // pack) * pack
    found = {("conv3x3", side): 9.0 * REFERENCE * packed for side in ("output", "input")}
    if everything:
        found |= {("conv1x1", side): 1.0 * REFERENCE * packed for side in ("output", "input")}
        found |= {("depthwise3x3", "both"): 9.0 * packed}
    return found


def main() -> None:
    """Write the file."""
    source = {
        "kind": "documented",
        "tool": "TensorRT",
        "version": "10 and 11",
        "date": str(date.today()),
        "method": METHOD,
        "script": "benchmarks/devices/tensorrt.py",
    }
    found = []
    for precision, pack in PACKS.items():
        ask = partial(costs, pack)
        found += sweeps(ask, precision, pixels=1, log=lambda _: None)
    write("tensorrt", {"title": "TensorRT on an NVIDIA GPU", "source": source, "unit": "macs", "sweeps": found})


if __name__ == "__main__":
    main()
