"""The shipped sweep over digits on Ray with two workers: killed once while it trains, gone on with, and compared.

What a noisy machine leaves undecided is measured again by the same command, as a user would.
"""

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
CALLS = 3  # of the command, after the one that is killed


def main() -> int:
    """Run the bar; 0 if it is met."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "sweep"
        polar = [sys.executable, "-m", "polar_deploy"]
        command = [*polar, "sweep", FILE, "--out", str(folder), "--workers", "2", "--json"]
        _kill_when_trained(command, folder, full=1)
        seconds: list[float] = []
        undecided = True
        while undecided and len(seconds) < CALLS:
            start = time.monotonic()
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            seconds.append(round(time.monotonic() - start, 1))
            found = json.loads(done.stdout)
            undecided = not all(run["figures"]["speedup"] for run in found["runs"])
        page = Path(place) / "compare.html"
        compare = [*polar, "report", "compare", str(folder), "--html", str(page)]
        compared = subprocess.run(compare, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        shown = page.read_text(encoding="utf-8") if page.is_file() else ""
        names = [run["figures"]["name"] for run in found["runs"]]
        logs = [path.read_text(encoding="utf-8") for path in folder.glob("*/run.log")]
    bars = {
        "every run came to its end": done.returncode == 0 and len(found["runs"]) == RUNS,
        "full networks trained once a seed": sum(log.count("\nfull 20/20:") for log in logs) == SEEDS,
        f"every latency decided in at most {CALLS} calls": not undecided,
        "one command compares all runs on one page": compared.returncode == 0 and all(name in shown for name in names),
        "smaller budgets are not slower": _is_ordered([group["speedup"] for group in found["groups"]]),
    }
    return write_result("sweep", bars, {"file": FILE, "seconds": seconds, "results": found})


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
