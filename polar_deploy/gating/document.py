"""gates.json: which gates of a network are open, by the names of their sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.documents.gates import GateStates
from polar_deploy.errors import ContentError
from polar_deploy.surgery.choices import Choices
from polar_deploy.surgery.facts import Bools
from polar_deploy.workspace import read_json

if TYPE_CHECKING:
    from polar_deploy.devices import Chosen
    from polar_deploy.gating.gates import Gates


def document(
    model: str, inputs: dict[str, list[int | None]], align: int, device: Chosen | None, gates: Gates, share: list[float]
) -> GateStates:
    """The content of gates.json.

    Args:
        model: name of the network.
        inputs: name -> shape of one sample.
        align: what its widths are multiples of.
        device: whose widths they are.
        gates: as they were fixed.
        share: of training samples that opened each gate, [gates].
    """
    return GateStates.model_validate(
        {
            "schema": 1,
            "model": model,
            "inputs": inputs,
            "align": align,
            "device": device and {"name": device.device.name, "precision": device.precision},
            "budget": dict(gates.budget),
            "achieved": {name: gates.cost()[name] for name in gates.budget},
            "sites": [
                {
                    "name": name,
                    "kind": kind,
                    "width": len(each),
                    "open": np.flatnonzero(gates.opened[each.start : each.stop]).tolist(),
                    "share": share[each.start : each.stop],
                }
                for each, name, kind in gates.analysis.choices.owners()
            ],
            "ungated": gates.ungated,
        }
    )


def read_open(choices: Choices, path: Path) -> Bools:
    """The state bool [gates] of a gates.json that somebody may have edited.

    Raises:
        UsageError: there is no such file.
        ContentError: it is not JSON, does not fit the network's sites, or closes all of one.
    """
    document = read_json(path)
    entries = document.get("sites") if isinstance(document, dict) else None
    listed = {e.get("name"): e for e in entries if isinstance(e, dict)} if isinstance(entries, list) else {}
    opened = np.zeros(choices.gates, bool)
    for gates, name, kind in choices.owners():
        entry = listed.get(name, {})
        own = entry.get("open")
        known = isinstance(own, list) and all(type(gate) is int and 0 <= gate < len(gates) for gate in own)
        if not known or entry.get("kind") != kind or entry.get("width") != len(gates):
            raise ContentError(
                f"{path} has no {kind} site {name!r} of width {len(gates)} with open gates from 0 to {len(gates) - 1}",
                "use the gates.json that was written for this model",
            )
        if not own and kind != "block":
            raise ContentError(f"{path} closes all gates of {name!r}", "leave one of them open, or close its block")
        opened[gates.start + np.array(own, np.int64)] = True
    return opened
