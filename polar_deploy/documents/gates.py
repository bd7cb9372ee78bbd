"""gated/gates.json: which gates of a network are open."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from polar_deploy.config import Count, CountOrNone, Share
from polar_deploy.documents.part import Document, Part

Cost = Literal["macs", "params", "latency"]
Costs = Annotated[dict[Cost, Share], Field(min_length=1)]  # shares of the full network's


class GateSite(Part):
    """One place for gates.

    Attributes:
        name: of the first layer that writes the channels, or of the module that ends the branch.
        width: gates; each may close several channels (a group of a convolution).
        open: the open ones; a block has gate 0 alone.
        share: of each gate: share of samples that opened it before it was fixed.
    """

    name: Annotated[str, Field(min_length=1)]
    kind: Literal["channel", "block", "stream"]
    width: Count
    open: list[CountOrNone]
    share: Annotated[list[Share], Field(min_length=1)]


class DeviceWidths(Part):
    """The device whose widths were taken instead of multiples."""

    name: str
    precision: str


class GateStates(Document):
    """The file.

    Attributes:
        inputs: shape of one sample of each input; None: of any length.
        align: widths are multiples of this.
        ungated: layer without gates -> why.
    """

    schema_version: Literal[1] = Field(alias="schema")
    model: str
    inputs: Annotated[dict[str, list[Count | None]], Field(min_length=1)]
    align: Count
    device: DeviceWidths | None = None
    budget: Costs
    achieved: Costs
    sites: Annotated[list[GateSite], Field(min_length=1)]
    ungated: dict[str, str]
