"""Surgery is complete: what can go does go, in 19 CNNs whose coupled sets PyTorch's gradients tell.

They are 16 of torchvision and three of timm: paddings worked out from fixed sizes, standardised weights, norms first.

One random mask a coupled set: every row and column of a weight that touches a closed set is gone, no gate is left, and
the function is the same. Independent masks behind every mixer: at least 99 % of what can be cut at best. About ten
minutes on two cores; `--cache FOLDER` keeps what was exported. The sets come from `benchmarks.surgery_oracle`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks import surgery_oracle as oracle
from benchmarks.common import write_result
from benchmarks.surgery_models import (
    SCOPES,
    SIZES,
    TIMM,
    Array,
    Site,
    activations,
    build,
    compare,
    export,
    faults,
    gated,
    half,
    pixels,
    random_images,
    readers_of,
    run,
    shape_of,
    site,
)
from polar_deploy.errors import PolarDeployError
from polar_deploy.surgery import compress

NETWORKS = [*(name for name in SIZES if name not in ("vit_b_16", "swin_t")), *TIMM]
REPORTED_ONLY = ("shufflenet_v2_x1_0",)  # with independent masks
ENOUGH = 0.99
FAITHFUL = 1e-4  # of the scale: gated graph in float32 against gated network in float64


class Subject:
    """One network with its export, and which node of the graph each of its mixers is."""

    def __init__(self, name: str, cache: Path, size: int = 0) -> None:
        """`size`: pixels a side of the input; 0: as in `SIZES`."""
        self.network = build(name)
        self.model = export(name, self.network, cache, size)
        start = time.perf_counter()
        self.couplings = oracle.couplings(self.network, oracle.MINIMUM.get(name, oracle.SIZE))
        self.sets = self.couplings.sets()
        self.seconds = time.perf_counter() - start
        self.random = np.random.default_rng(zlib.crc32(name.encode()))
        self.nodes = _nodes(self.model, self.sets.mixers)
        self._places = self._find_places()

    def gate(self, masks: Mapping[str, Array]) -> onnx.ModelProto:
        """The graph with gates behind mixers, by name; it answers what PyTorch answers with these gates."""
        model = gated(self.model, {self._places[name]: mask for name, mask in masks.items()})
        images = random_images(model, 2)
        found, expected = run(model, images), oracle.logits(self.network, images, masks)
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        assert difference <= FAITHFUL, f"gates in the graph are elsewhere than in the network: {difference:.2g}"
        return model

    def weights(self, model: onnx.ModelProto) -> dict[str, list[int]]:
        """By mixer: [output channels, input channels a group, *kernel] in `model`; zeros where it is gone."""
        dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
        dims |= {value.name: shape_of(model, value.name) for value in model.graph.value_info}  # of computed weights
        nodes = {node.name: node for node in model.graph.node}
        found = {}
        for name, before in self.nodes.items():
            if before.name not in nodes:
                found[name] = [0, 0]
            else:
                shape = dims[nodes[before.name].input[1]]
                turned = before.op_type == "MatMul" or (before.op_type == "Gemm" and not _attribute(before, "transB"))
                found[name] = shape[::-1] if turned else shape
        return found

    def positions(self, name: str) -> int:
        """How often a mixer's kernel is applied to one image."""
        node = self.nodes[name]
        dims = shape_of(self.model, node.output[0])
        return math.prod(dims[2:] if node.op_type == "Conv" else dims[1:-1])

    def _find_places(self) -> dict[str, Site]:
        """By mixer: behind the BatchNorm and the activation that directly follow it."""
        readers, ends = readers_of(self.model), activations(self.model)
        places = {}
        for name in self.sets.outputs:
            node = self.nodes[name]
            tensor = node.output[0]
            follower = readers.get(tensor, [])
            if (node.op_type == "MatMul" and [f.op_type for f in follower] == ["Add"]) or [
                f.op_type for f in follower
            ] == ["BatchNormalization"]:  # the bias
                tensor = follower[0].output[0]
            tensor = ends.get(tensor, tensor)
            if any(value.name == tensor for value in self.model.graph.output):
                continue
            places[name] = site(self.model, tensor)
        return places

    @property
    def writers(self) -> list[str]:
        """The mixers that a gate can follow."""
        return list(self._places)


