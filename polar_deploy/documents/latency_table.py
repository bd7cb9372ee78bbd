"""latency-table.json: what each gate site of a network costs on a target, at each width that matters.

`polar_deploy.latency` reads it: of a file that somebody gives, what predictions need is enough.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from polar_deploy.config import Count, CountOrNone, NonNegative, Positive
from polar_deploy.documents.parity import Conditions, Machine
from polar_deploy.documents.part import Document, Part

Name = Annotated[str, Field(min_length=1)]


class MeasuredSite(Part):
    """One site.

    Attributes:
        width: gates; a block has one.
        widths: open gates that were measured, ascending, the full width last; a block has one gate: 0, 1.
        ms: what the whole network takes with this site alone at each of them: measured, or, of streams side by side,
            shared out of what was measured with all of them cut.
        within: the block sites that hold this one: it is gone when one of them is closed.
    """

    name: Name
    kind: Literal["channel", "block", "stream"]
    width: Count
    widths: Annotated[list[CountOrNone], Field(min_length=1)]
    ms: Annotated[list[Positive], Field(min_length=1)]
    within: list[str]


class Overlap(Part):
    """Two sites that meet in a layer, so that their savings do not just add up.

    `ms` is what the network takes with as many gates `open` of these two alone: measured, or shared out of a sum.
    """

    sites: Annotated[list[str], Field(min_length=2, max_length=2)]
    open: Annotated[list[CountOrNone], Field(min_length=2, max_length=2)]
    ms: Positive


class Check(Part):
    """A whole sub-network, as the table predicts it and as it was measured: savings are scaled by that."""

    predicted_ms: Positive
    ms: Positive


class Noise(Part):
    """How far the control, the full network against its twin, was off, as a share."""

    median: NonNegative
    worst: NonNegative


class MeasuredTable(Document):
    """The file.

    Attributes:
        target: what the engines were built for, such as trt-fp16.
        batch: samples in one inference.
        device: state of the GPU afterwards; None: the CPU ran it.
        throttled: why the GPU slowed down meanwhile.
        engines: how many were built and timed.
        seconds: that all took.
        full_ms: one inference of the full network.
        key: hash of the circumstances, where the pipeline made the table.
    """

    schema_version: Literal[1] = Field(alias="schema")
    target: Name
    batch: Count
    machine: Machine
    device: Conditions | None
    throttled: list[str]
    versions: dict[str, str]
    engines: Count
    noise: Noise
    full_ms: Positive
    sites: Annotated[list[MeasuredSite], Field(min_length=1)]
    overlaps: list[Overlap]
    checks: list[Check] | None = None
    seconds: NonNegative
    key: str | None = None
