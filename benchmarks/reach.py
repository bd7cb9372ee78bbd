"""The smallest share of the MACs that gates can leave: this build, and the last one that had an analysis of its own.

    python -m benchmarks.reach --before /path/to/cffa484/.venv/bin/python

The other build's cheapest state is closed, exported and cut, and what is left is counted; this one's is promised, and
`bar_coverage` shows that what is left is what is promised. The other build is a checkout of cffa484 with an environment
of its own, in which torch, torchvision and timm are those of this one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch

from benchmarks.bar_coverage import FIRST_ROWS, build, shaken
from benchmarks.common import write_result
from polar_deploy import Gates
from polar_deploy.surgery import cost

BEFORE = """
import sys
from pathlib import Path
import torch
from polar_deploy.errors import PolarDeployError
from polar_deploy.export import export
from polar_deploy.gating.freeze import smallest
from polar_deploy.gating.network import GatedNetwork
from polar_deploy.surgery import compress_file
folder, size = Path(sys.argv[1]), int(sys.argv[2])
try:
    gated = GatedNetwork(torch.load(folder / "network.pt", weights_only=False), size)
    gated.set_phase("frozen")
    gated.freeze(smallest(gated.sites, 1, 0.0))
    export(gated.static().eval(), size, folder / "gated.onnx", gated.sites)
    compress_file(folder / "gated.onnx", folder / "small.onnx")
except PolarDeployError as error:
    sys.exit(str(error).splitlines()[0])
"""


def row(name: str, before: str) -> dict[str, Any]:
    """Both builds on one network."""
    network, size = build(name)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.save(shaken(network), folder / "network.pt")
        gates = Gates(network, torch.zeros(1, 3, size, size), budget=0.9, align=1, min_width=0.0)
        command = [before, "-c", BEFORE, str(folder), str(size)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        said = (done.stderr.strip().splitlines() or [""])[-1]
        left = cost(onnx.load(folder / "small.onnx")).macs if done.returncode == 0 else None
    return {
        "network": name,
        "input": size,
        "before": left and round(left / gates.full["macs"], 4),
        "refused_before": said if left is None else None,
        "after": round(gates.smallest()["macs"], 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True, help="Python of the environment of cffa484")
    arguments = parser.parse_args()
    rows = []
    for name in FIRST_ROWS:
        rows.append(row(name, arguments.before))
        print(rows[-1], flush=True)
    bars = {"never larger than before": all(each["after"] <= (each["before"] or 1.0) for each in rows)}
    return write_result("reach", bars, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
