"""Surgery is exact on graphs that nobody thought of: 10,000 random ones, every operator often, and 3,000 damaged files.

The graphs are drawn by hypothesis, see `tests.surgery.entries`; operators that were drawn less often than others so far
are drawn more often from then on. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from benchmarks.common import write_result
from polar_deploy.errors import PolarDeployError
from polar_deploy.surgery.ops import table
from tests.conftest import child_environment
from tests.surgery.entries import ABSENT
from tests.surgery.hostile import DONE, REFUSED, damaged, lay
from tests.surgery.random_graphs import text
from tests.surgery.test_fuzz import Tally, fuzz, judged

GRAPHS = 10_000
HITS = 200  # graphs that were cut, for each operator
DAMAGED = 3000
AGAIN = 0.001  # share of the graphs that a second surgery may change


class Run:
    """The random graphs so far, and where surgery failed on them."""

    def __init__(self, keep: Path | None = None) -> None:
        self.keep = keep  # folder for graphs that surgery failed on
        self.tally = Tally()
        self.failures: list[tuple[onnx.ModelProto, str]] = []
        self.wanted = sorted(table().keys() - ABSENT.keys())

    def use(self, model: onnx.ModelProto) -> None:
        """Cuts one graph, unless it was there before; failures are kept, so that the run goes on."""
        if self.tally.has(model) or any(model == failed for failed, _ in self.failures):
            return
        try:
            self.tally.add(model, judged(model))
        except (PolarDeployError, AssertionError) as error:
            self._failed(model, f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - a traceback in the engine is what this looks for
            self._failed(model, f"crash: {error!r}")

    def _failed(self, model: onnx.ModelProto, why: str) -> None:
        self.failures.append((model, why))
        print(f"\n{why}\n{text(model)}", flush=True)
        if self.keep is not None:
            onnx.save(model, self.keep / f"{len(self.failures)}.onnx")

    @property
    def rare(self) -> list[str]:
        """Operators behind the number of hits that they should have by now, with some to spare."""
        behind = 1.3 * HITS * self.tally.graphs / GRAPHS
        return [name for name in self.wanted if self.tally.cut[name] < behind]

    def go(self, graphs: int, first: int) -> None:
        """Draws until there are at least so many."""
        number = first
        while self.tally.graphs < graphs:
            fuzz(number, self.use, rare=self.rare, shrink=False)
            number += 1
            if number % 10 == 0:
                print(f"{self.tally.graphs} graphs, {len(self.failures)} failures", flush=True)

    def figures(self) -> dict[str, Any]:
        """What goes into the result; of failures the smallest graphs."""
        tally = self.tally
        smallest = sorted(self.failures, key=lambda failure: len(failure[0].graph.node))[:5]
        changed = sorted(tally.changed_again, key=lambda model: len(model.graph.node))[:5]
        return {
            "graphs": tally.graphs,
            "lost_channels": tally.lost,
            "failures": len(self.failures),
            "smallest_failures": [{"error": error[:500], "graph": text(model)} for model, error in smallest],
            "changed_by_a_second_surgery": len(tally.changed_again),
            "smallest_changed_by_a_second_surgery": [text(model) for model in changed],
            "as_they_were": dict(tally.as_they_were),
            "in_graphs_that_were_cut": {name: tally.cut[name] for name in self.wanted},
            "touched": {name: tally.touched[name] for name in self.wanted},
            "absent": ABSENT,
        }


def flip_bytes(count: int) -> Counter[int]:
    """Exit codes of the command on damaged files, each in the same child; -1: it died or left something behind."""
    codes: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        lay(Path(folder), damaged(count))
        command = [sys.executable, "-m", "tests.surgery.hostile", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False, env=child_environment())
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        clean = answer["code"] == DONE or not answer["left"]
        codes[answer["code"] if clean else -1] += 1
    codes[-1] += count - len(answers)
    return +codes


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--graphs", type=int, default=GRAPHS, help="other numbers than the default: no result is written"
    )
    parser.add_argument("--seed", type=int, default=1_000, help="number of the first batch")
    parser.add_argument("--keep", type=Path, help="folder for graphs that surgery fails on")
    args = parser.parse_args()
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    start, run = time.monotonic(), Run(args.keep)
    run.go(args.graphs, args.seed)
    seconds = time.monotonic() - start
    figures = run.figures()
    codes = flip_bytes(DAMAGED if args.graphs == GRAPHS else 200)
    show(figures, codes)
    if args.graphs != GRAPHS:
        return 1 if run.failures else 0
    bars = {
        f"{GRAPHS} random graphs, 0 differences": not run.failures,
        "at least 60 % of them lose channels": run.tally.lost >= 0.6 * run.tally.graphs,
        f"a second surgery changes at most {AGAIN:.1%} of them": len(run.tally.changed_again)
        <= AGAIN * run.tally.graphs,
        f"every operator at least {HITS} times in a graph that was cut": not _below(figures),
        f"{DAMAGED} damaged files: refused, or the same function": codes.keys() <= {DONE, REFUSED},
    }
    return write_result("surgery-fuzz", bars, {"seconds": round(seconds), "damaged_files": dict(codes), **figures})


def _below(figures: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in figures["in_graphs_that_were_cut"].items() if count < HITS}


def show(figures: dict[str, Any], codes: Counter[int]) -> None:
    """What came out, and each failure's smallest graph."""
    graphs, hits = figures["graphs"], figures["in_graphs_that_were_cut"]
    print(f"{graphs} graphs, {figures['lost_channels'] / graphs:.0%} lost channels, {figures['failures']} failures")
    print(f"a second surgery changes {figures['changed_by_a_second_surgery'] / graphs:.1%} of them")
    for name, count in sorted(hits.items(), key=lambda hit: hit[1]):
        print(f"{name:28} in {count:4} graphs that were cut, touched in {figures['touched'][name]:4}")
    print(f"damaged files, by exit code: {dict(codes)}")
    print(f"handed back as they were: {figures['as_they_were']}")
    for graph in figures["smallest_changed_by_a_second_surgery"]:
        print(f"\nchanged again:\n{graph}")
    for failure in figures["smallest_failures"]:
        print(f"\n{failure['error']}\n{failure['graph']}")


if __name__ == "__main__":
    sys.exit(main())
