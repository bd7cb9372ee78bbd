"""Graphs that want 100 GB, or never end, from a stranger: each command ends in its limit, and the machine stays usable.

Memory is limited by default to a share of what is free; here what grows step by step gets less, so that nothing else on
this machine is disturbed.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import onnx

from benchmarks.common import ROOT, write_result
from polar_deploy.limits import available_memory
from tests.support.bundle_commands import put
from tests.support.bundles import write_bundle
from tests.support.greedy import endless, growing, huge, inflated

GIVEN = 3.0  # GB
SECONDS = 10.0


def main() -> int:
    """Run the bars; 0 if all are met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = {
            "a constant of 100 GB": (huge("ConstantOfShape"), ()),
            "100 GB, computed": (huge("Expand", "r"), ()),
            "30 GB in steps of 0.5": (growing(60, 500_000_000), ("--memory-limit", str(GIVEN))),
            "a loop without end": (endless(), ("--time-limit", str(SECONDS))),
        }
        cases = {}
        for case, (model, options) in graphs.items():
            onnx.save(model, folder / "in.onnx")
            cases[f"surgery, {case}"] = _ended("surgery", folder / "in.onnx", folder / "out.onnx", *options)
            assert sorted(path.name for path in folder.iterdir()) == ["in.onnx"], "something was left behind"
        bundle = write_bundle(folder / "bundle")
        graph = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["networks"]["compressed"]["fp32"]
        put(bundle, graph, inflated(onnx.load(bundle / graph)).SerializeToString())
        cases["bundle verify, 100 GB, computed"] = _ended("bundle", "verify", bundle)
    figures = {"free_gb": round(available_memory() / 1e9, 1), "given_gb": GIVEN, "seconds": SECONDS, "cases": cases}
    bars = {
        "each ends with exit code 4": all(case["exit_code"] == 4 for case in cases.values()),
        "each within its time, and 10 s": all(case["seconds"] <= SECONDS + 10 for case in cases.values()),
        "no process is larger than its limit and the program": _largest_child() <= GIVEN + 0.5,
        "half of what was free stays free": all(case["least_free"] >= 0.5 for case in cases.values()),
    }
    return write_result("limits", bars, figures)


def _ended(*arguments: object) -> dict[str, Any]:
    """Exit code, seconds, what was said, and the least share of the free memory that was left meanwhile."""
    line = [sys.executable, "-m", "polar_deploy", *map(str, arguments)]
    start, before = time.monotonic(), available_memory()
    least, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            least[0] = min(least[0], available_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        over.set()
        watcher.join()
    return {
        "exit_code": done.returncode,
        "seconds": round(time.monotonic() - start, 1),
        "said": done.stderr.splitlines()[0][:160] if done.stderr else "",
        "least_free": round(least[0] / before, 2),
    }


def _largest_child() -> float:
    """GB of memory of the largest process that was started."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
