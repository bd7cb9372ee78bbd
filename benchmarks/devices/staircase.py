"""The layers whose cost is asked at every width, and the file that holds the answer. Needs pydantic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polar_deploy.devices import Device
from polar_deploy.devices.sweep import EVERY, SOME

FOLDER = Path(__file__).parents[2] / "polar_deploy" / "devices"
SIZE = 16  # pixels a side, of feature maps

# layer, which of its widths varies -> cost
Costs = Mapping[tuple[str, str], float]


def sweeps(measure: Callable[[int, bool], Costs], precision: str, log: Callable[[str], None] = print) -> list[Any]:
    """All widths of one precision, as the device's file has them.

    Args:
        measure: (width, whether all layers are asked, or the 3 x 3 convolutions alone) -> their costs.
    """
    rows: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for width in sorted({*EVERY, *SOME}):
        for key, cost in measure(width, width in SOME).items():
            rows.setdefault(key, []).append((width, cost))
        log(f"{precision} {width}")
    return [
        {
            "precision": precision,
            "layer": layer,
            "varies": varies,
            "widths": [width for width, _ in found],
            "cost": [int(cost) if cost == int(cost) else round(cost, 3) for _, cost in found],
        }
        for (layer, varies), found in rows.items()
    ]


def write(name: str, document: Mapping[str, Any]) -> None:
    """Write a device's file."""
    device = Device.model_validate({"schema": 1, "name": name, **document})
    (FOLDER / f"{name}.json").write_text(device.text(), encoding="utf-8")
