"""The gate sites of a gated graph: which channels each one closes, and what closing it changes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError
from polar_deploy.onnx_files import GATES, metadata

if TYPE_CHECKING:
    import onnx

STEP = 8  # channels from one measured width to the next
MOST_WIDTHS = 16  # of one layer: above 128 channels the steps are larger
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


def widths(width: int) -> list[int]:
    """The widths at which a layer of `width` channels is measured, ascending; the last is its own.

    In steps of 8, or a multiple of it where that would be more than `MOST_WIDTHS`; of 4 below 16 channels.
    """
    step = STEP * ceil(width / (STEP * MOST_WIDTHS)) if width >= 2 * STEP else STEP // 2
    return [*range(step, width, step), width]


def own_constants(model: onnx.ModelProto, path: Path) -> tuple[list[onnx.TensorProto], list[Site]]:
    """The masks' constants, an own one put in for each, as the exporter merges those that are equal; and the sites."""
    from onnx import numpy_helper

    known = {tensor.name: tensor for tensor in model.graph.initializer}
    constants: list[onnx.TensorProto] = []
    sites: dict[str, Site] = {}
    for node in model.graph.node:
        told = metadata(node).get(GATES)
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
            f"{path} has no gate: no node's metadata {GATES} tells of one",
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
            f"{where}: metadata {GATES} cannot be read: {type(error).__name__}: {error}", _AGAIN
        ) from None


def _part(runs: Sequence[tuple[int, int, int, int]], mask: int, size: int, width: int) -> Part:
    """From runs [first channel, first gate, channels, step from gate to gate]."""
    channels = [first + i for first, _, count, _ in runs for i in range(count)]
    gates = [gate + i * step for _, gate, count, step in runs for i in range(count)]
    if not channels or min(channels) < 0 or max(channels) >= size or min(gates) < 0 or max(gates) >= width:
        raise ValueError(f"runs {str(runs)[:80]} for {size} channels and {width} gates")
    return Part(mask, np.array(channels, np.int64), np.array(gates, np.int64))


def set_gates(constants: Sequence[onnx.TensorProto], sites: Sequence[Site], opened: Mapping[str, int]) -> None:
    """Write into the masks how many gates of each site are open, the first ones; those not named are all open."""
    from onnx import helper

    values = [np.ones(math.prod(constant.dims), bool) for constant in constants]
    for site in sites:
        for part in site.parts:
            values[part.mask][part.channels] = part.gates < opened.get(site.name, site.width)
    for constant, each in zip(constants, values, strict=True):
        constant.raw_data = each.astype(helper.tensor_dtype_to_np_dtype(constant.data_type)).tobytes()


def probed(model: onnx.ModelProto, constants: Sequence[onnx.TensorProto], sites: Sequence[Site], site: Site) -> Site:
    """`site` with the layers that change when it is cut."""
    from polar_deploy.surgery import compress

    set_gates(constants, sites, {site.name: site.probe})
    layers: dict[str, Change] = {}
    for row in compress(model, verify=False).report["layers"]:
        pairs = [(before, after) for before, after in (row["in"], row["out"], row["macs"], row["params"])]
        if any(before != after for before, after in pairs):
            layers[row["name"]] = Change(row["operator"], *pairs)
    return replace(site, layers=layers)
