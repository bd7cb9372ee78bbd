"""The layers whose cost is asked at every width, and the file that holds the answer. Needs pydantic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polar_deploy.devices import Device
from polar_deploy.devices.device import AROUND_MANY, REFERENCE
from polar_deploy.devices.sweep import EVERY, FEW_PIXELS, MANY, SOME

FOLDER = Path(__file__).parents[2] / "polar_deploy" / "devices"
SIZE = 16  # pixels a side, of feature maps

# layer, which of its widths varies -> cost
Costs = Mapping[tuple[str, str], float]


def sweeps(
    measure: Callable[[int, bool], Costs],
    precision: str,
    *,
    pixels: int = SIZE,
    many: Callable[[int], Costs] | None = None,
    log: Callable[[str], None] = print,
) -> list[Any]:
    """All widths of one precision, as the device's file has them.

    Args:
        measure: (width, whether all layers are asked, or the 3 x 3 convolutions alone) -> their costs.
        pixels: a side, of the maps.
        many: width -> the costs of two layers with so many channels between `AROUND_MANY`, on maps of `FEW_PIXELS`.
    """
    rows: dict[tuple[str, str, int, int], list[tuple[int, float]]] = {}
    for width in sorted({*EVERY, *SOME}):
        for key, cost in measure(width, width in SOME).items():
            rows.setdefault((*key, REFERENCE, pixels), []).append((width, cost))
        log(f"{precision} {width}")
    for width in MANY if many else ():
        for key, cost in many(width).items():
            rows.setdefault((*key, AROUND_MANY, FEW_PIXELS), []).append((width, cost))
    return [
        {
            "precision": precision,
            "layer": layer,
            "varies": varies,
            "around": around,
            "pixels": side,
            "widths": [width for width, _ in found],
            "cost": [int(cost) if cost == int(cost) else round(cost, 3) for _, cost in found],
        }
        for (layer, varies, around, side), found in rows.items()
    ]


def write(name: str, document: Mapping[str, Any]) -> None:
    """Write a device's file."""
    device = Device.model_validate({"schema": 1, "name": name, **document})
    (FOLDER / f"{name}.json").write_text(device.text(), encoding="utf-8")
