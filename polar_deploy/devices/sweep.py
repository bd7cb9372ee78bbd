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
SUMS = 3  # of maps, in the network that tells what one costs
LOADS = 5  # times that every network is loaded anew: where its memory lies decides, too
_SAMPLE_SECONDS = 1e-3  # that a sample takes at least


class _Network:
    """Convolutions, each with a rectifier, from "x" to "y"."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def conv(
        self, x: str, y: str, channels: int, given: int, kernel: int, *, group: int = 1, beside: str | None = None
    ) -> None:
        """From `x` to `y`; beside: what is added before the rectifier."""
        from onnx import helper, numpy_helper

        weight = self._random.normal(size=(channels, given // group, kernel, kernel)) / (kernel * given**0.5)
        bias = self._random.normal(size=channels)
        for name, values in ((f"{y}_weight", weight), (f"{y}_bias", bias)):
            self._weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        inputs, made = [x, f"{y}_weight", f"{y}_bias"], f"{y}_sum"
        self._nodes.append(helper.make_node("Conv", inputs, [made], name=y, pads=[kernel // 2] * 4, group=group))
        if beside is not None:
            self._nodes.append(helper.make_node("Add", [made, beside], [f"{y}_total"]))
            made = f"{y}_total"
        self._nodes.append(helper.make_node("Relu", [made], [y]))

    def model(self, size: Size) -> onnx.ModelProto:
        """The network; size: of its input and its output."""
        from onnx import TensorProto, helper

        given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in ("x", "y"))
        graph = helper.make_graph(self._nodes, "graph", [given], [made], self._weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def model(layer: Kind, width: int, around: int = REFERENCE, pixels: int = PIXELS) -> onnx.ModelProto:
    """`around` channels, `width` between two layers, `around` channels; a depthwise layer stands between them."""
    network, kernel = _Network(), 3 if layer == "conv3x3" else 1
    network.conv("x", "first", width, around, kernel)
    if layer == "depthwise3x3":
        network.conv("first", "depthwise", width, width, 3, group=width)
    network.conv("depthwise" if layer == "depthwise3x3" else "first", "y", around, width, kernel)
    return network.model(shape(around, pixels))


def residual(branches: bool) -> onnx.ModelProto:
    """A 3 x 3 convolution and `SUMS` more, all of `REFERENCE` channels; branches: what each reads is added to it."""
    network, x = _Network(), "first"
    network.conv("x", x, REFERENCE, REFERENCE, 3)
    for index in range(1, SUMS + 1):
        y = "y" if index == SUMS else f"y{index}"
        network.conv(x, y, REFERENCE, REFERENCE, 3, beside=x if branches else None)
        x = y
    return network.model(shape())


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
    widths = sorted({*widths, REFERENCE})
    models = {width: model(layer, width, around, pixels) for width in widths}
    models = {CONTROL: models[REFERENCE], **models}
    found = _compared(load, models[REFERENCE], models, rounds)
    result = {width: statistics.median(ratio[width] for ratio, _ in found) for width in (CONTROL, *widths)}
    base, control = statistics.median(base for _, base in found), result.pop(CONTROL) / result[REFERENCE] - 1
    return {width: round(base * ratio, 5) for width, ratio in result.items()}, control


def addition(load: Load, rounds: int) -> float:
    """What an Add of two maps costs over a 3 x 3 convolution of the same `REFERENCE` channels: >= 0.

    Where a runtime fuses both, it is what the fused one costs more.
    """
    found = _compared(load, residual(branches=False), {CONTROL: residual(branches=True)}, rounds)
    more = statistics.median(ratio[CONTROL] for ratio, _ in found) - 1
    return max(0.0, round(more * (SUMS + 1) / SUMS, 4))


def _compared(
    load: Load, reference: onnx.ModelProto, models: Mapping[int, onnx.ModelProto], rounds: int
) -> list[tuple[dict[int, float], float]]:
    """`ratios`, each time that all networks are loaded."""
    import onnx

    found = []
    for _ in range(LOADS):
        with tempfile.TemporaryDirectory() as folder:
            runs: list[Run] = []
            for each in (reference, *models.values()):
                path, sizes = Path(folder) / f"{len(runs)}.onnx", each.graph.input[0].type.tensor_type.shape.dim
                onnx.save(each, path)
                runs.append(load(path, tuple(dim.dim_value for dim in sizes)))
            first, *others = runs
            found.append(ratios(first, dict(zip(models, others, strict=True)), -(-rounds // LOADS)))
    return found


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
    content |= {"unit": "ms", "sweeps": sweeps, "addition": addition(load, rounds)}
    return Device.model_validate(content), off
