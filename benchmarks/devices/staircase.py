"""The layers whose cost is asked at every width, and the file that holds the answer. Needs nothing but Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "polar_deploy" / "devices"
EVERY = (*range(1, 67), 72, 80, 88, 96, 97, 104, 112, 120, 128)  # of 3 x 3 convolutions
SOME = (4, 8, 12, 16, 20, 24, 28, 31, 32, 33, 36, 40, 48, 56, 64, 72, 80, 96)  # of the other layers
OUTER = 64  # channels around the varied width
SIZE = 16  # pixels a side, of feature maps
TOKENS = 64  # rows of a matrix product, where it has some

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
    """Write a device's file, lists of numbers on one line each."""
    text = json.dumps({"schema": 1, "name": name, **document}, indent=1)
    (FOLDER / f"{name}.json").write_text(_joined(text.splitlines()), encoding="utf-8")


def _joined(lines: Iterable[str]) -> str:
    """The same JSON, a list of numbers on one line."""
    result: list[str] = []
    inside = False
    for line in lines:
        if inside:
            result[-1] += line.strip() if line.strip().startswith("]") else f"{line.strip()} "
            inside = not line.strip().startswith("]")
            result[-1] = result[-1].replace(" ]", "]")
        else:
            result.append(line)
            inside = line.rstrip().endswith(('"widths": [', '"cost": ['))
    return "\n".join(result) + "\n"
