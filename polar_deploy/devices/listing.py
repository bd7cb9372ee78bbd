"""The devices whose widths are known: what --device may name."""

from __future__ import annotations

import argparse
import json

from polar_deploy.devices import load, names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print a line a device."""
    devices = [load(name) for name in names()]
    if arguments.json:
        print(
            json.dumps([device.model_dump(mode="json", exclude={"schema_", "sweeps"}) for device in devices], indent=1)
        )
        return 0
    longest = max(len(device.name) for device in devices)
    for device in devices:
        source = f"{device.source.kind}, {device.source.tool} {device.source.version}"
        print(f"{device.name:{longest}}  {device.title}; {', '.join(device.precisions)} ({source})")
    return 0
