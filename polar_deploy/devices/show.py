"""What each width costs on a device, and which widths are worth choosing."""

from __future__ import annotations

import argparse
import json
from itertools import groupby

from polar_deploy.devices import Chosen, Device, load
from polar_deploy.devices.device import Precision
from polar_deploy.errors import printable

BAR = 40  # characters of the dearest width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("name", help="a name from `list`, or a .json file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the device's source, and a bar a width."""
    device = load(arguments.name)
    if arguments.json:
        offered = {precision: list(device.offered(precision)) for precision in device.precisions}
        print(json.dumps({**device.model_dump(mode="json", by_alias=True), "offered": offered}, indent=1))
        return 0
    source = device.source
    print(printable(f"{device.name}: {device.title}"))
    print(printable(f"{source.kind} by {source.tool} {source.version}, {source.date}: {source.method}"))
    if device.gate_left_over is not None:
        print(f"a gate left in the graph: {device.gate_left_over:.2f} times the cost of the two convolutions around it")
    if device.addition is not None:
        print(f"an Add: {device.addition:.2f} of the cost of a 3 x 3 convolution of as many channels")
    for precision in device.precisions:
        _print_staircase(device, precision)
    return 0


def _print_staircase(device: Device, precision: Precision) -> None:
    """Two 3 x 3 convolutions with so many channels between them; * marks a width that is worth choosing.

    Neighbours that are not, and whose bars are as long, share a line, with the cost of the widest.
    """
    costs, offered = device.staircase(precision), device.offered(precision)
    dearest = max(costs.values())
    print(f"\n{precision}: two 3 x 3 convolutions with so many channels between them, {device.unit}; *: worth choosing")
    if (weight := Chosen(device, precision).costs.weight_in_macs) is not None:
        print(f"a weight costs as much as {weight:.0f} multiplications, which shows in layers on few pixels")
    for (bar, worth), alike in groupby(costs, lambda each: (round(BAR * costs[each] / dearest), each in offered)):
        widths = list(alike)
        for first, last in [(each, each) for each in widths] if worth else [(widths[0], widths[-1])]:
            label = str(first) if first == last else f"{first}-{last}"
            print(f"{label:>7} {'*' if worth else ' '} {costs[last]:12.6g} {'#' * bar}")
