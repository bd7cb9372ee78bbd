"""What widths cost in the layers of a network on a device, told from the sweeps in its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np

from polar_deploy.costs import Floats
from polar_deploy.devices.device import (
    AROUND_MANY,
    AROUND_ODD,
    AROUND_OFFERED,
    ELEMENTS,
    FINE,
    PERIOD,
    REFERENCE,
    Device,
    Kind,
    Precision,
    Sweep,
    worth_choosing,
)

PACK = 32  # channels; behind the widths that were asked one by one, the last so many repeat: they hold every pack
LEAST_DEPTHWISE = 0.1  # of what was measured of a depthwise layer between two others, that counts as its own
MOST_MOVED = 0.9  # of what a further channel costs, that may be its being moved
LEAST_SLOPE = 0.1  # of the cost of `REFERENCE` channels for as many more, however flat the costs are

Side = Literal["output", "input"]  # of a layer


@dataclass(frozen=True)
class WidthCosts:
    """What channels cost on a device in a precision that its file has."""

    device: Device
    precision: Precision

    def packed(self, widths: Floats, layer: Kind, side: Side) -> Floats:
        """Float [...], the channels that cost as much as `widths` do: `REFERENCE` are `REFERENCE`, and 0 are 0.

        Where the file knows writing and reading apart, they are in proportion to the costs that were asked, on straight
        lines between them and, above the widest one, on the line of the last period. Where it knows both together,
        channels count as they are, and what unkind widths cost besides is their `surcharge`.

        Args:
            widths: [...] >= 0, channels that a layer writes or reads.
            layer: a kind that was not asked costs as a 3 x 3 convolution.
            side: whether the layer writes or reads them.
        """
        known = self._costs(self._known(layer))
        if "between" in known:
            return widths
        costs = next(known[each] for each in (side, "both", *known) if each in known)
        asked, cost = np.array([*costs], float), np.array([*costs.values()])
        beyond = np.maximum(0.0, np.ceil((widths - asked[-1]) / PERIOD))
        growth = cost[-1] - np.interp(asked[-1] - PERIOD, asked, cost)
        found = np.interp(widths - beyond * PERIOD, asked, cost) + beyond * growth
        return np.where(widths > 0, REFERENCE * found / np.interp(REFERENCE, asked, cost), 0.0)

    def surcharge(self, widths: Floats, layer: Kind, beside_offered: bool) -> tuple[Floats, Floats]:
        """What reading channels costs a layer besides, in the unit of `each`: [...] in any case, [...] for each output.

        A width that is not on offer costs more than the line between those that are, as was asked among layers of few
        and of many channels. Where the layer writes a width that is not on offer either, it costs less: it leaves its
        fast kernels once. Behind the widths that were asked one by one, that is what its like costs among the last
        ones, and more by the `surcharge_growth` between the two.

        Args:
            widths: [...] >= 0, channels that a layer reads.
            layer: a kind that was not asked costs as a 3 x 3 convolution.
            beside_offered: whether the layer writes a width that is on offer.

        Returns:
            Zeros where the file knows writing and reading apart: then all is in `packed`.
        """
        kind = self._known(layer)
        if "between" not in self._costs(kind):
            return np.zeros_like(widths), np.zeros_like(widths)
        like = np.where(widths > FINE, (widths - FINE) % PACK + FINE - PACK, widths)
        growth = (widths > 0) * (1 + self.surcharge_growth * (widths - like) / np.maximum(like, 1.0))
        asked, *costs = self._surcharges[kind, beside_offered]
        fixed, for_each = (np.interp(like, asked, cost) * growth for cost in costs)
        return fixed, for_each

    def each(self, layer: Kind) -> float:
        """What a multiply-accumulate costs in a layer of `REFERENCE` channels, in the device's unit for the pixels of
        its sweeps: comparable between layers, and nothing else. A kind that was not asked costs as a 3 x 3 one."""
        steps, sides = self.device.staircase(self.precision, layer), self._costs(layer)
        if not steps:
            return self.each("conv3x3")
        if layer != "depthwise3x3":  # two layers
            both = REFERENCE * ELEMENTS[layer] * 2
            if "between" in sides:
                return (self._lines[layer][0] - 2 * self.moved(layer)) / both
            return _at_reference(steps) / (both * REFERENCE)
        cost = _at_reference(steps)
        if "both" not in sides:  # between two others
            around = self.device.staircase(self.precision, "conv1x1")
            cost = max(cost - (_at_reference(around) if around else 0.0), LEAST_DEPTHWISE * cost)
        return cost / (REFERENCE * ELEMENTS[layer])

    def moved(self, layer: Kind) -> float:
        """What a channel costs that a layer writes or reads, however much it multiplies, in the unit of `each`.

        Two layers with next to nothing between them still move `REFERENCE` channels in and as many out. Where the file
        knows writing and reading apart, this is part of their costs, and 0 here.
        """
        kind = self._known(layer)
        if kind not in self._lines or layer == "depthwise3x3":
            return 0.0
        slope, start = self._lines[kind]
        return min(max(start, 0.0) / (2 * REFERENCE), MOST_MOVED * slope / 2)

    def weight(self, layer: Kind) -> float:
        """What a weight costs, however many pixels it is multiplied with, in the unit of `each`: >= 0.

        It has to be fetched, and some kernels compute others from it first (Winograd's). Told by layers of many
        channels on maps of few pixels: what they cost beyond what their multiplications and moves do elsewhere, by
        least squares. A kind that was not asked costs as a 3 x 3 convolution; 0 where that was not asked either.
        """
        kind = layer if layer in self._of_many else "conv3x3"
        if kind not in self._of_many:
            return 0.0
        sweep = self._of_many[kind]
        widths = np.array(sweep.widths, float)
        weights = 2 * AROUND_MANY * ELEMENTS[kind] * widths
        elsewhere = self.each(kind) * weights + self.moved(kind) * 2 * (AROUND_MANY + widths)
        rest = np.array(sweep.cost) * self.device.map_area(self.precision) - sweep.pixels**2 * elsewhere
        return max(0.0, float(rest @ weights / (weights @ weights)))

    @property
    def added(self) -> float:
        """What an element costs that is a sum of two, in the unit of `each`; 0 where the file does not tell."""
        staircase = self.device.staircase(self.precision)
        return (self.device.addition or 0.0) * _at_reference(staircase) / (2 * REFERENCE)

    @property
    def weight_in_macs(self) -> float | None:
        """With how many multiplications a weight of a 3 x 3 convolution costs as much; None where it was not asked."""
        return self.weight("conv3x3") / self.each("conv3x3") if "conv3x3" in self._of_many else None

    @cached_property
    def _of_many(self) -> dict[Kind, Sweep]:
        return {sweep.layer: sweep for sweep in self._sweeps if sweep.around == AROUND_MANY}

    @property
    def _sweeps(self) -> list[Sweep]:
        return [sweep for sweep in self.device.sweeps if sweep.precision == self.precision]

    @cached_property
    def surcharge_growth(self) -> float:
        """How what a width costs above the line between those that are offered grows with the width, 0 to 1.

        0: it stays, as in a kernel that fills up its last block. 1: it grows in proportion, as where the whole layer
        leaves its fast kernels. Told by 3 x 3 convolutions of which a width and its like a period on were asked; 1
        where none were.
        """
        costs = self._costs("conv3x3").get("between")
        if costs is None:
            return 1.0
        found = self._above("conv3x3", np.array([*costs], float))[REFERENCE]
        above: dict[int, float] = dict(zip(costs, found.tolist(), strict=True))
        pairs = [(above[width], above[width + PERIOD], PERIOD / width) for width in above if width + PERIOD in above]
        if not any(near for near, _, _ in pairs):
            return 1.0
        # far = near * (1 + growth * wider), by least squares: what is hardly dearer than the line tells little
        growth = sum((far - near) * near * wider for near, far, wider in pairs)
        return min(1.0, max(0.0, growth / sum((near * wider) ** 2 for near, _, wider in pairs)))

    def _costs(self, layer: Kind) -> dict[str, dict[int, float]]:
        """What was asked of a kind of layer: costs by width, by what varies."""
        return self.device.swept(self.precision, layer)

    def _known(self, layer: Kind) -> Kind:
        """The kind of layer whose costs stand for `layer`."""
        return layer if self._costs(layer) else "conv3x3"

    @cached_property
    def _lines(self) -> dict[Kind, tuple[float, float]]:
        """See `_line`, of the kinds of layers between which widths were asked."""
        return {layer: _line(costs["between"]) for layer in ELEMENTS if "between" in (costs := self._costs(layer))}

    @cached_property
    def _surcharges(self) -> dict[tuple[Kind, bool], tuple[Floats, Floats, Floats]]:
        """See `surcharge`: the widths asked, what each costs in any case and what for each output, beside a width on
        offer (True) or not."""
        found: dict[tuple[Kind, bool], tuple[Floats, Floats, Floats]] = {}
        for layer in self._lines:
            asked = np.array([*self._costs(layer)["between"]], float)
            above = self._above(layer, asked)
            multiplied = REFERENCE * ELEMENTS[layer] * self.each(layer)
            by_outputs = partial(_by_outputs, share=multiplied / (multiplied + 2 * self.moved(layer)))
            fixed, each = by_outputs(above, *AROUND_OFFERED)
            found[layer, True] = found[layer, False] = asked, fixed, each
            if AROUND_ODD[0] in above:
                beside = {
                    odd: _beside_odd(odd, asked, above[odd], fixed, each) * (above[REFERENCE] > 0)
                    for odd in above.keys() & {*AROUND_ODD}
                }
                found[layer, False] = asked, *by_outputs(beside, *AROUND_ODD)
        return found

    def _above(self, layer: Kind, asked: Floats) -> dict[int, Floats]:
        """What each width costs above the lines between those on offer, [asked] >= 0, by the channels around."""
        steps = worth_choosing(self._costs(layer)["between"])
        found = {}
        for sweep in self._sweeps:
            if (sweep.layer, sweep.varies) == (layer, "between") and sweep.around != AROUND_MANY:
                cost = np.interp(asked, sweep.widths, sweep.cost)
                on_offer = np.interp(steps, asked, cost)
                _, start = _line(dict(zip(steps, on_offer.tolist(), strict=True)))
                lines = np.interp(asked, [0, *steps], [min(max(start, 0.0), on_offer[0]), *on_offer])
                found[sweep.around] = np.maximum(0.0, cost - lines)
        return found


def _by_outputs(costs: Mapping[int, Floats], wide: int, narrow: int, share: float) -> tuple[Floats, Floats]:
    """What costs so much in layers of so many outputs: in any case, and for each output.

    share: 0 to 1, how much of it is for the outputs where the narrow layer was not asked.
    """
    each = share * costs[wide] / wide
    if narrow in costs:
        each = np.clip((costs[wide] - costs[narrow]) / (wide - narrow), 0.0, costs[wide] / wide)
    return costs[wide] - wide * each, each


def _beside_odd(odd: int, asked: Floats, above: Floats, fixed: Floats, each: Floats) -> Floats:
    """[asked] >= 0, what it costs besides to read each width in a layer of `odd` outputs, which is not on offer.

    Asked were two layers with so many channels between them: one reads `odd`, and one those. What the first costs
    where they are on offer is in the line. Where they are `odd`, too, both cost the same; with more outputs the first
    costs more as it does where those are on offer (`fixed` and `each` of them). The rest is what the second costs.
    """
    alone = np.interp(odd, asked, fixed) + asked * np.interp(odd, asked, each)
    both = above + alone
    first = np.interp(odd, asked, both) / 2 * alone / max(np.interp(odd, asked, alone), 1e-300)
    return np.maximum(0.0, both - first)


def _line(costs: Mapping[int, float]) -> tuple[float, float]:
    """Slope and start of the straight line closest to the costs of what is offered; of all where that is too little."""
    widths = worth_choosing(costs)
    widths = widths if len(widths) > 2 else tuple(costs)
    slope, start = np.polyfit(widths, [costs[width] for width in widths], 1)
    return max(float(slope), LEAST_SLOPE * _at_reference(costs) / REFERENCE), float(start)


def _at_reference(costs: Mapping[int, float]) -> float:
    """The cost of `REFERENCE` channels."""
    return float(np.interp(REFERENCE, list(costs), list(costs.values())))
