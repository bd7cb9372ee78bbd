"""compressed/surgery.json: what surgery cut, and what it did not cut and why.

Surgery itself needs no pydantic: it writes the file by `surgery.report`, and who has the file reads it by these types.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from polar_deploy.config import Count, CountOrNone, NonNegative, Positive
from polar_deploy.documents.part import Document, Part

Change = tuple[CountOrNone, CountOrNone]  # before, after
Name = Annotated[str, Field(min_length=1)]
Lost = Annotated[float, Field(ge=0, lt=1)]
Divisor = Literal[0, 1, 2, 4, 8, 16, 32]


class Padding(Part):
    """The share of the work that is lost where a device rounds widths up to a multiple of 8, 16 or 32."""

    to_8: Lost = Field(alias="8")
    to_16: Lost = Field(alias="16")
    to_32: Lost = Field(alias="32")


class Alignment(Part):
    """The largest of 32, 16, 8, 4, 2, 1 that divides the width afterwards; 0: the layer went."""

    inputs: Divisor = Field(alias="in")
    outputs: Divisor = Field(alias="out")


class LayerChange(Part):
    """A layer with weights: channels, MACs and parameters before and after."""

    name: Name
    operator: Name
    inputs: Change = Field(alias="in")
    outputs: Change = Field(alias="out")
    macs: Change
    params: Change


class CutLayer(LayerChange):
    """`padding` is None where the layer went."""

    alignment: Alignment
    padding: Padding | None


class RemovedBlock(Part):
    """An Add that became an identity, and the layers of the branch that went."""

    add: Name
    layers: list[Name]


class GateFate(Part):
    """What became of a gate. `site` and `kind` are the node's metadata; `into`: the nodes that took its factors up."""

    node: Name
    site: str | None = None
    kind: str | None = None
    width: CountOrNone
    closed: CountOrNone
    removed_channels: CountOrNone
    outcome: Literal["removed", "folded", "kept"]
    into: str | None = None
    reason: str | None = None


class Unsupported(Part):
    """A node that channels cannot be followed through."""

    node: Name
    operator: Name
    reason: Name


class CutNotMade(Unsupported):
    """Closed channels that stay, by the layer or gate that they are seen at first, and the node that holds them."""

    layer: Name
    channels: Count


class SurgeryReport(Document):
    """The file. Pairs are [before, after]; MACs at batch 1 at the shapes under `inputs`.

    Attributes:
        unverified: why there is no proof; None: there is one.
        as_it_is: why the model came back as it is, though ONNX Runtime takes it: surgery cannot follow it, or
            (`verified` is false) no proof of a cut was found; None: it was cut.
        difference: the largest of an output between both graphs, as a share of its largest value.
        macs: None where the model came back as it is.
        operators: how many nodes of each type.
    """

    schema_version: Literal[2] = Field(alias="schema")
    verified: bool
    unverified: str | None
    difference: NonNegative | None
    tolerance: Positive | None
    runtime: Literal["onnxruntime", "onnx.reference"] | None
    as_it_is: str | None
    inputs: dict[str, list[CountOrNone]]
    macs: Change | None
    params: Change
    padding: Padding | None
    operators: dict[str, Change]
    layers: list[CutLayer]
    blocks_removed: list[RemovedBlock]
    gates: list[GateFate]
    cuts_not_made: list[CutNotMade]
    unsupported: list[Unsupported]
