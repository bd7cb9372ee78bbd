"""Does a device's file put networks in the right order? Random widths, predicted by it and measured.

For each network, `PATTERNS` sub-networks of random widths, any number of channels: their order by the file, by their
MACs, and by the MACs that they would have in multiples of 8 (what one guesses without a file), against their times in
the runtime, in processor time, each run right after one of the whole network. Five minutes; keep the machine quiet.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from scipy.stats import spearmanr

from benchmarks.common import write_result
from benchmarks.devices.runtimes import on_this_cpu, openvino
from polar_deploy import devices, models
from polar_deploy.costs import State
from polar_deploy.devices.measure import session, session_int8
from polar_deploy.devices.sweep import Run, ratios
from polar_deploy.export import Example
from polar_deploy.gating.analysis import analyse
from polar_deploy.gating.on_device import device_cost
from polar_deploy.surgery import detached, rounds
from polar_deploy.surgery.choices import Choices
from polar_deploy.tasks.classification import classifier

NETWORKS = (("resnet20", 32, 10), ("resnet18", 224, 1000))  # name, pixels, classes
PATTERNS = 12
ROUNDS = 41
LEAST = 0.9  # rank correlation


RUNTIMES: dict[str, Callable[[Path, tuple[int, ...]], Run]] = {
    on_this_cpu("onnxruntime-x86"): session,
    on_this_cpu("onnxruntime-x86-int8"): session_int8,
}
if find_spec("openvino") and on_this_cpu("openvino-x86") in devices.names():
    RUNTIMES[on_this_cpu("openvino-x86")] = openvino


def main() -> int:
    """Run the bars; 0 if all are met."""
    rows = [row(device, load, *network) for network in NETWORKS for device, load in RUNTIMES.items()]
    bars = {
        f"{each['network']} on {each['device']}: rank correlation at least {LEAST}": each["correlation"]["file"]
        >= LEAST
        for each in rows
    }
    bars |= {
        f"{each['network']} on {each['device']}: better than multiples of 8": each["correlation"]["file"]
        > each["correlation"]["eights"]
        for each in rows
    }
    return write_result("device-order", bars, {"rows": rows})


def row(
    device: str, load: Callable[[Path, tuple[int, ...]], Run], network: str, pixels: int, classes: int
) -> dict[str, Any]:
    """Predictions and times of one network's patterns, as shares of the whole network's, and how their orders agree."""
    torch.manual_seed(0)
    size = (1, 3, pixels, pixels)
    choices = analyse(
        models.build(network, classifier(classes, pixels)).eval(), Example.of(torch.zeros(2, *size[1:]))
    ).choices
    opened = patterns(choices)
    cost = device_cost(devices.choose(device), choices)
    states = [choices.state(each) for each in opened]
    predicted = {
        "file": [cost.share(state) for state in states],
        "macs": [choices.costs["macs"].share(state) for state in states],
        "eights": [choices.costs["macs"].share(eights(choices, state)) for state in states],
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for index, state in enumerate([np.ones(choices.gates, bool), *opened]):
            path = Path(folder) / f"{index}.onnx"
            cut = rounds.operate(choices.with_masks(choices.detached, state))[-1].model
            onnx.save(filled(detached.to_model(cut)), path)
            runs.append(load(path, size))
        whole, *others = runs
        times, milliseconds = ratios(whole, dict(enumerate(others)), ROUNDS)
    measured = [times[index] for index in range(PATTERNS)]
    print(
        network, device, *(f"{name} {spearmanr(each, measured)[0]:.3f}" for name, each in predicted.items()), flush=True
    )
    return {
        "network": network,
        "device": device,
        "milliseconds": round(milliseconds, 3),
        "correlation": {name: round(float(spearmanr(each, measured)[0]), 3) for name, each in predicted.items()},
        "measured": [round(each, 4) for each in measured],
        "predicted": {name: [round(value, 4) for value in each] for name, each in predicted.items()},
    }


def filled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with weights: the choices know shapes alone, and what lies in their place may be no number."""
    draw = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            sizes = tuple(tensor.dims)
            weights = draw.standard_normal(sizes) / np.prod(sizes[1:]) ** 0.5 if len(sizes) > 1 else np.ones(sizes)
            tensor.CopyFrom(numpy_helper.from_array(weights.astype(np.float32), tensor.name))
    return model


def patterns(choices: Choices) -> list[np.ndarray]:
    """Random states: of every site a quarter of the channels or more, all blocks."""
    draw, found = np.random.default_rng(0), []
    for _ in range(PATTERNS):
        opened = np.ones(choices.gates, bool)
        for site in choices.sites:
            opened[site.gates.start + draw.integers(max(1, site.width // 4), site.width + 1) : site.gates.stop] = False
        found.append(opened)
    return found


def eights(choices: Choices, state: State) -> State:
    """The state in the next multiples of 8 channels."""
    widths = (min(site.width, -(-width // 8) * 8) for width, site in zip(state.widths, choices.sites, strict=True))
    return State(tuple(widths), state.blocks)


if __name__ == "__main__":
    sys.exit(main())
