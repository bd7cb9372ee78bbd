"""The content of a device's file, and which widths follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_deploy.config import Text

if TYPE_CHECKING:
    from polar_deploy.costs import Floats

PERIOD = 64  # channels; above the widest that was asked, what is offered repeats: all packs divide it
_LISTED = re.compile(r"\[([\d\s.,e-]+)\]")  # numbers
_WHOLE = re.compile(r"\.0\b")  # the end of a whole number
PACK = 32  # channels; behind the widths that were asked one by one, the last so many repeat: they hold every pack
WORTH = 0.5  # of what a narrower layer promises by its channels, what it has to save at least

FINE = PERIOD + 2  # every width up to here was asked of 3 x 3 convolutions
REFERENCE = 64  # channels around the width that varies in every sweep
AROUND = (REFERENCE, 16, 63, 15)  # the same in sweeps of a device's like, and two that no kernel likes
LEAST_DEPTHWISE = 0.1  # of what was measured of a depthwise layer between two others, that counts as its own
MOST_MOVED = 0.9  # of what a further channel costs, that may be its being moved
LEAST_SLOPE = 0.1  # of the cost of `REFERENCE` channels for as many more, however flat the costs are

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Kind = Literal["conv3x3", "conv1x1", "depthwise3x3"]
Side = Literal["output", "input"]
Varies = Literal["output", "input", "both", "between"]
ELEMENTS: dict[Kind, int] = {"conv3x3": 9, "conv1x1": 1, "depthwise3x3": 9}  # of a kernel
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Width = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ignored_types=(cached_property,))


class Source(_Frozen):
    """Where the numbers come from.

    kind: what a compiler says ("estimate"), what a clock said ("measured"), or what follows from what the maker writes
    of the device ("documented").
    """

    kind: Literal["documented", "estimate", "measured"]
    tool: Text
    version: Text
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    method: Text
    script: Text
    machine: Text | None = None


class Sweep(_Frozen):
    """What a kind of layer costs at each width.

    varies: which of the layer's widths; "both" of a depthwise one, "between": two layers, of which the first writes
    and the second reads that many channels. around: the channels of the other widths. cost: in the device's unit.
    """

    precision: Precision
    layer: Kind
    varies: Varies
    around: Width = REFERENCE
    widths: tuple[Width, ...] = Field(min_length=2)
    cost: tuple[Positive, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _one_cost_a_width(self) -> Sweep:
        if len(self.widths) != len(self.cost):
            raise ValueError(f"there are {len(self.widths)} widths and {len(self.cost)} costs")
        if any(narrow >= wide for narrow, wide in pairwise(self.widths)):
            raise ValueError("the widths do not ascend")
        return self


class Device(_Frozen):
    """What widths cost on a device or in a runtime.

    gate_left_over: cost of two 3 x 3 convolutions of 32 channels with a multiplication by zeros and ones between them,
    over that without it. addition: cost of an Add over that of a 3 x 3 convolution of the same 64 channels.
    """

    schema_: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: Text
    source: Source
    unit: Literal["cycles", "macs", "ms"]
    sweeps: tuple[Sweep, ...] = Field(min_length=1)
    gate_left_over: Positive | None = None
    addition: NonNegative | None = None

    @model_validator(mode="after")
    def _convolutions(self) -> Device:
        for precision in self.precisions:
            if not self.staircase(precision):
                raise ValueError(f"no costs of 3 x 3 convolutions in {precision}")
        return self

    def text(self) -> str:
        """The content of the file: JSON, a list of numbers on one line."""
        text = self.model_dump_json(indent=1, by_alias=True, exclude_none=True) + "\n"
        return _LISTED.sub(lambda found: f"[{_WHOLE.sub('', ' '.join(found[1].split()))}]", text)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those that were asked."""
        return tuple(dict.fromkeys(sweep.precision for sweep in self.sweeps))

    def nearest(self, precision: str) -> Precision:
        """The precision whose costs stand for `precision`: itself where it was asked, else the file's first."""
        return next((each for each in self.precisions if each == precision), self.precisions[0])

    def staircase(self, precision: Precision, layer: Kind = "conv3x3") -> dict[int, float]:
        """Cost of a width: of the layer that writes it and the layer that reads it. {} where one was not asked."""
        found = self._swept(precision, layer)
        if "between" in found or "both" in found:
            return found.get("between") or found["both"]
        writing, reading = found.get("output", {}), found.get("input", {})
        return {width: cost + reading[width] for width, cost in writing.items() if width in reading}

    def packed(self, widths: Floats, precision: Precision, layer: Kind, side: Side) -> Floats:
        """Float [...], the channels that cost as much as `widths` do: `REFERENCE` are `REFERENCE`, and 0 are 0.

        Where the file knows writing and reading apart, they are in proportion to the costs that were asked, on straight
        lines between them and, above the widest one, on the line of the last period. Where it knows both together,
        channels count as they are, and what unkind widths cost besides is their `surcharge`.

        Args:
            widths: [...] >= 0, channels that a layer writes or reads.
            precision: one of the file's.
            layer: a kind that was not asked costs as a 3 x 3 convolution.
            side: whether the layer writes or reads them.
        """
        import numpy as np

        known = self._swept(precision, self._known(precision, layer))
        if "between" in known:
            return widths
        costs = next(known[each] for each in (side, "both", *known) if each in known)
        asked, cost = np.array([*costs], float), np.array([*costs.values()])
        beyond = np.maximum(0.0, np.ceil((widths - asked[-1]) / PERIOD))
        growth = cost[-1] - np.interp(asked[-1] - PERIOD, asked, cost)
        found = np.interp(widths - beyond * PERIOD, asked, cost) + beyond * growth
        return np.where(widths > 0, REFERENCE * found / np.interp(REFERENCE, asked, cost), 0.0)

    def surcharge(
        self, widths: Floats, precision: Precision, layer: Kind, beside_offered: bool
    ) -> tuple[Floats, Floats]:
        """What reading channels costs a layer besides, in the unit of `each`: [...] in any case, [...] for each output.

        A width that is not on offer costs more than the line between those that are, as was asked among layers of few
        and of many channels. Where the layer writes a width that is not on offer either, it costs less: it leaves its
        fast kernels once. Behind the widths that were asked one by one, that is what its like costs among the last
        ones, and more by the `surcharge_growth` between the two.

        Args:
            widths: [...] >= 0, channels that a layer reads.
            precision: one of the file's.
            layer: a kind that was not asked costs as a 3 x 3 convolution.
            beside_offered: whether the layer writes a width that is on offer.

        Returns:
            Zeros where the file knows writing and reading apart: then all is in `packed`.
        """
        import numpy as np

        kind = self._known(precision, layer)
        if "between" not in self._swept(precision, kind):
            return np.zeros_like(widths), np.zeros_like(widths)
        like = np.where(widths > FINE, (widths - FINE) % PACK + FINE - PACK, widths)
        growth = (widths > 0) * (1 + self.surcharge_growth(precision) * (widths - like) / np.maximum(like, 1.0))
        asked, *costs = self._surcharges[precision, kind, beside_offered]
        fixed, for_each = (np.interp(like, asked, cost) * growth for cost in costs)
        return fixed, for_each

    def each(self, precision: Precision, layer: Kind) -> float:
        """What a multiply-accumulate costs in a layer of `REFERENCE` channels, in the device's unit for the pixels of
        its sweeps: comparable between layers, and nothing else. A kind that was not asked costs as a 3 x 3 one."""
        steps, sides = self.staircase(precision, layer), self._swept(precision, layer)
        if not steps:
            return self.each(precision, "conv3x3")
        if layer != "depthwise3x3":  # two layers
            both = REFERENCE * ELEMENTS[layer] * 2
            if "between" in sides:
                return (self._lines[precision, layer][0] - 2 * self.moved(precision, layer)) / both
            return _at_reference(steps) / (both * REFERENCE)
        cost = _at_reference(steps)
        if "both" not in sides:  # between two others
            around = self.staircase(precision, "conv1x1")
            cost = max(cost - (_at_reference(around) if around else 0.0), LEAST_DEPTHWISE * cost)
        return cost / (REFERENCE * ELEMENTS[layer])

    def moved(self, precision: Precision, layer: Kind) -> float:
        """What a channel costs that a layer writes or reads, however much it multiplies, in the unit of `each`.

        Two layers with next to nothing between them still move `REFERENCE` channels in and as many out. Where the file
        knows writing and reading apart, this is part of their costs, and 0 here.
        """
        kind = self._known(precision, layer)
        if (precision, kind) not in self._lines or layer == "depthwise3x3":
            return 0.0
        slope, start = self._lines[precision, kind]
        return min(max(start, 0.0) / (2 * REFERENCE), MOST_MOVED * slope / 2)

    def surcharge_growth(self, precision: Precision) -> float:
        """How what a width costs above the line between those that are offered grows with the width, 0 to 1.

        0: it stays, as in a kernel that fills up its last block. 1: it grows in proportion, as where the whole layer
        leaves its fast kernels. Told by 3 x 3 convolutions of which a width and its like a period on were asked; 1
        where none were.
        """
        import numpy as np

        costs = self._swept(precision, "conv3x3").get("between", {})
        above: dict[int, float] = {}
        if costs:
            found = self._above(precision, "conv3x3", np.array([*costs], float))[REFERENCE]
            above = dict(zip(costs, found.tolist(), strict=True))
        pairs = [(above[width], above[width + PERIOD], PERIOD / width) for width in above if width + PERIOD in above]
        if not any(near for near, _, _ in pairs):
            return 1.0
        # far = near * (1 + growth * wider), by least squares: what is hardly dearer than the line tells little
        growth = sum((far - near) * near * wider for near, far, wider in pairs)
        return min(1.0, max(0.0, growth / sum((near * wider) ** 2 for near, _, wider in pairs)))

    def _known(self, precision: Precision, layer: Kind) -> Kind:
        """The kind of layer whose costs stand for `layer`."""
        return layer if self._swept(precision, layer) else "conv3x3"

    def _swept(self, precision: Precision, layer: Kind) -> dict[str, dict[int, float]]:
        """What was asked of a kind of layer: costs by width, by what varies."""
        return self._asked.get((precision, layer), {})

    @cached_property
    def _asked(self) -> dict[tuple[Precision, Kind], dict[str, dict[int, float]]]:
        asked: dict[tuple[Precision, Kind], dict[str, dict[int, float]]] = {}
        for sweep in self.sweeps:
            costs = dict(zip(sweep.widths, sweep.cost, strict=True))
            if sweep.around == REFERENCE:
                asked.setdefault((sweep.precision, sweep.layer), {})[sweep.varies] = costs
        return asked

    @cached_property
    def _lines(self) -> dict[tuple[Precision, Kind], tuple[float, float]]:
        """See `_line`, of the kinds of layers between which widths were asked."""
        return {key: _line(sides["between"]) for key, sides in self._asked.items() if "between" in sides}

    @cached_property
    def _surcharges(self) -> dict[tuple[Precision, Kind, bool], tuple[Floats, Floats, Floats]]:
        """See `surcharge`: the widths asked, what each costs in any case and what for each output, beside a width on
        offer (True) or not."""
        import numpy as np

        found: dict[tuple[Precision, Kind, bool], tuple[Floats, Floats, Floats]] = {}
        for precision, layer in self._lines:
            asked = np.array([*self._swept(precision, layer)["between"]], float)
            wide, narrow, odd_wide, odd_narrow = AROUND
            above = self._above(precision, layer, asked)
            multiplied = REFERENCE * ELEMENTS[layer] * self.each(precision, layer)
            by_outputs = partial(_by_outputs, share=multiplied / (multiplied + 2 * self.moved(precision, layer)))
            fixed, each = by_outputs(wide, above[wide], narrow, above.get(narrow))
            found[precision, layer, True] = found[precision, layer, False] = asked, fixed, each
            if odd_wide in above:
                # C channels between layers of an odd width O: one reads O and writes C, one reads C and writes O. What
                # O costs where C is on offer is in the line. Where C is O, both cost the same; with more outputs O
                # costs more as it does beside a width on offer. The rest is what C costs.
                beside = {}
                for odd in {odd_wide, odd_narrow} & above.keys():
                    alone = np.interp(odd, asked, fixed) + asked * np.interp(odd, asked, each)
                    both = above[odd] + alone
                    of_odd = np.interp(odd, asked, both) / 2 * alone / max(np.interp(odd, asked, alone), 1e-300)
                    beside[odd] = np.maximum(0.0, both - of_odd) * (above[wide] > 0)
                fixed, each = by_outputs(odd_wide, beside[odd_wide], odd_narrow, beside.get(odd_narrow))
                found[precision, layer, False] = asked, fixed, each
        return found

    def _above(self, precision: Precision, layer: Kind, asked: Floats) -> dict[int, Floats]:
        """What each width costs above the lines between those on offer, [asked] >= 0, by the channels around."""
        import numpy as np

        steps = _worth_choosing(self._swept(precision, layer)["between"])
        found = {}
        for sweep in self.sweeps:
            if (sweep.precision, sweep.layer, sweep.varies) == (precision, layer, "between"):
                cost = np.interp(asked, sweep.widths, sweep.cost)
                on_offer = np.interp(steps, asked, cost)
                _, start = _line(dict(zip(steps, on_offer.tolist(), strict=True)))
                lines = np.interp(asked, [0, *steps], [min(max(start, 0.0), on_offer[0]), *on_offer])
                found[sweep.around] = np.maximum(0.0, cost - lines)
        return found

    @cached_property
    def _offered(self) -> dict[Precision, tuple[int, ...]]:
        return {precision: _worth_choosing(self.staircase(precision)) for precision in self.precisions}

    def offered(self, precision: Precision) -> tuple[int, ...]:
        """The widths worth choosing, ascending, as far as they were asked.

        The widest one is. A narrower one is where it saves, against the next one offered, at least half of the share of
        channels that it gives up: 31 channels that cost as much as 32 are no choice, and neither are 24 that cost more.
        """
        return self._offered[precision]

    def offers(self, width: int, precision: Precision) -> bool:
        """Whether a width is worth choosing; above the widest one that was asked, its like within the last period."""
        offered = self.offered(precision)
        beyond = max(0, -(-(width - offered[-1]) // PERIOD))
        return width - beyond * PERIOD in offered


def _worth_choosing(costs: Mapping[int, float]) -> tuple[int, ...]:
    """See `Device.offered`."""
    widths = sorted(costs, reverse=True)
    result = widths[:1]
    for width in widths[1:]:
        if 1 - costs[width] / costs[result[-1]] >= WORTH * (1 - width / result[-1]):
            result.append(width)
    return tuple(reversed(result))


def _by_outputs(
    wide: int, of_wide: Floats, narrow: int, of_narrow: Floats | None, share: float
) -> tuple[Floats, Floats]:
    """What costs so much in a layer of `wide` outputs, and so much in one of `narrow`: in any case, and for each.

    share: 0 to 1, how much of it is for the outputs where the narrow layer was not asked.
    """
    import numpy as np

    each = share * of_wide / wide
    if of_narrow is not None:
        each = np.clip((of_wide - of_narrow) / (wide - narrow), 0.0, of_wide / wide)
    return of_wide - wide * each, each


def _line(costs: Mapping[int, float]) -> tuple[float, float]:
    """Slope and start of the straight line closest to the costs of what is offered; of all where that is too little."""
    import numpy as np

    widths = _worth_choosing(costs)
    widths = widths if len(widths) > 2 else tuple(costs)
    slope, start = np.polyfit(widths, [costs[width] for width in widths], 1)
    return max(float(slope), LEAST_SLOPE * _at_reference(costs) / REFERENCE), float(start)


def _at_reference(costs: Mapping[int, float]) -> float:
    """The cost of `REFERENCE` channels."""
    import numpy as np

    return float(np.interp(REFERENCE, list(costs), list(costs.values())))
