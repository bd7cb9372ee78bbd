"""Does a device's file pay? Networks cut to the same MACs, chosen by it, and by MACs alone, and their speed.

    python -m benchmarks.bar_device_choice [NAME ...]     # some of the runtimes and compilers; all by default

The utilities of gates are random and the same for all ways of choosing. By the device's file: the widths that it
offers, under the largest latency budget, counted by it, that leaves half of the MACs at most. Against it, under a
budget of as many MACs: any width, and multiples of 8. Whole blocks may go; `kept` is the share of all utility that a
way keeps. Each runtime, or compiler, works in an environment with its own packages, made with pip unless this one has
them: it needs a package index, and a quiet machine for a quarter of an hour.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import write_result
from benchmarks.devices.compare import TOOLS, speed_ups
from benchmarks.devices.networks import choices_of, write
from polar_deploy import devices
from polar_deploy.costs import Floats
from polar_deploy.errors import UsageError
from polar_deploy.gating.choice import Limits, choose
from polar_deploy.gating.latency import latency_cost
from polar_deploy.surgery.choices import Choices

NETWORKS = (("resnet20", 32, 10), ("resnet18", 64, 200))  # name, pixels, classes
SEEDS = range(2)
MACS = 0.5
MIN_WIDTH = 0.25
FINE = 1e-3  # of the full network's latency, to find the budget with
WAYS = ("macs", "eights", "device")
RUNTIMES = 4  # that have to be measured, at least
BETTER = 1.15  # in the median


def main(names: list[str]) -> int:
    """Run the bars; 0 if all are met."""
    asked = [name for name in names or TOOLS if TOOLS[name].file in devices.names()]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [row for network in NETWORKS for row in choose_all(folder, asked, *network)]
        for tool in asked:
            rows += compared(folder, tool)
    gains = [row["speed_up"]["device"] / row["speed_up"]["macs"] for row in rows]
    off = {tool: max(abs(row["control"] - 1) for row in rows if row["on"] == tool) for tool in asked}
    worse = [row for row, gain in zip(rows, gains, strict=True) if gain < 1 - off[row["on"]]]
    measured = [tool for tool in asked if TOOLS[tool].measured]
    bars = {
        f"measured on {RUNTIMES} runtimes or more": len(measured) >= RUNTIMES,
        "estimates of vela and of rknn-toolkit2 as well": {"ethos-u55-128", "rk3588-fp16"} <= {*asked},
        "by the device's file never slower than by MACs alone, as far as the control tells": not worse,
        f"{BETTER} times as fast or more, in the median": statistics.median(gains) >= BETTER,
    }
    figures = {
        "without_a_file": sorted({*(names or TOOLS)} - {*asked}),
        "median": round(statistics.median(gains), 3),
        "least": round(min(gains), 3),
        "control_off": {tool: round(share, 4) for tool, share in off.items()},
        "rows": rows,
        "chosen": chosen,
    }
    return write_result("device-choice", bars, figures)


def choose_all(folder: Path, tools: list[str], name: str, pixels: int, classes: int) -> list[dict[str, Any]]:
    """Write ONNX graphs NETWORK/full.onnx and NETWORK/TOOL-SEED-WAY.onnx; return what was chosen."""
    choices = choices_of(name, pixels, classes)
    (folder / name).mkdir(parents=True, exist_ok=True)
    write(choices, np.ones(choices.gates, bool), folder / name / "full.onnx")
    rows = []
    for seed, tool in itertools.product(SEEDS, tools):
        worth = np.random.default_rng(seed).gamma(1, size=choices.gates)
        by_file = by_device(choices, devices.choose(TOOLS[tool].file, TOOLS[tool].precision), worth)
        share = choices.costs["macs"].share(choices.state(by_file))
        ways = {way: by_macs(choices, worth, share, align) for way, align in (("macs", 1), ("eights", 8))}
        for way, opened in (ways | {"device": by_file}).items():
            write(choices, opened, folder / name / f"{tool}-{seed}-{way}.onnx")
            state = choices.state(opened)
            found = {"network": name, "on": tool, "seed": seed, "way": way}
            found["macs"] = round(choices.costs["macs"].share(state), 4)
            found["kept"] = round(float(worth[opened].sum() / worth.sum()), 4)
            print(found, flush=True)
            rows.append(found | {"widths": list(state.widths), "blocks": int(sum(state.blocks))})
    return rows


def by_macs(choices: Choices, worth: Floats, share: float, align: int) -> np.ndarray:
    """The gates that stay under a budget of MACs."""
    return choose(choices, Limits.of(choices, align, MIN_WIDTH), choices.costs, {"macs": share}, worth)


def by_device(choices: Choices, device: devices.Chosen, worth: Floats) -> np.ndarray:
    """The gates that stay under the largest budget of the device's cost that leaves at most `MACS`."""
    limits = Limits.of(choices, 1, MIN_WIDTH, device.offers)
    costs = {"latency": latency_cost(device, choices)}
    least, most, found = 0.0, 1.0, None
    while most - least > FINE:
        share = (least + most) / 2
        try:
            opened = choose(choices, limits, costs, {"latency": share}, worth)
        except UsageError:  # so little is not to be had
            least = share
            continue
        if choices.costs["macs"].share(choices.state(opened)) <= MACS:
            least, found = share, opened
        else:
            most = share
    assert found is not None, f"no network of {MACS:.0%} of the MACs in the widths that the device's file offers"
    return found


def compared(folder: Path, tool: str) -> list[dict[str, Any]]:
    """What a runtime, or a compiler, says of the graphs."""
    rows = []
    for (network, pixels, _), seed in itertools.product(NETWORKS, SEEDS):
        paths = [folder / network / f"{name}.onnx" for name in ("full", *(f"{tool}-{seed}-{way}" for way in WAYS))]
        control, *speed = speed_ups(tool, pixels, paths, folder)
        found = dict(zip(WAYS, speed, strict=True))
        rows.append({"network": network, "seed": seed, "on": tool, "speed_up": found, "control": control})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
