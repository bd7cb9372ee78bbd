"""latency-table.json: what each gate site of a network costs on a target, at each width that matters.

    python -m polar_deploy.engines table GATED.onnx --target ort-fp32 --out latency-table.json

A site is measured inside its network: its gate is set to so many ones, surgery cuts the graph, the target's own
backend builds the engine, and that is timed in pairs against the engine of the whole network. So fusions, layouts and
padding are in the figure, and no operator needs a rule. Sites whose cut changes layers of the same shapes are cut all
at once, and the difference is divided by their number: a larger signal, and fewer engines. Where two sites meet in a
layer (its input and its output), both are also cut together, which tells how much of the two savings is the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy import targets
from polar_deploy.engines import Array, build, load, machine, network, timing
from polar_deploy.errors import ContentError, MachineError, UsageError
from polar_deploy.latency import SCHEMA
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
_SECONDS = (1.0, 4.0)  # least and most time that a comparison spends in inferences
_SITE, _KIND = "polar_deploy.site", "polar_deploy.kind"  # metadata of a gate's Mul, as the export stage writes it
_Shape = tuple[object, ...]  # of a layer: operator, widths, MACs, parameters


@dataclass(frozen=True)
class Site:
    """One gate of the graph, and what cutting it changes.

    `layers` are those whose widths change, by name; `removed` those that go altogether when it closes.
    """

    name: str
    kind: str
    width: int
    constant: onnx.TensorProto
    layers: Mapping[str, _Shape] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()

    @property
    def alike(self) -> object:
        """Equal for sites that cost the same."""
        return self.kind, self.width, tuple(sorted(map(repr, self.layers.values())))

    @property
    def probe(self) -> int:
        """How many gates stay open to see what the site changes: half of the channels, no block."""
        return 0 if self.kind == "block" else max(1, self.width // 2)

    def holds(self, other: Site) -> bool:
        """Whether closing this block removes all that `other` could save."""
        inside = other.layers.keys() <= self.removed
        return self.kind == "block" and inside and (other.kind != "block" or other.removed < self.removed)

    def meets(self, other: Site) -> bool:
        """Whether a layer depends on both."""
        return not self.layers.keys().isdisjoint(other.layers)


def measure(
    gated_onnx: Path,
    target: targets.Target,
    *,
    batch: int = 1,
    options: Build | None = None,
    calibration: Array | None = None,
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
            tell(f"{kind[0].kind} {kind[0].name} and {len(kind) - 1} like it: {len(bench.rounds)} engines timed")
        overlaps = bench.overlaps(curves)
        return {
            "schema": SCHEMA,
            "target": target.name,
            "batch": batch,
            "machine": machine.describe(),
            "device": bench.full.conditions(),
            "throttled": sorted({reason for each in bench.rounds for reason in each.throttled}),
            "versions": bench.versions,
            "engines": len(bench.rounds) + 1,
            "seconds": round(time.monotonic() - start, 1),
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
        gates = _own_constants(self.model, gated_onnx)
        self.sites = [_probed(self.model, gates, site) for site in gates]
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
        """The sites, those that cost the same together."""
        kinds: dict[object, list[Site]] = {}
        for site in self.sites:
            kinds.setdefault(site.alike, []).append(site)
        return list(kinds.values())

    def milliseconds(self, saved: float) -> float:
        """Of one inference that takes so much less, as a share, than the whole network."""
        return round(statistics.median(each.a.median_ms for each in self.rounds) * (1 - saved), 6)

    def saved(self, opened: Mapping[str, int]) -> float:
        """Share of the whole network's time that is saved when these sites have so many gates open, the others all."""
        done = timing.compare(self.full, self._engine("cut", opened), self.images, pairs=PAIRS, seconds=_SECONDS)
        self.rounds.append(done.best)
        return 1 - 1 / done.best.speedup.median

    def curves(self, kind: Sequence[Site]) -> dict[str, dict[int, float]]:
        """For each of some sites that are alike: open gates -> share of the time that this site saves."""
        members = [site.name for (site,) in _apart([(site,) for site in kind])]
        most = 1 if kind[0].kind == "block" else kind[0].width
        choices = [0, 1] if kind[0].kind == "block" else widths(kind[0].width)
        curve = {w: self.saved(dict.fromkeys(members, w)) / len(members) if w < most else 0.0 for w in choices}
        return {site.name: curve for site in kind}

    def overlaps(self, curves: Mapping[str, Mapping[int, float]]) -> dict[tuple[str, str], tuple[list[int], float]]:
        """For each two sites that meet in a layer: open gates of both -> share of the time that both save together."""
        kinds: dict[object, list[tuple[Site, Site]]] = {}
        for pair in combinations(self.sites, 2):
            a, b = pair
            if a.meets(b) and not a.holds(b) and not b.holds(a):
                kinds.setdefault((a.alike, b.alike), []).append(pair)
        found: dict[tuple[str, str], tuple[list[int], float]] = {}
        for pairs in kinds.values():
            few = [_nearest(curves[site.name], site.probe // 2) for site in pairs[0]]  # a deep cut: a large signal
            chosen = _apart(pairs)
            opened = {site.name: w for pair in chosen for site, w in zip(pair, few, strict=True)}
            both = self.saved(opened) / len(chosen)
            found |= {(a.name, b.name): (few, both) for a, b in pairs}
        return found

    def _engine(self, name: str, opened: Mapping[str, int]) -> Engine:
        import onnx

        from polar_deploy.surgery import compress

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        _set_gates(self.sites, opened)
        onnx.save(compress(self.model, verify=False).model, folder / "source.onnx")
        entry = build(folder / "source.onnx", folder, name, self.target, self.options, self.calibration)
        write_json(folder / "build.json", {"schema": 1, "target": self.target.name, "engines": {name: entry}})
        self.versions = entry["versions"]
        return load(folder, name, self.target)


def _own_constants(model: onnx.ModelProto, path: Path) -> list[Site]:
    """The gates of a graph, each with a constant of its own put in: the exporter merges those that are equal."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sites: list[Site] = []
    for node in model.graph.node:
        notes = {each.key: each.value for each in node.metadata_props}
        if _SITE not in notes:
            continue
        index = next((i for i, name in enumerate(node.input) if name in constants), None)
        if index is None or node.op_type != "Mul":
            raise ContentError(
                f"{path}: gate {notes[_SITE]!r} (node {node.name!r}, operator {node.op_type}) is no Mul by a constant",
                "give the gated/model.onnx of the export stage, before any other tool has changed it",
            )
        values = np.ones_like(numpy_helper.to_array(constants[node.input[index]]))
        own = numpy_helper.from_array(values, f"polar_deploy.gate.{len(sites)}")
        node.input[index] = own.name
        model.graph.initializer.append(own)
        sites.append(Site(notes[_SITE], notes.get(_KIND, "channel"), values.size, model.graph.initializer[-1]))
    if not sites:
        raise ContentError(
            f"{path} has no gate: no node's metadata has {_SITE}", "give the gated/model.onnx of the export stage"
        )
    return sites


def _set_gates(sites: Sequence[Site], opened: Mapping[str, int]) -> None:
    """Write into the model how many gates of each site are open, the first ones; those not named are all open."""
    for site in sites:
        count = opened.get(site.name, site.width)
        values = np.arange(site.width) < (count * site.width if site.kind == "block" else count)
        site.constant.raw_data = values.astype(np.float32).tobytes()


def _apart(groups: Sequence[tuple[Site, ...]]) -> list[tuple[Site, ...]]:
    """Groups of sites, as many as possible in order, of which no two meet in a layer: their savings just add up."""
    chosen: list[tuple[Site, ...]] = []
    for group in groups:
        others = [site for each in chosen for site in each]
        if not any(site.meets(other) for site in group for other in others):
            chosen.append(group)
    return chosen


def _nearest(curve: Mapping[int, float], wanted: int) -> int:
    return min(curve, key=lambda width: abs(width - wanted))


def _probed(model: onnx.ModelProto, sites: Sequence[Site], site: Site) -> Site:
    """`site` with the layers that change when it is cut."""
    from polar_deploy.surgery import compress

    _set_gates(sites, {site.name: site.probe})
    layers, removed = {}, set()
    for row in compress(model, verify=False).report["layers"]:
        if (changed := (row["in"], row["out"], row["macs"], row["params"])) and any(old != new for old, new in changed):
            layers[row["name"]] = (row["operator"], *(number for pair in changed for number in pair))
            removed |= {row["name"]} if row["macs"][1] == 0 else set()
    return replace(site, layers=layers, removed=frozenset(removed))


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
