"""Speed-up of some networks over the first, in one runtime or by one compiler's estimate.

    python -m benchmarks.devices.compare NAME PIXELS FULL.onnx OTHER.onnx ...

prints a JSON list: that of FULL itself, loaded a second time (the control), and of each other one. Run it from the
project's folder with the Python of an environment that has the packages of `TOOLS`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.devices.printed import printed_to
from benchmarks.devices.runtimes import RUNTIMES, on_this_cpu
from polar_deploy.devices.sweep import ratios

LOADS, ROUNDS = 15, 5  # where its memory lies makes a small network some per cent faster or slower


@dataclass(frozen=True)
class Tool:
    """What tells how fast a network is.

    Attributes:
        device: the device whose file widths are chosen by; a runtime's on a CPU has one for each kind of CPU.
        precision: of the file.
        module: what the tool's Python package is imported as.
        packages: what pip installs for it.
        measured: whether it runs the network here, and not only says what it would cost.
    """

    device: str
    precision: str
    module: str
    packages: tuple[str, ...]
    measured: bool = True

    @property
    def file(self) -> str:
        """The name of the device's file."""
        return on_this_cpu(self.device) if self.measured else self.device


TOOLS = {
    "onnxruntime-x86": Tool("onnxruntime-x86", "fp32", "onnxruntime", ("onnxruntime",)),
    "onnxruntime-x86-int8": Tool("onnxruntime-x86-int8", "int8", "onnxruntime", ("onnxruntime",)),
    "openvino-x86": Tool("openvino-x86", "fp32", "openvino", ("openvino",)),
    "mnn-x86": Tool("mnn-x86", "fp32", "MNN", ("MNN",)),
    "tract-x86": Tool("tract-x86", "fp32", "tract", ("tract",)),
    "xnnpack-x86-int8": Tool("xnnpack-x86-int8", "int8", "ai_edge_litert", ("ai-edge-litert",)),
    "rk3588-fp16": Tool("rk3588", "fp16", "rknn", ("rknn-toolkit2", "setuptools<81"), measured=False),
    "ethos-u55-128": Tool("ethos-u55-128", "int8", "ethosu", ("ethos-u-vela", "ai-edge-litert"), measured=False),
    "ethos-u85-256": Tool("ethos-u85-256", "int8", "ethosu", ("ethos-u-vela", "ai-edge-litert"), measured=False),
}


def speed_ups(name: str, pixels: int, paths: Sequence[Path], environments: Path) -> list[float]:
    """What the tool says of ONNX files, in a process of an environment that has it, made in a folder if this has not.

    Returns:
        The speed-up over the first file: of itself, loaded a second time, and of each other one.
    """
    needed, python = TOOLS[name], Path(sys.executable)
    if find_spec(needed.module) is None:
        python = environments / needed.module / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
            pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, str(ROOT), *needed.packages], check=True)
    line = [str(python), "-m", "benchmarks.devices.compare", name, str(pixels), *map(str, paths)]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}  # some tools leave files in the folder that they run in
    done = subprocess.run(line, cwd=environments, env=here, check=True, capture_output=True, text=True)
    result: list[float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(name: str, pixels: str, *paths: str) -> None:
    """Print the speed-ups."""
    size = (1, 3, int(pixels), int(pixels))
    files = [Path(path) for path in (paths[0], *paths)]
    print(json.dumps([round(each, 4) for each in _speed_ups(name, size, files)]))


def _speed_ups(name: str, size: tuple[int, ...], files: Sequence[Path]) -> list[float]:
    if TOOLS[name].measured:
        load, found = RUNTIMES[name][3], []
        for _ in range(LOADS):
            full, *others = [load(path, size) for path in files]
            found.append(ratios(full, dict(enumerate(others)), ROUNDS)[0])
        return [1 / statistics.median(each[index] for each in found) for index in range(len(others))]
    estimate = rockchip if name.startswith("rk") else ethos_u
    costs = [estimate(name, path, size) for path in files]
    return [costs[0] / cost for cost in costs[1:]]


def rockchip(name: str, path: Path, size: tuple[int, ...]) -> float:
    """Cycles by rknn-toolkit2's estimate, in FP16: its quantiser aborts on networks that were never trained."""
    from rknn.api import RKNN

    platform, _, precision = name.partition("-")
    assert precision == "fp16"
    with tempfile.TemporaryDirectory() as folder:
        with printed_to(Path(folder) / "log"):
            toolkit = RKNN(verbose=True)
            toolkit.config(target_platform=platform)
            toolkit.load_onnx(str(path), inputs=["x"], input_size_list=[list(size)])
            toolkit.build(do_quantization=False)
            toolkit.release()
        text = (Path(folder) / "log").read_text(errors="replace")
    return float(sum(int(total) for total in re.findall(r"D RKNN: .*\s\d+/\d+/(\d+)\s+\d+\s+\w+:", text)))


def ethos_u(name: str, path: Path, size: tuple[int, ...]) -> float:
    """Cycles by vela's estimate, of the same layers in INT8 with random weights."""
    from benchmarks.devices.tflite import convert
    from findings.support.int8_tflite import cycles

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "network.tflite"
        convert(path, size, made)
        return cycles(made, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
