"""Cycles on Rockchip's NPUs by rknn-toolkit2's estimate: `python -m benchmarks.devices.rknn [PLATFORM ...]`.

Run it from the project's folder with the Python of an environment that has rknn-toolkit2, torch and pydantic.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rknn.api import RKNN

from benchmarks.devices.printed import printed_to
from benchmarks.devices.staircase import SIZE, Costs, sweeps, write
from polar_deploy.devices.device import AROUND_MANY, REFERENCE
from polar_deploy.devices.sweep import EVERY, FEW_PIXELS, MANY, SOME

TITLES = {"rk3588": "Rockchip RK3588 NPU", "rk3566": "Rockchip RK3566 NPU"}
METHOD = (
    f"total cycles that RKNN.build(verbose=True) lists for each layer, random weights; {REFERENCE} or {AROUND_MANY} "
    "channels around the width that varies, all widths in one graph as branches of a 1 x 1 convolution"
)
Table = dict[tuple[str, str, int], float]  # layer, what varies, width -> cycles
_ROW = re.compile(r"D RKNN: .*\s\d+/\d+/(\d+)\s+\d+\s+Conv:(\S+)")


def model() -> onnx.ModelProto:
    """Every layer at every width; a layer's node is called LAYER/VARIES/WIDTH."""
    random = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []

    def conv(x: str, name: str, channels: int, width: int, kernel: int, group: int = 1, stride: int = 1) -> str:
        weight = random.normal(size=(channels, width // group, kernel, kernel)).astype(np.float32) / kernel / width**0.5
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}/weight"))
        inputs = [x, f"{name}/weight"]
        attributes = {"pads": [kernel // 2] * 4, "group": group, "strides": [stride] * 2}
        nodes.append(helper.make_node("Conv", inputs, [f"{name}/y"], name=name, **attributes))
        nodes.append(helper.make_node("Relu", [f"{name}/y"], [name]))
        return name

    def ends(x: str, channels: int = REFERENCE, pixels: int = SIZE) -> None:
        outputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, channels, pixels, pixels]))

    start = conv("x", "start", REFERENCE, REFERENCE, 1)
    for width in EVERY:
        x = conv(start, f"conv3x3/output/{width}", width, REFERENCE, 3)
        ends(conv(x, f"conv3x3/input/{width}", REFERENCE, width, 3))
    for width in SOME:
        x = conv(start, f"conv1x1/output/{width}", width, REFERENCE, 1)
        x = conv(x, f"depthwise3x3/both/{width}", width, width, 3, group=width)
        ends(conv(x, f"conv1x1/input/{width}", REFERENCE, width, 1))
    few = conv(start, "few", AROUND_MANY, REFERENCE, 1, stride=SIZE // FEW_PIXELS)
    for layer, kernel in (("conv3x3", 3), ("conv1x1", 1)):
        for width in MANY:
            x = conv(few, f"{layer}/first/{width}", width, AROUND_MANY, kernel)
            ends(conv(x, f"{layer}/second/{width}", AROUND_MANY, width, kernel), AROUND_MANY, FEW_PIXELS)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, REFERENCE, SIZE, SIZE])
    graph = helper.make_graph(nodes, "graph", [given], outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def build(platform: str, precision: str, folder: Path) -> Table:
    """Cycles of each layer at each width, from the compiler's log."""
    onnx.save(model(), folder / "model.onnx")
    np.save(folder / "sample.npy", np.random.default_rng(1).normal(size=(1, REFERENCE, SIZE, SIZE)).astype(np.float32))
    (folder / "samples.txt").write_text(str(folder / "sample.npy"))
    with printed_to(folder / "log"):
        rknn = RKNN(verbose=True)
        rknn.config(target_platform=platform)
        done = rknn.load_onnx(str(folder / "model.onnx"))
        quantised = {"do_quantization": precision == "int8", "dataset": str(folder / "samples.txt")}
        done = done or rknn.build(**quantised)
    if done:
        raise SystemExit(f"rknn-toolkit2 could not build for {platform}: {(folder / 'log').read_text()[-2000:]}")
    found: Table = {}
    for line in (folder / "log").read_text(errors="replace").splitlines():
        row = _ROW.search(line)
        if row and row[2].count("/") == 2:
            layer, varies, width = row[2].split("/")
            key = layer, varies, int(width.partition("_tile")[0])  # a layer may be split
            found[key] = found.get(key, 0.0) + float(row[1])
    return found


def measured(table: Table, width: int, everything: bool) -> Costs:
    """The cost of each kind of layer at a width."""
    asked = ("output", "both", "input")
    return {(layer, varies): cost for (layer, varies, each), cost in table.items() if each == width and varies in asked}


def many(table: Table, width: int) -> Costs:
    """The cost of two layers on few pixels, from and to many channels."""
    return {
        (layer, "between"): table[layer, "first", width] + table[layer, "second", width]
        for layer in ("conv3x3", "conv1x1")
    }


def main(names: list[str]) -> None:
    """Write one file a platform."""
    for name in names or list(TITLES):
        found = []
        for precision in ("fp16", "int8"):
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)  # where the toolkit leaves files
                table = build(name, precision, Path(folder))

            found += sweeps(partial(measured, table), precision, many=partial(many, table))
        source = {
            "kind": "estimate",
            "tool": "rknn-toolkit2",
            "version": version("rknn-toolkit2"),
            "date": str(date.today()),
            "method": METHOD,
            "script": "benchmarks/devices/rknn.py",
        }
        write(name, {"title": TITLES[name], "source": source, "unit": "cycles", "sweeps": found})


if __name__ == "__main__":
    main(sys.argv[1:])
