"""What `bundle verify --json` prints: what a device found about a bundle whose files are whole."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polar_deploy.config import Count, NonNegative, Share
from polar_deploy.documents.parity import Accuracy, BatchLatency, Judgement, Machine, Sha256
from polar_deploy.documents.part import Document, Part

Judged = Literal["golden", "kernels", "latency", "accuracy", "overall"]


class GoldenCheck(Part):
    """Outputs for the golden samples against those in the bundle.

    Attributes:
        difference: see `polar_deploy.bundle.golden.difference`; None: not finite.
        agreement: share of samples with the same largest value; None where that is no answer.
        passed: the difference is within the tolerance.
    """

    difference: NonNegative | None
    tolerance: float
    agreement: Share | None
    passed: bool = Field(alias="pass")


class GoldenChecks(Part):
    """By name of the network: FP32 graphs in ONNX Runtime, and engines; {} where they do not run here."""

    onnx: dict[str, GoldenCheck]
    engines: dict[str, GoldenCheck]


class CompressedAccuracy(Part):
    """Of a bundle without the full network."""

    samples: Count
    compressed: float


class BundleName(Part):
    """Which bundle it is."""

    name: str
    manifest_sha256: Sha256


class Verified(Document):
    """All of it.

    Attributes:
        engines: where they come from, or why there are none.
        latency, accuracy: None: not measured.
        verdict: what was judged, "overall" last.
    """

    schema_version: Literal[1] = Field(alias="schema")
    bundle: BundleName
    target: str
    machine: Machine
    engines: str
    golden: GoldenChecks
    latency: BatchLatency | None
    accuracy: Accuracy | CompressedAccuracy | None
    verdict: dict[Judged, Judgement]