def _nodes(model: onnx.ModelProto, mixers: Mapping[str, oracle.Mixer]) -> dict[str, onnx.NodeProto]:
    """By mixer, its node: the weight keeps its name, or (transposed) the node tells its module."""
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
            names = (node.input[1].removesuffix(".weight"), *reversed(scopes.strip("[]").replace("'", "").split(", ")))
            name = next((name for name in names if name in mixers), None)
            if name is not None:
                assert name not in found, f"two nodes for {name}"
                found[name] = node
    assert set(found) == set(mixers), sorted(set(mixers) - set(found))
    return found


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def close_sets(subject: Subject) -> Array:
    """[sets] about half of the removable ones; no mixer loses all that it reads or all that it writes."""
    sets = subject.sets
    closed: Array = sets.removable & (subject.random.random(len(sets.removable)) < 0.5)
    for labels in (*sets.outputs.values(), *sets.inputs.values()):
        if closed[labels].all():
            closed[subject.random.choice(labels)] = False
    return closed


def check_sets(subject: Subject) -> dict[str, Any]:
    """One mask a coupled set: exactly the closed rows and columns go, and all of the gates."""
    sets, closed = subject.sets, close_sets(subject)
    masks = {name: ~closed[sets.outputs[name]] for name in subject.writers if closed[sets.outputs[name]].any()}
    before = subject.gate(masks)
    start = time.perf_counter()
    surgery = compress(before, verify=False)
    seconds = time.perf_counter() - start
    expected, was = oracle.widths(sets, closed), subject.weights(before)
    asked = removed = 0
    wrong = []
    for name, now in subject.weights(surgery.model).items():
        mixer, aim = sets.mixers[name], expected[name]
        goal = (aim.outputs, aim.inputs // max(aim.groups, 1))
        asked += was[name][0] - goal[0] + was[name][1] - goal[1]
        removed += was[name][0] - now[0] + was[name][1] - now[1]
        if tuple(now[:2]) != goal:
            wrong.append(f"{name} {mixer.outputs}x{was[name][1]}: {now[0]}x{now[1]}, should be {goal[0]}x{goal[1]}")
    difference = compare(before, surgery.model)
    return {
        "sets": [int(sets.removable.sum()), int(closed.sum())],
        "rows_and_columns": [asked, removed],
        "layers_not_as_they_should_be": wrong,
        "gates": [len(masks), sum(node.name.startswith("gate.") for node in surgery.model.graph.node)],
        "exact": difference.exact,
        "difference": difference._asdict(),
        "faults": faults(before, surgery.model),
        "seconds": round(seconds, 3),
    }


def check_independent(subject: Subject, size: int) -> dict[str, Any]:
    """Every mixer with a mask of its own: how much of the weights and MACs goes, of what can go at best."""
    masks = {name: half(subject.sets.mixers[name].outputs, subject.random) for name in subject.writers}
    before = subject.gate(masks)
    surgery = compress(before, verify=False)
    best = oracle.optimum(subject.network, subject.couplings, masks, size)
    was, now = subject.weights(before), subject.weights(surgery.model)
    weights, macs = [0, 0, 0], [0, 0, 0]
    for name, aim in best.items():
        taps, positions = math.prod(was[name][2:]), subject.positions(name)
        sizes = (math.prod(was[name]), aim.outputs * (aim.inputs // max(aim.groups, 1)) * taps, math.prod(now[name]))
        for index, number in enumerate(sizes):
            weights[index] += number
            macs[index] += number * positions
    difference = compare(before, surgery.model)
    return {
        "weights": weights,
        "macs": macs,
        "share_of_optimum": min((full - found) / (full - aim) for full, aim, found in (weights, macs)),
        "layers_wider_than_optimum": _wider(best, now),
        "exact": difference.exact,
        "difference": difference._asdict(),
        "faults": faults(before, surgery.model),
    }


def _wider(best: Mapping[str, oracle.Widths], now: Mapping[str, list[int]]) -> list[str]:
    goals = {name: (aim.outputs, aim.inputs // max(aim.groups, 1)) for name, aim in best.items()}
    return [
        f"{name}: {now[name][0]}x{now[name][1]}, best {goal[0]}x{goal[1]}"
        for name, goal in goals.items()
        if tuple(now[name][:2]) != goal
    ]


def check(name: str, cache: Path) -> dict[str, Any]:
    """Both kinds of masks on one network."""
    subject = Subject(name, cache)
    row: dict[str, Any] = {"network": name, "input": pixels(name), "oracle_seconds": round(subject.seconds, 1)}
    for kind, judge in (("sets", check_sets), ("independent", lambda s: check_independent(s, pixels(name)))):
        try:
            row[kind] = judge(subject)
        except PolarDeployError as error:
            row[kind] = {"error": str(error)}
    return row


def show(row: dict[str, Any]) -> None:
    """A line for each kind of masks, and what is not as it should be."""
    sets, free = row["sets"], row["independent"]
    if "error" in sets:
        print(f"{row['network']:20} ERROR {sets['error']}", flush=True)
    else:
        asked, removed = sets["rows_and_columns"]
        print(
            f"{row['network']:20} {sets['sets'][1]} of {sets['sets'][0]} sets closed: {removed} of {asked} rows and"
            f" columns gone, gates {sets['gates'][0]} -> {sets['gates'][1]},"
            f" {'exact' if sets['exact'] else 'DIFFERS'} {sets['difference']['largest']:.1e} {sets['faults'] or ''}"
        )
        for line in sets["layers_not_as_they_should_be"][:6]:
            print(f"    {line}")
    if "error" in free:
        print(f"{'':20} ERROR {free['error']}", flush=True)
    else:
        print(
            f"{'':20} independent: {free['share_of_optimum']:.2%} of the optimum,"
            f" {'exact' if free['exact'] else 'DIFFERS'} {free['difference']['largest']:.1e} {free['faults'] or ''}"
        )
        for line in free["layers_wider_than_optimum"][:6]:
            print(f"    {line}")
    sys.stdout.flush()


def main() -> int:
    """Run the bar; 0 if it is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder for exported networks, kept (default: a temporary one)")
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="only these; no result is written")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            rows.append(check(name, args.cache or Path(folder)))
            show(rows[-1])
    bars = _bars(rows)
    if set(args.networks) != set(NETWORKS):
        return 0 if all(bars.values()) else 1
    return write_result("surgery-complete", bars, {"networks": rows})


def _bars(rows: list[dict[str, Any]]) -> dict[str, bool]:
    sets = [row["sets"] for row in rows]
    free = [row["independent"] for row in rows]
    judged = [row["independent"] for row in rows if row["network"] not in REPORTED_ONLY]
    return {
        "every weight row and column that touches a closed set is gone, and no other": all(
            not row.get("layers_not_as_they_should_be", True) for row in sets
        ),
        "no gate left where whole sets are closed": all(row.get("gates", [0, 1])[1] == 0 for row in sets),
        "independent masks: at least 99 % of the optimum": all(
            row.get("share_of_optimum", 0) >= ENOUGH for row in judged
        ),
        "exact with both kinds of masks": all(row.get("exact", False) for row in (*sets, *free)),
        "graphs valid, no operator type counted more often": not any(row.get("faults", True) for row in (*sets, *free)),
    }


if __name__ == "__main__":
    sys.exit(main())
