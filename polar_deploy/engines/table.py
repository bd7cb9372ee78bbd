"""latency-table.json: what each gate site of a network costs on a target, at each width that matters.

    polar-deploy engines table GATED.onnx --target ort-fp32 --out latency-table.json

A site is measured inside its network: its gate is set to so many ones, surgery cuts the graph, the target's own
backend builds the engine, and that is timed in pairs against the engine of the whole network. So fusions, layouts and
padding are in the figure, and no operator needs a rule. Each comparison loads copies of its own: were there one copy of
the whole network for all, and 3 % slower than others by where it lies in memory, each kind of site would seem to save
those 3 %. Sites whose cut changes layers of the same shapes are cut all at once, and the difference is divided by their
number: a larger signal, and fewer engines. Where two sites meet in a layer (its input and its output), both are also
cut together, which tells how much of the two savings is the same: the overlap. Again, pairs of the same shapes are cut
at once.

A residual stream, or a layer that many others read through concatenations, meets nearly all sites, in pairs of ever
other shapes: a *hub*. Measuring all those pairs would take hundreds of engines, so hubs are approximated with the help
of what surgery counts. All of it is exact where a layer's time follows its MACs.
- Hubs side by side, whose channels make up one tensor (streams that go on through padded shortcuts, concatenations),
  are cut together, each to the same share, and what that saves is shared out by MACs. One of them alone would show
  what an odd width costs: 24 channels may take longer than 32, while 16, when two of them are cut, take half as long.
- Of a hub's saving, its share of MACs in a block goes with the block. No engine is built for that.
- With channel sites: all hubs and all those sites are cut at once, in one engine. The sum of overlaps that this shows
  is shared out in proportion to the MACs that both of a pair save. So are overlaps of hubs with each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy import onnx_files, targets
from polar_deploy.documents.latency_table import MeasuredTable
from polar_deploy.documents.parity import Round
from polar_deploy.engines import Array, build, machine, open_built, timing
from polar_deploy.engines.overlaps import (
    Group,
    Pair,
    apart,
    counted_savings,
    expected_overlap,
    find_hubs,
    group_pairs,
    meeting_pairs,
    side_by_side,
)
from polar_deploy.engines.sites import Site, own_constants, probed, set_gates, widths
from polar_deploy.errors import MachineError, UsageError
from polar_deploy.latency import SCHEMA, LatencyTable, ascending, parsed

if TYPE_CHECKING:
    import onnx

    from polar_deploy.config import Build
    from polar_deploy.engines import Engine

ROUNDS = 2  # of a comparison, each with new copies of the engines
PAIRS = 30  # samples of each engine in a round
NOISE_SAMPLES = 16  # that calibrate an INT8 network: latency depends on types, and not on ranges
ANY_ERROR = 1e9
_SECONDS = (0.2, 1.0)  # least and most time that a round spends in inferences


def measure(
    gated_onnx: Path,
    target: targets.Target,
    *,
    batch: int = 1,
    options: Build | None = None,
    likely: Callable[[LatencyTable], Sequence[Mapping[str, int]]] = lambda table: (),
    on_progress: Callable[[str], None] = lambda message: None,
) -> MeasuredTable:
    """Measure a gated network on `target`.

    Args:
        gated_onnx: an FP32 network whose gates are products with constants, as the export stage writes it. Which of
            them are open does not matter, nor do the weights.
        target: what to build for; it has to run here.
        batch: samples in one inference.
        options: how engines are built; None: for this batch alone.
        likely: sub-networks that may be chosen by this table, as open gates of all its sites: they are measured, too,
            as checks.
        on_progress: is told about the progress.

    Raises:
        UsageError: no such file. MachineError: the target cannot be built or run here.
        DisturbedError: what was measured contradicts itself.
        ContentError: the file is no network that the target can run, or has no gates.
    """
    start = time.monotonic()
    with TemporaryDirectory(prefix="polar_deploy-") as folder:
        bench = Bench(gated_onnx, Path(folder), target, batch, options)
        on_progress(f"{len(bench.sites)} sites of {len(bench.kinds())} kinds")
        curves: dict[str, dict[int, float]] = {}
        for kind in bench.kinds():
            curves |= bench.curves(kind)
            on_progress(f"{kind[0].kind} {kind[0].name} and {len(kind) - 1} more: {bench.built - 1} engines timed")
        overlaps = bench.overlaps(curves)
        state = bench.full.conditions()
        document = {
            "schema": SCHEMA,
            "target": target.name,
            "batch": batch,
            "machine": machine.describe().as_json(),
            "device": state and state.as_json(),
            "throttled": sorted({reason for each in bench.rounds for reason in each.throttled}),
            "versions": bench.versions,
            "engines": bench.built,
            "noise": {
                "median": round(statistics.median(each.noise for each in bench.rounds), 6),
                "worst": round(max(each.noise for each in bench.rounds), 6),
            },
            "full_ms": bench.milliseconds(0.0),
            "sites": [_entry(site, curves[site.name], bench) for site in bench.sites],
            "overlaps": [
                {"sites": list(pair), "open": opened, "ms": bench.milliseconds(saved)}
                for pair, (opened, saved) in overlaps.items()
            ],
        }
        table = parsed(document)
        checks = [
            {
                "predicted_ms": round(table.predicted_ms(state), 6),
                "ms": round(table.full_ms * (1 - bench.saved(state)), 6),
            }
            for state in likely(table)
        ]
        return MeasuredTable.model_validate(
            document | {"checks": checks, "seconds": round(time.monotonic() - start, 1)}
        )


def _entry(site: Site, curve: Mapping[int, float], bench: Bench) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "width": site.width,
        "widths": list(curve),
        "ms": [bench.milliseconds(saved) for saved in curve.values()],
        "within": [block.name for block in bench.sites if block.holds(site)],
    }


def _noise(model: onnx.ModelProto, samples: int) -> dict[str, Array]:
    """Inputs of a network: normal numbers, and zeros where they are no floats, since those may be indices."""
    from onnx import helper

    draw, made = np.random.default_rng(0), {}
    for value in model.graph.input:
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        shape = (samples, *(axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim[1:]))
        made[value.name] = draw.standard_normal(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
    return made


class Bench:
    """A gated network that is cut, built for a target and timed against the whole one.

    `rounds` are the measurements so far, `built` is the number of engines, `versions` are those of the libraries. The
    arguments are those of `measure`; `folder` is for its files.
    """

    def __init__(
        self,
        gated_onnx: Path,
        folder: Path,
        target: targets.Target,
        batch: int = 1,
        options: Build | None = None,
    ) -> None:
        from polar_deploy.config import Build

        targets.check(target)
        if lacks := targets.lacks_to_run(target):
            raise MachineError(
                f"{target.name} cannot be measured here: {'; '.join(lacks)}",
                "measure on the device; `polar-deploy engines doctor` says what can run here",
            )
        self.folder, self.target, self.batch = folder, target, batch
        # Which layers of an INT8 network are too inexact depends on weights and images: here all are INT8.
        self.options = (options or Build(batches=(batch, batch, batch))).model_copy(
            update={"max_layer_error": ANY_ERROR}
        )
        self.model = onnx_files.read(gated_onnx)
        self.constants, self.gates = own_constants(self.model, gated_onnx)
        self.rounds: list[Round] = []
        self.built = 0
        self.versions: dict[str, str] = {}
        self.inputs = _noise(self.model, batch)
        self.calibration = _noise(self.model, NOISE_SAMPLES)
        self.full = self._engine("full", {})

    @cached_property
    def sites(self) -> list[Site]:
        """The gates, with what cutting each of them changes."""
        return [probed(self.model, self.constants, self.gates, site) for site in self.gates]

    @cached_property
    def hubs(self) -> frozenset[str]:
        """Sites that meet nearly all others."""
        return find_hubs(self.sites)

    def kinds(self) -> list[list[Site]]:
        """The sites: those that cost the same together, and hubs that stand side by side."""
        kinds: dict[object, list[Site]] = {}
        for site in self.sites:
            if site.name not in self.hubs:
                kinds.setdefault(site.alike, []).append(site)
        return [*side_by_side([site for site in self.sites if site.name in self.hubs]), *kinds.values()]

    def milliseconds(self, saved: float) -> float:
        """Of one inference that takes so much less, as a share, than the whole network."""
        return round(statistics.median(each.full.median_ms for each in self.rounds) * (1 - saved), 6)

    def saved(self, opened: Mapping[str, int]) -> float:
        """Share of the whole network's time that is saved when these sites have so many gates open, the others all."""
        cut = self._engine("cut", opened)
        rounds = timing.afresh(self.full, cut, self.inputs, rounds=ROUNDS, pairs=PAIRS, seconds=_SECONDS)
        self.rounds += rounds
        return 1 - 1 / statistics.geometric_mean(each.speedup_over_both for each in rounds)

    def curves(self, kind: Sequence[Site]) -> dict[str, dict[int, float]]:
        """For each site of a kind: open gates -> share of the time that this site saves."""
        if len(kind) > 1 and kind[0].name in self.hubs:
            return self._shared_curves(kind)
        members = [site.name for (site,) in apart([(site,) for site in kind])]
        full = kind[0].width
        choices = [0, 1] if kind[0].kind == "block" else widths(full)
        curve = {w: self.saved(dict.fromkeys(members, w)) / len(members) if w < full else 0.0 for w in choices}
        return {site.name: curve for site in kind}

    def _shared_curves(self, hubs: Sequence[Site]) -> dict[str, dict[int, float]]:
        """The curves of hubs side by side, all cut to the same share at once: what that saves for each MAC is equal."""
        widest = max(hubs, key=lambda site: site.width)
        rates: dict[str, dict[int, list[float]]] = {site.name: {} for site in hubs}
        every: list[float] = []
        for width in widths(widest.width)[:-1]:
            opened = {site.name: _nearest(site, width / widest.width) for site in hubs}
            every.append(self.saved(opened) / counted_savings(hubs, opened))
            for name, each in opened.items():
                rates[name].setdefault(each, []).append(every[-1])
        return {site.name: _at_rates(site, rates[site.name], every) for site in hubs}

    def overlaps(self, curves: Mapping[str, Mapping[int, float]]) -> dict[tuple[str, str], tuple[list[int], float]]:
        """For each two sites that meet in a layer: open gates of both -> share of the time that both save together."""
        saves = {site.name: _monotone(curves[site.name]).get(site.probe, 0.0) for site in self.sites}
        pairs = [pair for pair in meeting_pairs(self.sites) if all(site.probe in curves[site.name] for site in pair)]
        twice: dict[Pair, float] = {}
        for group in group_pairs(pairs, self.hubs):
            weights = {pair: 1.0 if group.even else expected_overlap(*pair, saves) for pair in group.pairs}
            if total := sum(weights[pair] for pair in group.cut):
                factor = self._sum_of_overlaps(group, saves, twice) / total
                twice |= {pair: factor * weight for pair, weight in weights.items()}
        for hub, block in map(self._hub_first, pairs):
            if hub.name in self.hubs and block.kind == "block" and hub.saves:
                twice[hub, block] = saves[hub.name] * hub.shared(block) / hub.saves
        return {
            (a.name, b.name): ([a.probe, b.probe], saves[a.name] + saves[b.name] - both)
            for (a, b), both in twice.items()
            if both > 0
        }

    def _hub_first(self, pair: Pair) -> Pair:
        return pair if pair[0].name in self.hubs else (pair[1], pair[0])

    def _sum_of_overlaps(self, group: Group, saves: Mapping[str, float], known: Mapping[Pair, float]) -> float:
        """What the sites of a group save twice, all cut at once, without the overlaps among them that are known."""
        opened = {site.name: site.probe for pair in group.cut for site in pair}
        inner = sum(both for (a, b), both in known.items() if a.name in opened and b.name in opened)
        return max(0.0, sum(saves[name] for name in opened) - self.saved(opened) - inner)

    def _engine(self, name: str, opened: Mapping[str, int]) -> Engine:
        from polar_deploy.surgery import compress, detached

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        set_gates(self.constants, self.gates, opened)
        detached.save(compress(self.model, verify=False).model, folder / "source.onnx")
        entry = build(folder / "source.onnx", folder, name, self.target, self.options, self.calibration)
        self.built += 1
        self.versions = entry.versions
        return open_built(entry, folder, name, self.target)


