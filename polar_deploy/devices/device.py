"""The content of a device's file, and which widths follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_deploy.config import Text

PERIOD = 64  # channels; above the widest that was asked, what is offered repeats: all packs divide it
_LISTED = re.compile(r"\[([\d\s.,e-]+)\]")  # numbers
_WHOLE = re.compile(r"\.0\b")  # the end of a whole number
WORTH = 0.5  # of what a narrower layer promises by its channels, what it has to save at least

FINE = PERIOD + 2  # every width up to here was asked of 3 x 3 convolutions
REFERENCE = 64  # channels around the width that varies in every sweep
AROUND_OFFERED = (REFERENCE, 16)  # channels around it in sweeps between layers of many channels and of few
AROUND_ODD = (63, 15)  # the same, of widths that no kernel likes
AROUND_MANY = 512  # channels around it in sweeps on maps of few pixels, where what a layer costs is its weights

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Kind = Literal["conv3x3", "conv1x1", "depthwise3x3"]
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
    and the second reads that many channels. around: the channels of the other widths. pixels: a side, of the maps.
    cost: in the device's unit.
    """

    precision: Precision
    layer: Kind
    varies: Literal["output", "input", "both", "between"]
    around: Width = REFERENCE
    pixels: Width
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
            if len(sides := self._sides(precision)) > 1:
                listed = " and ".join(map(str, sorted(sides)))
                raise ValueError(f"maps of {listed} pixels a side in {precision}: their costs cannot be compared")
        return self

    def text(self) -> str:
        """The content of the file: JSON, a list of numbers on one line."""
        text = self.model_dump_json(indent=1, by_alias=True, exclude_none=True) + "\n"
        return _LISTED.sub(lambda found: f"[{_WHOLE.sub('', ' '.join(found[1].split()))}]", text)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Those that were asked."""
        return tuple(dict.fromkeys(sweep.precision for sweep in self.sweeps))

    def map_area(self, precision: Precision) -> int:
        """Pixels of a map in the sweeps among `REFERENCE` channels."""
        (side,) = self._sides(precision)
        return side**2

    def _sides(self, precision: Precision) -> set[int]:
        return {each.pixels for each in self.sweeps if (each.precision, each.around) == (precision, REFERENCE)}

    def nearest(self, precision: str) -> Precision:
        """The precision whose costs stand for `precision`: itself where it was asked, else the file's first."""
        return next((each for each in self.precisions if each == precision), self.precisions[0])

    def staircase(self, precision: Precision, layer: Kind = "conv3x3") -> dict[int, float]:
        """Cost of a width: of the layer that writes it and the layer that reads it. {} where one was not asked."""
        found = self.swept(precision, layer)
        if "between" in found or "both" in found:
            return found.get("between") or found["both"]
        writing, reading = found.get("output", {}), found.get("input", {})
        return {width: cost + reading[width] for width, cost in writing.items() if width in reading}

    def swept(self, precision: Precision, layer: Kind) -> dict[str, dict[int, float]]:
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
    def _offered(self) -> dict[Precision, tuple[int, ...]]:
        return {precision: worth_choosing(self.staircase(precision)) for precision in self.precisions}

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


def worth_choosing(costs: Mapping[int, float]) -> tuple[int, ...]:
    """See `Device.offered`."""
    widths = sorted(costs, reverse=True)
    result = widths[:1]
    for width in widths[1:]:
        if 1 - costs[width] / costs[result[-1]] >= WORTH * (1 - width / result[-1]):
            result.append(width)
    return tuple(reversed(result))
