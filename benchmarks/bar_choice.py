"""The choice under a budget against the greedy walk that it replaced, against every state there is, and its seconds.

The greedy walk (`gating.freeze.Knapsack`, until commit cffa484) runs in a process of its own on that commit.
It chooses for real networks with random utilities; then `gating.solver.solve` chooses among the same widths, for the
same cost polynomial and utilities, within exactly the cost that the walk arrived at. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.tasks.classification import classifier

if TYPE_CHECKING:
    from polar_deploy.gating.solver import Problem

# Name, input size.
NETWORKS = (
    ("resnet20", 32),
    ("resnet56", 32),
    ("resnet18", 224),
    ("resnet50", 224),
    ("mobilenet_v2", 224),
    ("regnet_x_400mf", 224),
    ("vgg11_bn", 224),
)
ROOT = Path(__file__).resolve().parents[1]
OLD = "cffa484"  # the last commit with the greedy walk
ALIGNMENTS = (1, 8)
SEEDS = range(8)
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
SMALL = 50  # instances against every state


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--walk", type=Path, help=argparse.SUPPRESS)  # the process on the old package
    arguments = parser.parse_args()
    if arguments.walk:
        return walk(arguments.walk)
    from benchmarks.common import write_result

    with checkout(OLD) as old:
        greedy = against_greedy(old)
    small, large = against_everything(), seconds()
    bars = {
        f"never below the greedy walk at its own cost, {len(greedy)} instances": all(r["more"] >= 0 for r in greedy),
        f"the optimum of {SMALL} small instances": all(row["short"] <= 1e-6 for row in small),
        "ResNet-50 at align 1 within 2 s": all(r["seconds"] <= 2 for r in large if r["network"] == "resnet50"),
        "EfficientNetV2-L at align 1 within 10 s": all(r["seconds"] <= 10 for r in large if r["network"] == "effnet"),
    }
    summary = {"mean": float(np.mean([r["more"] for r in greedy])), "max": max(r["more"] for r in greedy)}
    return write_result("choice", bars, {"more_utility": summary, "greedy": greedy, "small": small, "large": large})


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder with another commit of this project."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "old")
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", path, commit], cwd=ROOT, check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", path], cwd=ROOT, check=True)


# --- The greedy walk, on the old package. ---


def walk(path: Path) -> int:
    """Let the old knapsack choose, and write what it chose from and what it chose, a line for each network."""
    import torch
    from polar_deploy.gating.network import GatedNetwork

    from polar_deploy import models  # of the old checkout

    torch.set_num_threads(1)
    with path.open("w") as file:
        for name, size in NETWORKS:
            network = GatedNetwork(models.build(name, classifier(10 if size == 32 else 1000, size)), size)
            runs = [_walked(network, align, seed) for align in ALIGNMENTS for seed in SEEDS]
            file.write(json.dumps({"network": name, **_described(network), "runs": runs}) + "\n")
            file.flush()
            print(name, len(runs), f"{max(run['seconds'] for run in runs):.1f} s", flush=True)
    return 0


def _described(network: Any) -> dict[str, Any]:
    """Sites and the old cost polynomial as data: gates by their index, as sets."""
    import torch
    from polar_deploy.gating.cost import _layers

    layers = [
        {"unit": x.unit, "bias": x.bias, "inputs": list(map(sorted, x.inputs)), "outputs": list(map(sorted, x.outputs))}
        for x in _layers(network.traced, network.sites, network.starts, "macs")
    ]
    constraint, sites = network.constraint({"macs": 0.5}), []
    for site, start in zip(network.sites, network.starts, strict=True):
        sites.append({"kind": site.kind, "start": start, "width": site.width, "holds": []})
        if site.kind == "block":
            resting = constraint.resting(torch.ones(network.masks).index_fill(0, torch.tensor(start), 0.0).double())
            ends = [(s, s + other.gates) for s, other in zip(network.starts, network.sites, strict=True)]
            sites[-1]["holds"] = [i for i, (a, b) in enumerate(ends) if a != start and bool(resting[a:b].all())]
    return {"sites": sites, "layers": layers}


def _walked(network: Any, align: int, seed: int) -> dict[str, Any]:
    """One choice of the old knapsack, starting with every gate open."""
    import torch
    from polar_deploy.gating.freeze import Knapsack

    asked = BUDGETS[seed % len(BUDGETS)]
    utility = torch.from_numpy(_random_utility(network, seed))
    constraint = network.constraint({"macs": asked})
    state = torch.ones(network.masks)
    start = time.perf_counter()
    knapsack = Knapsack(network.sites, constraint, utility, state, align=align, min_width=0.1)
    gates = knapsack.solve()
    return {
        "align": align,
        "seed": seed,
        "asked": asked,
        "seconds": time.perf_counter() - start,
        "share": constraint.achieved(gates)["macs"],
        "choices": knapsack.choices,
        "utility": knapsack.utility.tolist(),  # of blocks at least the sum of their channels
        "gates": [int(gate) for gate in gates],
    }


def _random_utility(network: Any, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[G]: exponential, log-normal, or mostly near zero; sites differ, some more than others."""
    rng = np.random.default_rng(seed)
    parts = []
    for site in network.sites:
        parts.append(_gains(rng, site.gates, seed) * rng.lognormal(0, (0.0, 0.5, 1.0)[seed // 3 % 3]))
        if site.kind == "block":
            parts[-1] *= site.width
    return np.concatenate(parts)


def _gains(rng: np.random.Generator, count: int, kind: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return (rng.exponential(size=count), rng.lognormal(0, 1.5, size=count), rng.random(count) ** 4)[kind % 3]


# --- The solver on the same choices. ---


def against_greedy(old: Path) -> list[dict[str, Any]]:
    """For each instance how much more utility the solver's state has than the walk's, as a share; and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "walks.jsonl"
        command = [sys.executable, __file__, "--walk", str(path)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(old)}, check=True)
        return [_compared(net, run) for net in map(json.loads, path.open()) for run in net["runs"]]


def _compared(network: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    from polar_deploy.costs import State
    from polar_deploy.gating.solver import solve

    problem = old_problem(network, run)
    sites, gates = network["sites"], np.array(run["gates"])
    blocks = tuple(bool(gates[s["start"]]) for s in sites if s["kind"] == "block")
    widths = tuple(int(gates[s["start"] : s["start"] + s["width"]].sum()) for s in sites if s["kind"] == "channel")
    theirs = State(widths, blocks)
    share = problem.costs["macs"].share(theirs)
    assert abs(share - run["share"]) < 1e-9, "the cost polynomial was not carried over"
    problem.asked["macs"] = share  # type: ignore[index]
    start = time.perf_counter()
    solution = solve(problem)
    took = time.perf_counter() - start
    assert problem.costs["macs"].share(solution.state) <= share + 1e-9
    utility = problem.utility(theirs)
    row = {key: run[key] for key in ("align", "seed", "asked")}
    figures = {"more": problem.utility(solution.state) / utility - 1, "gap": solution.gap, "seconds": took}
    row |= {"network": network["network"], "cost": share, "utility": utility, **figures}
    print({**row, "seconds of the walk": run["seconds"]}, flush=True)
    return {**row, "seconds_greedy": run["seconds"]}


def old_problem(network: dict[str, Any], run: dict[str, Any]) -> Problem:
    """The choice that the walk had, as a problem; nothing asked yet."""
    from polar_deploy.costs import Cost, State
    from polar_deploy.gating.solver import Problem, Site

    utility = np.array(run["utility"])
    channel = [i for i, site in enumerate(network["sites"]) if site["kind"] == "channel"]
    block = [i for i, site in enumerate(network["sites"]) if site["kind"] == "block"]
    sites, inside = [], dict.fromkeys(block, 0.0)
    for index in channel:
        start, width = network["sites"][index]["start"], network["sites"][index]["width"]
        gains = np.sort(utility[start : start + width])[::-1]
        held = [b for b in block if index in network["sites"][b]["holds"]]
        for b in held:
            inside[b] += float(gains.sum())
        blocks = frozenset(block.index(b) for b in held)
        sites.append(Site(tuple(run["choices"][index]), np.r_[0.0, np.cumsum(gains)], blocks))
    beyond = [max(0.0, float(utility[network["sites"][b]["start"]]) - inside[b]) for b in block]
    terms = tuple(_terms(network, channel, block))
    full = State(tuple(site.widths[-1] for site in sites), (True,) * len(block))
    cost = Cost(Cost(1.0, terms).absolute(full), terms)
    return Problem(tuple(sites), np.array(beyond), {"macs": cost}, {"macs": 1.0})


def _terms(network: dict[str, Any], channel: Sequence[int], block: Sequence[int]) -> Iterator[Any]:
    """The polynomial as terms: channels that the same site and the same blocks can close are one number."""
    from polar_deploy.costs import Factor, Term

    whose = {}
    for index, site in enumerate(network["sites"]):
        for gate in range(site["start"], site["start"] + (site["width"] if site["kind"] == "channel" else 1)):
            whose[gate] = index

    def groups(channels: list[list[int]]) -> Counter[tuple[tuple[int, ...], frozenset[int]]]:
        kinds: Counter[tuple[tuple[int, ...], frozenset[int]]] = Counter()
        for gates in channels:
            owners = [whose[gate] for gate in gates]
            sites = tuple(channel.index(o) for o in owners if o in channel)
            assert len(sites) <= 1
            kinds[sites, frozenset(block.index(o) for o in owners if o in block)] += 1
        return kinds

    def factor(sites: tuple[int, ...], count: int) -> Factor:
        if not sites:
            return Factor(float(count))
        width = network["sites"][channel[sites[0]]]["width"]
        return Factor(0.0, {sites[0]: np.arange(width + 1.0) * (count / width)})

    for layer in network["layers"]:
        for (outputs, behind), wide in groups(layer["outputs"]).items():
            if layer["bias"]:
                yield Term(layer["bias"], (factor(outputs, wide),), behind)
            for (inputs, before), count in groups(layer["inputs"]).items():
                yield Term(layer["unit"], (factor(inputs, count), factor(outputs, wide)), behind | before)


# --- Every state there is. ---


def against_everything() -> list[dict[str, Any]]:
    """How far the solver's utility is below the best of all states, as a share, for small networks."""
    from polar_deploy.costs import State
    from polar_deploy.gating.solver import solve

    rows = []
    for seed in range(SMALL):
        problem = residual((4, 5), 2, asked=0.55 + 0.1 * (seed % 3), seed=seed, convolutions=1, least=0.5)
        choices = itertools.product(*(site.widths for site in problem.sites))
        states = itertools.product(choices, itertools.product((False, True), repeat=len(problem.blocks)))
        every = [State(widths, blocks) for widths, blocks in states]
        asked = problem.asked["macs"]
        shares = np.array([problem.costs["macs"].share(state) for state in every])
        within = [s for s, share in zip(every, shares, strict=True) if asked - 0.01 <= share <= asked + 1e-12]
        best = max(map(problem.utility, within))
        solution = solve(problem)
        short = 1 - solution.utility / best
        rows.append(
            {"seed": seed, "states": len(every), "short": short, "bound_holds": solution.bound >= best * (1 - 1e-9)}
        )
    return rows


# --- Seconds. ---


def seconds() -> list[dict[str, Any]]:
    """Seconds and gaps for networks as large as they come, one width at a time."""
    from polar_deploy.gating.solver import solve

    rows = []
    for network, asked, seed in itertools.product(("resnet50", "effnet"), (0.3, 0.5, 0.7), (0, 1)):
        if network == "resnet50":
            problem = residual((64, 128, 256, 512), (3, 4, 6, 3), asked=asked, seed=seed, convolutions=2, least=0.1)
        else:
            problem = efficient(asked=asked, seed=seed)
        start = time.perf_counter()
        solution = solve(problem)
        took = time.perf_counter() - start
        row = {"network": network, "asked": asked, "seed": seed, "sites": len(problem.sites), "seconds": took}
        row |= {"widths": sum(len(site.widths) for site in problem.sites), "gap": solution.gap}
        rows.append({**row, "in_window": solution.in_window})
        print(rows[-1], flush=True)
    return rows


class _Network:
    """Sites, blocks and layers, added one by one."""

    def __init__(self, seed: int, align: int, least: float) -> None:
        self.rng, self.align, self.least, self.kind = np.random.default_rng(seed), align, least, seed
        self.sites: list[Any] = []
        self.terms: list[Any] = []
        self.blocks: list[float] = []

    def site(self, width: int, blocks: frozenset[int] = frozenset()) -> int:
        from polar_deploy.gating.solver import Site

        gains = np.sort(_gains(self.rng, width, self.kind))[::-1] / width**0.5
        first = max(1, int(np.ceil(self.least * width / self.align))) * self.align
        widths = (*range(first, width, self.align), width)
        self.sites.append(Site(widths, np.r_[0.0, np.cumsum(gains)], blocks))
        return len(self.sites) - 1

    def block(self) -> frozenset[int]:
        self.blocks.append(float(self.rng.exponential()))
        return frozenset({len(self.blocks) - 1})

    def line(self, site: int) -> Any:
        from polar_deploy.costs import Factor

        return Factor(0.0, {site: np.arange(self.sites[site].widths[-1] + 1.0)})

    def layer(self, work: float, blocks: frozenset[int], *factors: Any) -> None:
        from polar_deploy.costs import Factor, Term

        read = tuple(self.line(f) if isinstance(f, int) else Factor(f) for f in factors)
        self.terms.append(Term(work, read, blocks))

    def problem(self, asked: float) -> Problem:
        from polar_deploy.costs import Cost, State
        from polar_deploy.gating.solver import Problem

        full = State(tuple(site.widths[-1] for site in self.sites), (True,) * len(self.blocks))
        cost = Cost(Cost(1.0, tuple(self.terms)).absolute(full), tuple(self.terms))
        return Problem(tuple(self.sites), np.array(self.blocks), {"macs": cost}, {"macs": asked})


def residual(
    widths: Sequence[int],
    depths: int | Sequence[int],
    *,
    asked: float,
    seed: int,
    convolutions: int,
    least: float,
    align: int = 1,
) -> Problem:
    """Like a ResNet: streams (four times as wide where a block has two inner widths), blocks, a stem, a head."""
    network = _Network(seed, align, least)
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    before, always, positions = network.site(widths[0]), frozenset[int](), 56.0**2
    network.layer(49 * 4 * positions, always, 3.0, before)
    for width, depth in zip(widths, depths, strict=True):
        stream = network.site(width * (4 if convolutions == 2 else 1))
        network.layer(positions, always, before, stream)
        for index in range(depth):
            inside = network.block() if index else always
            inner = [network.site(width, inside) for _ in range(convolutions)]
            chain = [stream if index else before, *inner, stream]
            for place, (one, other) in enumerate(itertools.pairwise(chain)):
                network.layer((1 if convolutions == 2 and place != 1 else 9) * positions, inside, one, other)
        before, positions = stream, positions / 4
    network.layer(1.0, always, before, 1000.0)
    return network.problem(asked)


def efficient(*, asked: float, seed: int) -> Problem:
    """Like EfficientNetV2-L: fused and depthwise blocks, squeeze-and-excite, 480 pixels."""
    stages = (
        (32, 4, 1, 1),
        (64, 7, 4, 2),
        (96, 7, 4, 2),
        (192, 10, 4, 2),
        (224, 19, 6, 1),
        (384, 25, 6, 2),
        (640, 7, 6, 1),
    )
    network = _Network(seed, 1, 0.1)
    before, always, positions = network.site(32), frozenset[int](), 240.0**2
    network.layer(9 * positions, always, 3.0, before)
    for stage, (width, depth, wider, stride) in enumerate(stages):
        stream = network.site(width)
        for index in range(depth):
            inside, source = (network.block(), stream) if index else (always, before)
            full = network.sites[source].widths[-1]
            read, positions = positions, positions / (1 if index else stride**2)
            if wider == 1:
                network.layer(9 * positions, inside, source, stream)
                continue
            inner = network.site(wider * full, inside)
            network.layer((9 if stage < 3 else 1) * (positions if stage < 3 else read), inside, source, inner)
            if stage >= 3:
                squeezed = network.site(full // 4, inside)
                network.layer(9 * positions, inside, inner)
                network.layer(2.0, inside, inner, squeezed)
            network.layer(positions, inside, inner, stream)
        before = stream
    head = network.site(1280)
    network.layer(positions, always, before, head)
    network.layer(1.0, always, head, 1000.0)
    return network.problem(asked)


if __name__ == "__main__":
    sys.exit(main())
