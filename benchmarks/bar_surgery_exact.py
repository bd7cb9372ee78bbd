"""Surgery is exact: 18 torchvision networks, half of the channels closed behind every activation, the same function.

Every activation output that is not a graph output gets its own random gate. ONNX Runtime judges, at two batch sizes.
About ten minutes on two cores, half of it PyTorch's exporter; `--cache FOLDER` keeps what was exported.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.common import write_result
from benchmarks.surgery_models import (
    SIZES,
    build,
    compare,
    export,
    faults,
    gated,
    half,
    sites,
)
from polar_deploy.errors import PolarDeployError
from polar_deploy.surgery import compress


def check(name: str, cache: Path) -> dict[str, Any]:
    """Exports one network, and gates, compresses and compares it."""
    return {"network": name, "input": SIZES[name], **judge(name, export(name, build(name), cache))}


def judge(name: str, model: onnx.ModelProto) -> dict[str, Any]:
    """Gates, compresses and compares an exported graph; the name is the seed of its gates."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    masks = {site: half(site.width, random) for site in sites(model)}
    before = gated(model, masks)
    start = time.perf_counter()
    try:
        surgery = compress(before, verify=False)
    except PolarDeployError as error:
        return {"exact": False, "error": str(error)}
    seconds = time.perf_counter() - start
    difference = compare(before, surgery.model)
    return {
        "gates": len(masks),
        "exact": difference.exact,
        "difference": difference._asdict(),
        "faults": faults(before, surgery.model),
        "seconds": round(seconds, 3),
        **_figures(surgery.report),
    }


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """What was cut, and how often each operator stopped it."""
    outs = [layer["out"] for layer in report["layers"]]
    return {
        "channels": [sum(out[0] for out in outs), sum(out[1] for out in outs)],
        "macs": report["macs"],
        "params": report["params"],
        "gates_left": sum(gate["outcome"] == "kept" for gate in report["gates"]),
        "unsupported": _counted(f"{entry['operator']}: {entry['reason']}" for entry in report["unsupported"]),
    }


def _counted(lines: Any) -> dict[str, int]:
    return dict(Counter(lines).most_common())


def show(row: dict[str, Any]) -> None:
    """One line a network."""
    if "error" in row:
        print(f"{row['network']:20} ERROR {row['error']}", flush=True)
        return
    (c0, c1), (m0, m1), (p0, p1) = row["channels"], row["macs"], row["params"]
    print(
        f"{row['network']:20} {'exact' if row['exact'] else 'DIFFERS'} {row['difference']['largest']:.1e}"
        f"  channels {c0} -> {c1}  MACs {m1 / m0:.1%}  params {p1 / p0:.1%}  {row['seconds']:.2f} s"
        f"  gates {row['gates']} -> {row['gates_left']}  {row['unsupported'] or ''} {'; '.join(row['faults'])}",
        flush=True,
    )


def main() -> int:
    """Run the bar; 0 if it is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder for exported networks, kept (default: a temporary one)")
    parser.add_argument("networks", nargs="*", default=list(SIZES), help="only these; no result is written")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            rows.append(check(name, args.cache or Path(folder)))
            show(rows[-1])
    if set(args.networks) != set(SIZES):
        return 0 if all(row["exact"] for row in rows) else 1
    bars = {
        "all 18 networks exact at two batch sizes": all(row["exact"] for row in rows),
        "all 18 networks lose channels": all(
            "error" not in row and row["channels"][1] < row["channels"][0] for row in rows
        ),
        "graphs valid, inputs and outputs as before, no operator type counted more often": not any(
            row.get("faults", True) for row in rows
        ),
    }
    return write_result("surgery-exact", bars, {"networks": rows})


if __name__ == "__main__":
    sys.exit(main())
