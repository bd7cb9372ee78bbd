"""The network as a picture: one column a layer, from input to output, what is left drawn into what was there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from polar_deploy.documents.report import Layer
from polar_deploy.report.svg import box, cut, joined, line, picture, tag, text

_LEFT, _MIDDLE, _HALF = 84.0, 96.0, 74.0  # of the columns, their axis, and the half height of the widest layer
_STRIPS = {"macs": (246.0, "MACs"), "params": (312.0, "parameters")}  # where each strip stands, and how it is called
_STRIP = 46.0


def skyline(layers: Sequence[Layer], blocks: int) -> Markup:
    """Layers of report.json's `network`; heights go with the root of the channels, strips with the cost itself.

    blocks: how many residual blocks were removed.
    """
    step = min(40.0, max(6.0, 850.0 / max(len(layers), 1)))
    width = _LEFT + step * len(layers) + 12
    removed = sum(not layer.outputs[1] for layer in layers)
    narrower = sum(0 < layer.outputs[1] < layer.outputs[0] for layer in layers)
    about = (
        f"{len(layers)} layers from input to output: {removed} removed with {blocks} residual blocks, {narrower} "
        f"narrower than before, {len(layers) - removed - narrower} as they were. The table below has the figures."
    )
    parts = [
        _hatching(),
        text(_LEFT - 8, _MIDDLE + 4, "channels", "end", "tick"),
        *(_layer(layer, _LEFT + step * index, step, layers) for index, layer in enumerate(layers)),
        *_bypasses(layers, step),
        *(_strip(layers, key, step) for key in _STRIPS),
        *_groups(layers, step),
    ]
    return picture("The network, layer by layer", about, width, 348, parts, wide=True)


def told(layer: Layer) -> str:
    """One layer in words."""
    before, after = layer.outputs
    if not after:
        return f"{layer.name} ({layer.operator}): removed, it had {before} channels"
    kept = f"{before} channels, all kept" if before == after else f"{before} → {after} channels"
    return f"{layer.name} ({layer.operator}): {kept}, {layer.macs[0]:,} → {layer.macs[1]:,} MACs"


def _layer(layer: Layer, x: float, step: float, layers: Sequence[Layer]) -> Markup:
    widest = max(each.outputs[0] for each in layers) or 1
    before, after = (_HALF * math.sqrt(width / widest) for width in layer.outputs)
    gap = min(3.0, step * 0.15)
    whole = box(
        x + gap, _MIDDLE - before, step - 2 * gap, 2 * before, "was" if layer.outputs[1] else "was removed", rx=2
    )
    left = box(x + gap, _MIDDLE - after, step - 2 * gap, 2 * after, "small", rx=2)
    label: tuple[Markup, ...] = ()
    if step >= 24:
        shown = str(layer.outputs[1]) if layer.outputs[1] else "–"
        label = (text(x + step / 2, _MIDDLE + _HALF + 16, shown, "middle", "number"),)
    return tag("g", tag("title", told(layer)), whole, left, *label)


def _bypasses(layers: Sequence[Layer], step: float) -> list[Markup]:
    """An arc over what each removed block had: its input goes straight on."""
    parts = []
    runs = groupby(enumerate(layers), key=lambda pair: pair[1].removed_block)
    for block, run in runs:
        if block is None:
            continue
        places = [index for index, _ in run]
        start, end = _LEFT + step * places[0], _LEFT + step * (places[-1] + 1)
        path = f"M{start:.1f} {_MIDDLE}C{start:.1f} 6 {end:.1f} 6 {end:.1f} {_MIDDLE}"
        parts.append(tag("path", tag("title", "block removed: its input goes straight on"), d=path, class_="bypass"))
    return parts


def _strip(layers: Sequence[Layer], key: str, step: float) -> Markup:
    """Bars of one cost, before and after."""
    floor, label = _STRIPS[key]
    most = max(getattr(layer, key)[0] for layer in layers) or 1
    parts = [line(_LEFT, floor, _LEFT + step * len(layers), floor, "axis")]
    for index, layer in enumerate(layers):
        before, after = (_STRIP * min(value / most, 1.0) for value in getattr(layer, key))
        x, gap = _LEFT + step * index, min(3.0, step * 0.15)
        about = f"{layer.name}: {getattr(layer, key)[0]:,} → {getattr(layer, key)[1]:,} {label}"
        parts.append(box(x + gap, floor - before, step - 2 * gap, before, "was", about))
        parts.append(box(x + gap, floor - after, step - 2 * gap, after, "small", about))
    return joined([text(_LEFT - 8, floor - 8, label, "end", "tick"), *parts])


def _groups(layers: Sequence[Layer], step: float) -> list[Markup]:
    """The parts of the network by the first word of their names, below all."""
    parts, start = [], 0
    for name, run in groupby(layers, key=lambda layer: layer.name.split(".")[0]):
        count = len(list(run))
        x, width = _LEFT + step * start, step * count
        if width >= 7.0 * min(len(name), 6):
            parts.append(line(x + 3, 324, x + width - 3, 324, "axis"))
            parts.append(text(x + width / 2, 340, cut(name, max(2, int(width / 6.5))), "middle", "tick"))
        start += count
    return parts


def _hatching() -> Markup:
    stripe = line(0, 0, 0, 6, "hatch")
    pattern = tag(
        "pattern", stripe, id="hatched", width=6, height=6, patternUnits="userSpaceOnUse", patternTransform="rotate(45)"
    )
    return tag("defs", pattern)
