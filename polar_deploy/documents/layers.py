"""engines/NAME.layers.json: the layers of an engine, as its runtime tells them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polar_deploy.config import CountOrNone
from polar_deploy.documents.part import Document, Part


class Layer(Part):
    """A layer. What its runtime does not tell is not there.

    Attributes:
        op: the operator, in the runtime's word.
        provider: ONNX Runtime's, which ran it.
        kernel: OpenVINO's name of the code that runs.
        kind: TensorRT's word for what it computes.
        inputs: element types that it reads.
        type: element type that it computes in; ONNX Runtime tells the one that it writes.
        format: layout and type of what it writes.
        tactic: TensorRT's name of its kernel.
        padded: channels that the formats of its outputs add to fill their vectors.
    """

    name: str
    op: str
    provider: str | None = None
    kernel: str | None = None
    kind: str | None = None
    inputs: list[str]
    type: str
    format: str | None = None
    tactic: str | None = None
    padded: CountOrNone | None = None


class Layers(Document):
    """The file. `read_from`: who tells; `reformats` and `padded_channels`: as of `build.EngineFacts`, of TensorRT."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    read_from: str
    reformats: CountOrNone | None = None
    padded_channels: CountOrNone | None = None
    layers: list[Layer]
