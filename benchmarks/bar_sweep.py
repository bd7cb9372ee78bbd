"""The shipped sweep over digits on Ray with two workers: killed once while it trains, and gone on with to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write_result

FILE = "pipelines/sweep-digits.yaml"
RUNS, SEEDS = 6, 2


def main() -> int:
    """Run the bar; 0 if it is met."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sweep"
        command = [sys.executable, "-m", "polar_deploy.sweep", FILE, "--out", str(folder), "--workers", "2", "--json"]
        _kill_when_trained(command, folder, full=1)
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.monotonic() - start
        found = json.loads(done.stdout)
        logs = [path.read_text(encoding="utf-8") for path in folder.glob("*/run.log")]
    bars = {
        "every run came to its end": done.returncode == 0 and len(found["runs"]) == RUNS,
        "full networks trained once a seed": sum(log.count("\nfull 20/20:") for log in logs) == SEEDS,
        "every latency decided": all(run["figures"]["speedup"] for run in found["runs"]),
        "smaller budgets are not slower": _is_ordered([group["speedup"] for group in found["groups"]]),
    }
    return write_result("sweep", bars, {"file": FILE, "seconds": round(seconds, 1), "results": found})


def _kill_when_trained(command: list[str], folder: Path, *, full: int) -> None:
    """Start the sweep, and kill it when so many full networks are trained."""
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list(folder.glob("*/stamps/full.json"))) < full:
        if running.poll() is not None:
            raise SystemExit(f"the sweep ended by itself with exit code {running.returncode}")
        time.sleep(0.1)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()


def _is_ordered(speedups: list[dict[str, Any] | None]) -> bool:
    """Whether means rise from budget to budget, which the file has in order."""
    means = [each["mean"] if each else 0.0 for each in speedups]
    return means == sorted(means)


if __name__ == "__main__":
    sys.exit(main())
