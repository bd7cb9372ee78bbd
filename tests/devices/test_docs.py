"""docs/devices.md has the figures of the files."""

from __future__ import annotations

from polar_deploy import devices
from tests.conftest import ROOT


def test_the_table_is_that_of_the_files() -> None:
    shown = [line for line in (ROOT / "docs" / "devices.md").read_text(encoding="utf-8").splitlines() if "| `" in line]
    expected = []
    for device in map(devices.load, devices.names()):
        for precision in device.precisions:
            costs = device.staircase(precision)
            ratios = [f"{costs[width] / costs[32]:.2f}" for width in (24, 31, 33)]
            widths = ", ".join(map(str, device.offered(precision)))
            cells = [f"`{device.name}`", f"{precision.upper()}, {device.source.kind}", widths, *ratios]
            expected.append(f"| {' | '.join(cells)} |")
    assert shown == expected