def _at_rates(site: Site, rates: Mapping[int, Sequence[float]], every: Sequence[float]) -> dict[int, float]:
    """A curve from what a MAC takes at some of its widths, and `every` one of these figures for widths without one."""
    smaller = widths(site.width)[:-1]
    curve = {width: site.saves * site.closed(width) * statistics.mean(rates.get(width, every)) for width in smaller}
    return curve | {site.width: 0.0}


def _nearest(site: Site, share: float) -> int:
    return min(widths(site.width), key=lambda width: abs(width - share * site.width))


def _monotone(curve: Mapping[int, float]) -> dict[int, float]:
    """A curve, open gates -> saving, as `polar_deploy.latency` reads it: never negative, and never rising."""
    cheapest_first = [-saved for saved in list(curve.values())[:-1]]
    return dict(zip(curve, [max(0.0, -each) for each in ascending(cheapest_first)] + [0.0], strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `polar-deploy engines table`."""
    add = parser.add_argument
    add("gated", metavar="GATED.onnx", type=Path, help="a gated network, such as a run's gated/model.onnx")
    add("--target", required=True, help="what it shall run on, such as ort-fp32; it has to run here")
    add("--out", metavar="FILE", type=Path, default=Path("latency-table.json"), help="default: latency-table.json")
    add("--batch", metavar="N", type=int, default=1, help="images in one inference (default: 1)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the table; say on stderr how far it is."""
    if arguments.batch < 1:
        raise UsageError(f"--batch is {arguments.batch}, but an inference takes at least one image", "use 1 or more")
    table = measure(
        arguments.gated,
        targets.choose() if arguments.target == "auto" else targets.parse(arguments.target),
        batch=arguments.batch,
        on_progress=lambda message: print(message, file=sys.stderr),
    )
    table.write(arguments.out)
    print(
        f"{arguments.out}: {len(table.sites)} sites, {table.engines} engines, {table.seconds:.0f} s; "
        f"full network {table.full_ms:.3f} ms, control off by {100 * table.noise.median:.1f} % (worst "
        f"{100 * table.noise.worst:.1f} %)"
    )
    return 0
