"""Cycles on an Arm Ethos-U by vela's estimate: `python -m benchmarks.devices.ethos_u [ACCELERATOR ...]`.

Run it from the project's folder with the Python of an environment that has ethos-u-vela, ai-edge-litert and pydantic.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import tempfile
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ethosu.vela import vela

from benchmarks.devices.staircase import SIZE, Costs, sweeps, write
from findings.support.int8_tflite import Network
from polar_deploy.devices.device import AROUND_MANY, REFERENCE
from polar_deploy.devices.sweep import FEW_PIXELS

TITLES = {
    "ethos-u55-128": "Arm Ethos-U55, 128 MACs a cycle",
    "ethos-u55-256": "Arm Ethos-U55, 256 MACs a cycle",
    "ethos-u65-256": "Arm Ethos-U65, 256 MACs a cycle",
    "ethos-u85-256": "Arm Ethos-U85, 256 MACs a cycle",
}
METHOD = (
    f"cycles that vela --verbose-performance gives for each layer (Op Cycles), its default system and memory mode, "
    f"INT8, normally distributed weights; {REFERENCE} or {AROUND_MANY} channels around the width that varies, "
    f"and a 1 x 1 convolution before and after, so that no layer asked reads the network's input or writes its output"
)


def layers(accelerator: str, network: Network, output: int) -> list[float]:
    """Cycles of every layer, in order."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.tflite"
        network.save(path, output)
        options = ["--accelerator-config", accelerator, "--output-dir", folder, "--verbose-performance"]
        with contextlib.redirect_stdout(io.StringIO()):
            vela.main([str(path), *options])
        (table,) = Path(folder).glob("*per-layer*.csv")
        with table.open() as file:
            return [float(row["Op Cycles"]) for row in csv.DictReader(file)]


def started(channels: int = REFERENCE, pixels: int = SIZE) -> tuple[Network, int]:
    """A network, and what its first layer makes."""
    network = Network()
    return network, network.conv(network.input(pixels, channels), channels, kernel=1)


def measured(accelerator: str, width: int, everything: bool) -> Costs:
    """The cost of each kind of layer at a width."""
    network, x = started()
    x = network.conv(network.conv(x, width), REFERENCE)
    _, out, back, _ = layers(accelerator, network, network.conv(x, REFERENCE, kernel=1))
    costs = {("conv3x3", "output"): out, ("conv3x3", "input"): back}
    if everything:
        network, x = started()
        x = network.depthwise(network.conv(x, width, kernel=1))
        x = network.conv(x, REFERENCE, kernel=1)
        _, out, through, back, _ = layers(accelerator, network, network.conv(x, REFERENCE, kernel=1))
        costs |= {("conv1x1", "output"): out, ("depthwise3x3", "both"): through, ("conv1x1", "input"): back}
    return costs


def many(accelerator: str, width: int) -> Costs:
    """The cost of two layers on few pixels, from and to many channels."""
    found = {}
    for layer, kernel in (("conv3x3", 3), ("conv1x1", 1)):
        network, x = started(AROUND_MANY, FEW_PIXELS)
        x = network.conv(network.conv(x, width, kernel), AROUND_MANY, kernel)
        *_, out, back, _ = layers(accelerator, network, network.conv(x, AROUND_MANY, kernel=1))  # U85 copies the input
        found[layer, "between"] = out + back
    return found


def gate(accelerator: str) -> float:
    """Cost of two convolutions with a multiplication by zeros and ones between, over that without."""
    found = []
    for gated in (True, False):
        network, x = started()
        x = network.conv(x, 32)
        if gated:
            x = network.gate(x, (np.arange(32) % 2).astype(np.int8))
        x = network.conv(network.conv(x, REFERENCE), REFERENCE, kernel=1)
        found.append(sum(layers(accelerator, network, x)[1:-1]))
    return found[0] / found[1]


def addition(accelerator: str) -> float:
    """Cost of an Add of two 64-channel maps over that of a 3 x 3 convolution 64 to 64."""
    network, x = started()
    x = network.add(x, network.conv(x, REFERENCE))
    _, conv, add, _ = layers(accelerator, network, network.conv(x, REFERENCE, kernel=1))
    return add / conv


def main(names: list[str]) -> None:
    """Write one file an accelerator."""
    for name in names or list(TITLES):
        found = sweeps(partial(measured, name), "int8", many=partial(many, name))
        write(
            name,
            {
                "title": TITLES[name],
                "source": {
                    "kind": "estimate",
                    "tool": "ethos-u-vela",
                    "version": version("ethos-u-vela"),
                    "date": str(date.today()),
                    "method": METHOD,
                    "script": "benchmarks/devices/ethos_u.py",
                },
                "unit": "cycles",
                "sweeps": found,
                "gate_left_over": round(gate(name), 3),
                "addition": round(addition(name), 3),
            },
        )


if __name__ == "__main__":
    main(sys.argv[1:])
