"""gates.json: which gates of a network are open, by the names of their sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polar_deploy.errors import ContentError
from polar_deploy.gating.network import GatedNetwork
from polar_deploy.workspace import read_json


def sites(network: GatedNetwork, share: list[float]) -> list[dict[str, Any]]:
    """The entry `sites` of gates.json for a frozen network; `share`: of training samples that opened each gate, [G]."""
    return [
        {
            "name": site.name,
            "kind": site.kind,
            "width": site.width,
            "open": gate.open.nonzero().flatten().tolist(),
            "share": share[start : start + site.gates],
        }
        for site, start, gate in zip(network.sites, network.starts, network.gates, strict=True)
    ]


def read_open(network: GatedNetwork, path: Path) -> Tensor:
    """The gate vector, float [G] of 0 and 1, of a gates.json that somebody may have edited.

    Raises:
        UsageError: there is no such file.
        ContentError: it is not JSON, or does not fit the network's sites.
    """
    document = read_json(path)
    entries = document.get("sites") if isinstance(document, dict) else None
    listed = {e.get("name"): e for e in entries if isinstance(e, dict)} if isinstance(entries, list) else {}
    opened = torch.zeros(network.masks)
    for site, start in zip(network.sites, network.starts, strict=True):
        entry = listed.get(site.name, {})
        gates = entry.get("open")
        known = isinstance(gates, list) and all(type(gate) is int and 0 <= gate < site.gates for gate in gates)
        if not known or entry.get("kind") != site.kind or entry.get("width") != site.width:
            raise ContentError(
                f"{path} has no {site.kind} site {site.name!r} of width {site.width} with open gates from 0 to "
                f"{site.gates - 1}",
                "use the gates.json that was written for this model",
            )
        opened[start + torch.tensor(gates, dtype=torch.long)] = 1.0
    return opened
