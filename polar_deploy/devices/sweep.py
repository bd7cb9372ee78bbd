"""Measuring what each width costs in a runtime on this machine, whatever else it does.

Two layers with so many channels between them, one thread, in processor time. In each round every width runs once, in
another order, right after the reference; a width's cost is the median of the ratios, times the median time of the
reference. Copies of the reference take part as its own width and as the control.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.devices.device import AROUND_MANY, AROUND_ODD, AROUND_OFFERED, FINE, REFERENCE, Device, Kind

if TYPE_CHECKING:
    import onnx

Run = Callable[[], object]
Size = tuple[int, ...]
Load = Callable[[Path, Size], Run]  # an ONNX file with one input of that size -> what runs it once
EVERY = (*range(1, FINE + 1), 72, 80, 88, 96, 97, 101, 104, 112, 120, 127, 128)  # widths of 3 x 3 convolutions
SOME = (4, 8, 12, 16, 20, 24, 28, 31, 32, 33, 36, 40, 48, 56, 64, 72, 80, 96)  # of the other layers
MANY = (128, 256, 384, 512)  # on maps of few pixels
PIXELS, FEW_PIXELS = 28, 4  # a side
# kind of layer, channels around the width that varies, pixels -> the widths
SWEEPS: dict[tuple[Kind, int, int], Sequence[int]] = {
    **{("conv3x3", around, PIXELS): EVERY for around in AROUND_OFFERED + AROUND_ODD},
    ("conv1x1", REFERENCE, PIXELS): SOME,
    ("depthwise3x3", REFERENCE, PIXELS): SOME,
    ("conv3x3", AROUND_MANY, FEW_PIXELS): MANY,
    ("conv1x1", AROUND_MANY, FEW_PIXELS): MANY,
}
CONTROL = 0  # stands for a width; it and `REFERENCE` are copies of what every other one runs after
LOADS = 5  # times that every network is loaded anew: where its memory lies decides, too
_SAMPLE_SECONDS = 1e-3  # that a sample takes at least


def model(layer: Kind, width: int, around: int = REFERENCE, pixels: int = PIXELS) -> onnx.ModelProto:
    """`around` channels, `width` between two layers, `around` channels; a depthwise layer stands between them."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    kernel = 3 if layer == "conv3x3" else 1
    nodes, weights = [], []

    def conv(x: str, y: str, channels: int, given: int, kernel: int, group: int = 1) -> None:
        weight = random.normal(size=(channels, given // group, kernel, kernel)) / (kernel * given**0.5)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{y}_weight"))
        weights.append(numpy_helper.from_array(random.normal(size=channels).astype(np.float32), f"{y}_bias"))
        inputs = [x, f"{y}_weight", f"{y}_bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"{y}_sum"], name=y, pads=[kernel // 2] * 4, group=group))
        nodes.append(helper.make_node("Relu", [f"{y}_sum"], [y]))

    conv("x", "first", width, around, kernel)
    if layer == "depthwise3x3":
        conv("first", "depthwise", width, width, 3, group=width)
    conv("depthwise" if layer == "depthwise3x3" else "first", "y", around, width, kernel)
    size = shape(around, pixels)
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "graph", [given], [made], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def shape(around: int = REFERENCE, pixels: int = PIXELS) -> Size:
    """Of the input of `model`."""
    return 1, around, pixels, pixels


def sweep(
    load: Load, layer: Kind, widths: Sequence[int], rounds: int, around: int = REFERENCE, pixels: int = PIXELS
) -> tuple[dict[int, float], float]:
    """Milliseconds of each width, ascending, and by what share the control was off.

    Args:
        load: how the runtime loads a network.
        layer: of which the width varies.
        widths: the reference is among them, whether asked or not.
        rounds: in all; each network is loaded `LOADS` times.
        around: channels around the width that varies.
        pixels: a side, of the maps.
    """
    import onnx

    widths = sorted({*widths, REFERENCE})
    found = []
    for _ in range(LOADS):
        with tempfile.TemporaryDirectory() as folder:
            runs: list[Run] = []
            for width in (REFERENCE, REFERENCE, *widths):
                path = Path(folder) / f"{len(runs)}.onnx"
                onnx.save(model(layer, width, around, pixels), path)
                runs.append(load(path, shape(around, pixels)))
            reference, *others = runs
            found.append(ratios(reference, dict(zip((CONTROL, *widths), others, strict=True)), -(-rounds // LOADS)))
    result = {width: statistics.median(ratio[width] for ratio, _ in found) for width in (CONTROL, *widths)}
    base, control = statistics.median(base for _, base in found), result.pop(CONTROL) / result[REFERENCE] - 1
    return {width: round(base * ratio, 5) for width, ratio in result.items()}, control


def ratios(reference: Run, runs: Mapping[int, Run], rounds: int) -> tuple[dict[int, float], float]:
    """The time of each over the reference's, and the reference's in milliseconds."""
    for run in (reference, *runs.values()):
        _seconds(run, 5)
    times = max(1, round(_SAMPLE_SECONDS / _seconds(reference, 20)))
    random, base = np.random.default_rng(0), []
    found: dict[int, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key in random.permutation(list(runs)):
            first, own = _seconds(reference, times), _seconds(runs[int(key)], times)
            found[int(key)].append(own / first)
            base.append(first)
    return {key: statistics.median(each) for key, each in found.items()}, 1e3 * statistics.median(base)


def _seconds(run: Run, times: int) -> float:
    """Processor time of a run, which other programs disturb less than the clock on the wall."""
    run()  # its weights are in the cache from here on
    begin = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - begin) / times


def measured(name: str, precision: str, source: Mapping[str, str], load: Load, rounds: int) -> tuple[Device, float]:
    """A device's file of a runtime on this machine, and the share by which the control was off at most."""
    sweeps, off = [], 0.0
    for (layer, around, pixels), widths in SWEEPS.items():
        costs, control = sweep(load, layer, widths, rounds, around, pixels)
        sweeps.append(
            {
                "precision": precision,
                "layer": layer,
                "varies": "between",
                "around": around,
                "pixels": pixels,
                "widths": list(costs),
                "cost": list(costs.values()),
            }
        )
        off = max(off, abs(control))
    method = (
        f"processor time, runs paired with one of width {REFERENCE}, all widths in turn, loaded {LOADS} times, one "
        f"thread, batch 1; the control was off by {off:.1%} at most"
    )
    content = {"schema": 1, "name": name, "title": name, "source": {"kind": "measured", **source, "method": method}}
    content |= {"unit": "ms", "sweeps": sweeps}
    return Device.model_validate(content), off
