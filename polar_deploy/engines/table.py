"""latency-table.json: what each gate site of a network costs on a target, at each width that matters.

    python -m polar_deploy.engines table GATED.onnx --target ort-fp32 --out latency-table.json

A site is measured inside its network: its gate is set to so many ones, surgery cuts the graph, the target's own
backend builds the engine, and that is timed in pairs against the engine of the whole network. So fusions, layouts and
padding are in the figure, and no operator needs a rule. Sites whose cut changes layers of the same shapes are cut all
at once, and the difference is divided by their number: a larger signal, and fewer engines. Where two sites meet in a
layer (its input and its output), both are also cut together, which tells how much of the two savings is the same: the
overlap. Again, pairs of the same shapes are cut at once.

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
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from polar_deploy import targets
from polar_deploy.engines import Array, build, load, machine, network, timing
from polar_deploy.errors import ContentError, MachineError, UsageError
from polar_deploy.latency import SCHEMA, LatencyTable, ascending, parsed
from polar_deploy.workspace import write_json

if TYPE_CHECKING:
    import onnx

    from polar_deploy.config import Build
    from polar_deploy.engines import Engine

STEP = 8  # channels from one measured width to the next
MOST_WIDTHS = 16  # of one layer: above 128 channels the steps are larger
PAIRS = 60  # samples of each engine
NOISE_IMAGES = 16  # that calibrate an INT8 network: latency depends on types, and not on ranges
ANY_ERROR = 1e9
_SECONDS = (0.4, 2.0)  # least and most time that a comparison spends in inferences
MEETINGS = 4  # a site that meets more others than these is a hub
_GATES = "polar_deploy.gates"  # metadata of a mask's Mul, as `polar_deploy.gating.deploy` writes it
_AGAIN = "give the gated/model.onnx of the export stage, before any other tool has changed it"
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """What a cut makes of a layer: (before, after) of its widths, MACs and parameters."""

    operator: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]

    @property
    def removed(self) -> bool:
        """Whether the layer goes altogether."""
        return self.macs[1] == 0

    @property
    def lost(self) -> float:
        """Share of the MACs that goes."""
        return _lost(self.macs)

    @property
    def sides(self) -> tuple[float, float]:
        """Shares of inputs and outputs that go; where MACs are no product of the two (depthwise), all on one side."""
        inputs, outputs = _lost(self.inputs), _lost(self.outputs)
        product = math.isclose((1 - inputs) * (1 - outputs), 1 - self.lost, abs_tol=1e-6)
        return (inputs, outputs) if product else (0.0, self.lost)

    def shared(self, other: Change) -> float:
        """MACs of the layer that this cut and another one both save: of inputs times outputs, what both take."""
        if self.removed or other.removed:
            return self.macs[0] * self.lost * other.lost
        (a_in, a_out), (b_in, b_out) = self.sides, other.sides
        return self.macs[0] * (a_in * b_out + b_in * a_out)


def _lost(pair: tuple[int, int]) -> float:
    return 1 - pair[1] / pair[0] if pair[0] else 0.0


@dataclass(frozen=True, eq=False)
class Part:
    """The channels of one mask that one site closes: int [channels], their positions and the gate of each."""

    mask: int
    channels: _Ints = field(repr=False)
    gates: _Ints = field(repr=False)


@dataclass(frozen=True, eq=False)
class Site:
    """Gates of one name, in all masks that they close, and what cutting them changes.

    `width` is the number of gates, a block's is 1. `layers` are those whose widths change, by name.
    """

    name: str
    kind: str
    width: int
    parts: tuple[Part, ...]
    layers: Mapping[str, Change] = field(default_factory=dict)

    @property
    def alike(self) -> object:
        """Equal for sites that cost the same."""
        return self.kind, self.width, tuple(sorted(map(repr, self.layers.values())))

    @property
    def removed(self) -> frozenset[str]:
        """The layers that go altogether when it closes."""
        return frozenset(name for name, change in self.layers.items() if change.removed)

    @property
    def saves(self) -> int:
        """MACs that the probe saves."""
        return sum(change.macs[0] - change.macs[1] for change in self.layers.values())

    @property
    def probe(self) -> int:
        """How many gates stay open to see what the site changes: a quarter, so that the signal is large; no block."""
        if self.kind == "block":
            return 0
        measured = widths(self.width)[:-1] or [max(1, self.width // 2)]
        return min(measured, key=lambda width: abs(width - self.width // 4))

    def holds(self, other: Site) -> bool:
        """Whether closing this block removes all that `other` could save."""
        inside = other.layers.keys() <= self.removed
        return self.kind == "block" and inside and (other.kind != "block" or other.removed < self.removed)

    def meets(self, other: Site) -> bool:
        """Whether a layer depends on both."""
        return not self.layers.keys().isdisjoint(other.layers)

    def beside(self, other: Site) -> bool:
        """Whether a layer reads, or writes, channels of both: its width there is the sum of theirs."""
        both = [(self.layers[name], other.layers[name]) for name in self.layers.keys() & other.layers.keys()]
        return any(
            a > 0 and b > 0
            for one, two in both
            if not (one.removed or two.removed)
            for a, b in zip(one.sides, two.sides, strict=True)
        )

    def closed(self, opened: int) -> float:
        """How many gates are closed, in terms of those that the probe closes."""
        return (self.width - opened) / (self.width - self.probe)

    def shared(self, other: Site) -> float:
        """MACs that the probes of both save twice, by the count."""
        both = self.layers.keys() & other.layers.keys()
        return sum(self.layers[name].shared(other.layers[name]) for name in both)


_Pair = tuple[Site, Site]
_Sites = TypeVar("_Sites", bound=tuple[Site, ...])


@dataclass(frozen=True)
class Group:
    """Pairs of sites whose overlaps are measured as one sum.

    `cut`: the pairs that are in the sum; `even`: whether it is shared out evenly, and not by MACs.
    """

    pairs: Sequence[_Pair]
    cut: Sequence[_Pair]
    even: bool


def measure(
    gated_onnx: Path,
    target: targets.Target,
    *,
    batch: int = 1,
    options: Build | None = None,
    calibration: Array | None = None,
    likely: Callable[[LatencyTable], Sequence[Mapping[str, int]]] = lambda table: (),
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure a gated network on `target` and return the content of latency-table.json.

    Args:
        gated_onnx: an FP32 network whose gates are products with constants, as the export stage writes it. Which of
            them are open does not matter, nor do the weights.
        target: what to build for; it has to run here.
        batch: images in one inference.
        options: how engines are built; None: for this batch alone.
        calibration: normalised images [N,C,H,W] for an INT8 target; None: noise, which gives the same layers.
        likely: sub-networks that may be chosen by this table, as open gates of all its sites: they are measured, too,
            as checks.
        tell: is told about the progress.

    Raises:
        UsageError: no such file. MachineError: the target cannot be built or run here.
        ContentError: the file is no network that the target can run, or has no gates.
    """
    start = time.monotonic()
    with TemporaryDirectory(prefix="polar_deploy-") as folder:
        bench = Bench(gated_onnx, Path(folder), target, batch, options, calibration)
        tell(f"{len(bench.sites)} sites of {len(bench.kinds())} kinds")
        curves: dict[str, dict[int, float]] = {}
        for kind in bench.kinds():
            curves |= bench.curves(kind)
            tell(f"{kind[0].kind} {kind[0].name} and {len(kind) - 1} more: {len(bench.rounds)} engines timed")
        overlaps = bench.overlaps(curves)
        document = {
            "schema": SCHEMA,
            "target": target.name,
            "batch": batch,
            "machine": machine.describe(),
            "device": bench.full.conditions(),
            "throttled": sorted({reason for each in bench.rounds for reason in each.throttled}),
            "versions": bench.versions,
            "engines": len(bench.rounds) + 1,
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
        document["checks"] = [
            {
                "predicted_ms": round(table.predicted_ms(state), 6),
                "ms": round(table.full_ms * (1 - bench.saved(state)), 6),
            }
            for state in likely(table)
        ]
        return document | {"seconds": round(time.monotonic() - start, 1)}


def _entry(site: Site, curve: Mapping[int, float], bench: Bench) -> dict[str, Any]:
    return {
        "name": site.name,
        "kind": site.kind,
        "width": site.width,
        "widths": list(curve),
        "ms": [bench.milliseconds(saved) for saved in curve.values()],
        "within": [block.name for block in bench.sites if block.holds(site)],
    }


def widths(width: int) -> list[int]:
    """The widths at which a layer of `width` channels is measured, ascending; the last is its own.

    In steps of 8, or a multiple of it where that would be more than `MOST_WIDTHS`; of 4 below 16 channels.
    """
    step = STEP * ceil(width / (STEP * MOST_WIDTHS)) if width >= 2 * STEP else STEP // 2
    return [*range(step, width, step), width]


class Bench:
    """A gated network that is cut, built for a target and timed against the whole one.

    `rounds` are the measurements so far, `versions` those of the libraries. The arguments are those of `measure`;
    `folder` is for its files.
    """

    def __init__(
        self,
        gated_onnx: Path,
        folder: Path,
        target: targets.Target,
        batch: int = 1,
        options: Build | None = None,
        calibration: Array | None = None,
    ) -> None:
        from polar_deploy.config import Build

        targets.check(target)
        if lacks := targets.lacks_to_run(target):
            raise MachineError(
                f"{target.name} cannot be measured here: {'; '.join(lacks)}",
                "measure on the device; `python -m polar_deploy.engines doctor` says what can run here",
            )
        self.folder, self.target, self.batch = folder, target, batch
        # Which layers of an INT8 network are too inexact depends on weights and images: here all are INT8.
        self.options = (options or Build(batches=(batch, batch, batch))).model_copy(
            update={"max_layer_error": ANY_ERROR}
        )
        self.model = network.read(gated_onnx)
        self.constants, gates = _own_constants(self.model, gated_onnx)
        self.sites = [_probed(self.model, self.constants, gates, site) for site in gates]
        self.hubs = _hubs(self.sites)
        self.rounds: list[timing.Round] = []
        self.versions: dict[str, str] = {}
        random = np.random.default_rng(0)
        shape = [axis.dim_value for axis in self.model.graph.input[0].type.tensor_type.shape.dim[1:]]
        self.images = random.standard_normal((batch, *shape), np.float32)
        self.calibration = calibration
        if target.precision == "int8" and calibration is None:
            self.calibration = random.standard_normal((NOISE_IMAGES, *shape), np.float32)
        self.full = self._engine("full", {})

    def kinds(self) -> list[list[Site]]:
        """The sites: those that cost the same together, and hubs that stand side by side."""
        kinds: dict[object, list[Site]] = {}
        for site in self.sites:
            if site.name not in self.hubs:
                kinds.setdefault(site.alike, []).append(site)
        return [*_side_by_side([site for site in self.sites if site.name in self.hubs]), *kinds.values()]

    def milliseconds(self, saved: float) -> float:
        """Of one inference that takes so much less, as a share, than the whole network."""
        return round(statistics.median(each.a.median_ms for each in self.rounds) * (1 - saved), 6)

    def saved(self, opened: Mapping[str, int]) -> float:
        """Share of the whole network's time that is saved when these sites have so many gates open, the others all."""
        done = timing.compare(self.full, self._engine("cut", opened), self.images, pairs=PAIRS, seconds=_SECONDS)
        self.rounds.append(done.best)
        return 1 - 1 / done.best.speedup.median

    def curves(self, kind: Sequence[Site]) -> dict[str, dict[int, float]]:
        """For each site of a kind: open gates -> share of the time that this site saves."""
        if len(kind) > 1 and kind[0].name in self.hubs:
            return self._shared_curves(kind)
        members = [site.name for (site,) in _apart([(site,) for site in kind])]
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
            every.append(self.saved(opened) / _counted(hubs, opened))
            for name, each in opened.items():
                rates[name].setdefault(each, []).append(every[-1])
        return {site.name: _at_rates(site, rates[site.name], every) for site in hubs}

    def overlaps(self, curves: Mapping[str, Mapping[int, float]]) -> dict[tuple[str, str], tuple[list[int], float]]:
        """For each two sites that meet in a layer: open gates of both -> share of the time that both save together."""
        saves = {site.name: _monotone(curves[site.name]).get(site.probe, 0.0) for site in self.sites}
        pairs = [pair for pair in _meetings(self.sites) if all(site.probe in curves[site.name] for site in pair)]
        twice: dict[_Pair, float] = {}
        for group in _groups(pairs, self.hubs):
            weights = {pair: 1.0 if group.even else _expected(*pair, saves) for pair in group.pairs}
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

    def _hub_first(self, pair: _Pair) -> _Pair:
        return pair if pair[0].name in self.hubs else (pair[1], pair[0])

    def _sum_of_overlaps(self, group: Group, saves: Mapping[str, float], known: Mapping[_Pair, float]) -> float:
        """What the sites of a group save twice, all cut at once, without the overlaps among them that are known."""
        opened = {site.name: site.probe for pair in group.cut for site in pair}
        inner = sum(both for (a, b), both in known.items() if a.name in opened and b.name in opened)
        return max(0.0, sum(saves[name] for name in opened) - self.saved(opened) - inner)

    def _engine(self, name: str, opened: Mapping[str, int]) -> Engine:
        import onnx

        from polar_deploy.surgery import compress

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        _set_gates(self.constants, self.sites, opened)
        onnx.save(compress(self.model, verify=False).model, folder / "source.onnx")
        entry = build(folder / "source.onnx", folder, name, self.target, self.options, self.calibration)
        write_json(folder / "build.json", {"schema": 1, "target": self.target.name, "engines": {name: entry}})
        self.versions = entry["versions"]
        return load(folder, name, self.target)


def _own_constants(model: onnx.ModelProto, path: Path) -> tuple[list[onnx.TensorProto], list[Site]]:
    """The masks' constants, an own one put in for each, as the exporter merges those that are equal; and the sites."""
    from onnx import numpy_helper

    known = {tensor.name: tensor for tensor in model.graph.initializer}
    constants: list[onnx.TensorProto] = []
    sites: dict[str, Site] = {}
    for node in model.graph.node:
        told = next((each.value for each in node.metadata_props if each.key == _GATES), None)
        if told is None:
            continue
        index = next((i for i, name in enumerate(node.input) if name in known), None)
        if index is None or node.op_type != "Mul":
            raise ContentError(
                f"{path}: the mask of the gates {told[:80]} (node {node.name!r}, operator {node.op_type}) is no "
                "Mul by a constant",
                _AGAIN,
            )
        values = np.ones_like(numpy_helper.to_array(known[node.input[index]]))
        for site in _noted(told, len(constants), values.size, f"{path}: node {node.name!r}"):
            first = sites.setdefault(site.name, replace(site, parts=()))
            if (first.kind, first.width) != (site.kind, site.width):
                raise ContentError(f"{path}: node {node.name!r}: {site.name!r} has another width or kind here", _AGAIN)
            sites[site.name] = replace(first, parts=(*first.parts, *site.parts))
        own = numpy_helper.from_array(values, f"polar_deploy.gate.{len(constants)}")
        node.input[index] = own.name
        model.graph.initializer.append(own)
        constants.append(model.graph.initializer[-1])
    if not sites:
        raise ContentError(
            f"{path} has no gate: no node's metadata {_GATES} tells of one",
            "give the gated/model.onnx of the export stage",
        )
    return constants, list(sites.values())


def _noted(told: str, mask: int, size: int, where: str) -> list[Site]:
    """The sites that the metadata of a mask of `size` channels tells of, with this mask as their only part."""
    try:
        sites = []
        for name, each in json.loads(told).items():
            kind, width = each["kind"], int(each["width"])
            if kind not in ("channel", "stream", "block") or (kind == "block" and width != 1):
                raise ValueError(f"{name!r} is a {kind} of width {width}")
            sites.append(Site(name, kind, width, (_part(each["runs"], mask, size, width),)))
        return sites
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ContentError(
            f"{where}: metadata {_GATES} cannot be read: {type(error).__name__}: {error}", _AGAIN
        ) from None


def _part(runs: Sequence[tuple[int, int, int, int]], mask: int, size: int, width: int) -> Part:
    """From runs [first channel, first gate, channels, step from gate to gate]."""
    channels = [first + i for first, _, count, _ in runs for i in range(count)]
    gates = [gate + i * step for _, gate, count, step in runs for i in range(count)]
    if not channels or min(channels) < 0 or max(channels) >= size or min(gates) < 0 or max(gates) >= width:
        raise ValueError(f"runs {str(runs)[:80]} for {size} channels and {width} gates")
    return Part(mask, np.array(channels, np.int64), np.array(gates, np.int64))


def _set_gates(constants: Sequence[onnx.TensorProto], sites: Sequence[Site], opened: Mapping[str, int]) -> None:
    """Write into the masks how many gates of each site are open, the first ones; those not named are all open."""
    from onnx import helper

    values = [np.ones(math.prod(constant.dims), bool) for constant in constants]
    for site in sites:
        for part in site.parts:
            values[part.mask][part.channels] = part.gates < opened.get(site.name, site.width)
    for constant, each in zip(constants, values, strict=True):
        constant.raw_data = each.astype(helper.tensor_dtype_to_np_dtype(constant.data_type)).tobytes()


def _meetings(sites: Sequence[Site]) -> Iterator[_Pair]:
    """Each two sites that meet in a layer, unless one holds the other."""
    for a, b in combinations(sites, 2):
        if a.meets(b) and not a.holds(b) and not b.holds(a):
            yield a, b


def _hubs(sites: Sequence[Site]) -> frozenset[str]:
    """Names of the sites, no blocks, that meet more than `MEETINGS` others."""
    meetings = Counter(site.name for pair in _meetings(sites) for site in pair if site.kind != "block")
    return frozenset(name for name, number in meetings.items() if number > MEETINGS)


def _side_by_side(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that stand side by side, at once or through others, together."""
    bundles: list[list[Site]] = []
    for site in sites:
        near = [bundle for bundle in bundles if any(site.beside(other) for other in bundle)]
        bundles = [bundle for bundle in bundles if bundle not in near] + [[*chain.from_iterable(near), site]]
    return bundles


def _groups(pairs: Sequence[_Pair], hubs: frozenset[str]) -> list[Group]:
    """The sums of overlaps to measure: those of pairs of one kind, of hubs with each other, of hubs with channel sites.

    A sum is known before it is in another one. Those of hubs with blocks are not measured.
    """
    kinds: dict[object, list[_Pair]] = {}
    for a, b in pairs:
        if hubs.isdisjoint((a.name, b.name)):
            kinds.setdefault((a.alike, b.alike), []).append((a, b))
    channels = [(a, b) for a, b in pairs if "block" not in (a.kind, b.kind)]
    between = [(a, b) for a, b in channels if hubs.issuperset((a.name, b.name))]
    mixed = [(a, b) for a, b in channels if (a.name in hubs) != (b.name in hubs)]
    alone = [Group(each, _apart(each), True) for each in kinds.values()]
    return [*alone, Group(between, between, False), Group(mixed, mixed, False)]


def _expected(a: Site, b: Site, saves: Mapping[str, float]) -> float:
    """What the probes of two sites save twice, by the count; a MAC's time is the geometric mean of the two sites'."""
    if not (shared := a.shared(b)):
        return 0.0
    return shared * math.sqrt(saves[a.name] / a.saves * saves[b.name] / b.saves)


def _counted(sites: Sequence[Site], opened: Mapping[str, int]) -> float:
    """MACs that these sites save together, as the probes of each one tell."""
    closed = {site.name: site.closed(opened[site.name]) for site in sites}
    twice = sum(a.shared(b) * closed[a.name] * closed[b.name] for a, b in combinations(sites, 2))
    return sum(site.saves * closed[site.name] for site in sites) - twice


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


def _apart(groups: Sequence[_Sites]) -> list[_Sites]:
    """Groups of sites, as many as possible in order, of which no two meet in a layer: their savings just add up."""
    chosen: list[_Sites] = []
    for group in groups:
        others = [site for each in chosen for site in each]
        if not any(site.meets(other) for site in group for other in others):
            chosen.append(group)
    return chosen


def _probed(model: onnx.ModelProto, constants: Sequence[onnx.TensorProto], sites: Sequence[Site], site: Site) -> Site:
    """`site` with the layers that change when it is cut."""
    from polar_deploy.surgery import compress

    _set_gates(constants, sites, {site.name: site.probe})
    layers: dict[str, Change] = {}
    for row in compress(model, verify=False).report["layers"]:
        pairs = [(before, after) for before, after in (row["in"], row["out"], row["macs"], row["params"])]
        if any(before != after for before, after in pairs):
            layers[row["name"]] = Change(row["operator"], *pairs)
    return replace(site, layers=layers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m polar_deploy.engines table`."""
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
        tell=lambda message: print(message, file=sys.stderr),
    )
    write_json(arguments.out, table)
    noise = table["noise"]
    print(
        f"{arguments.out}: {len(table['sites'])} sites, {table['engines']} engines, {table['seconds']:.0f} s; "
        f"full network {table['full_ms']:.3f} ms, control off by {100 * noise['median']:.1f} % (worst "
        f"{100 * noise['worst']:.1f} %)"
    )
    return 0
