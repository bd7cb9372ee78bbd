"""Does a device's file put networks in the right order? Random widths, predicted by it and measured.

    python -m benchmarks.bar_device_order [NAME ...]     # some of the runtimes; all by default

For each network, `PATTERNS` sub-networks of random widths, any number of channels: their order by the file, by their
MACs, and by the MACs that they would have in multiples of 8 (what one guesses without a file), against their times in
the runtime, in processor time, each run right after one of the whole network. Each runtime works in an environment with
its own packages, see `bar_device_choice`. A quarter of an hour; keep the machine quiet.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.common import write_result
from benchmarks.devices.compare import TOOLS, Tool, speed_ups
from benchmarks.devices.networks import choices_of, write
from polar_deploy import devices
from polar_deploy.costs import State
from polar_deploy.gating.on_device import device_cost
from polar_deploy.surgery.choices import Choices

NETWORKS = (("resnet20", 32, 10), ("resnet18", 224, 1000))  # name, pixels, classes
PATTERNS = 12
LEAST = 0.9  # rank correlation


def main(names: list[str]) -> int:
    """Run the bars; 0 if all are met."""
    tools = [name for name, tool in TOOLS.items() if tool.measured and tool.file in devices.names()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for network, pixels, classes in NETWORKS:
            choices = choices_of(network, pixels, classes)
            opened = patterns(choices)
            paths = [Path(folder) / network / f"{index}.onnx" for index in range(PATTERNS + 1)]
            paths[0].parent.mkdir()
            for path, state in zip(paths, [np.ones(choices.gates, bool), *opened], strict=True):
                write(choices, state, path)
            states = [choices.state(each) for each in opened]
            for tool in names or tools:
                control, *speed = speed_ups(tool, pixels, paths, Path(folder))
                row = compared(TOOLS[tool], choices, states, [1 / each for each in speed])
                print(network, tool, row["correlation"], flush=True)
                rows.append({"network": network, "device": TOOLS[tool].file, "control": control, **row})
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


def compared(tool: Tool, choices: Choices, states: list[State], times: list[float]) -> dict[str, Any]:
    """Predictions and times of one network's patterns, as shares of the whole network's, and how their orders agree."""
    cost, macs = device_cost(devices.choose(tool.file, tool.precision), choices), choices.costs["macs"]
    predicted = {
        "file": [cost.share(state) for state in states],
        "macs": [macs.share(state) for state in states],
        "eights": [macs.share(eights(choices, state)) for state in states],
    }
    return {
        "correlation": {name: round(float(spearmanr(each, times)[0]), 3) for name, each in predicted.items()},
        "measured": [round(each, 4) for each in times],
        "predicted": {name: [round(value, 4) for value in each] for name, each in predicted.items()},
    }


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
    sys.exit(main(sys.argv[1:]))
