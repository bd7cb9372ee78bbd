"""What `report compare --json` prints: some runs side by side."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polar_deploy.config import Count, CountOrNone
from polar_deploy.documents.gates import Costs
from polar_deploy.documents.parity import Interval, Metric, Result
from polar_deploy.documents.part import Document, Pair, Part
from polar_deploy.documents.report import Blocks, Reduced

What = Literal["latency_ms", "macs", "energy_mj"]  # that accuracy is held against


class Score(Part):
    """Of both networks, in the metric's unit, as of `Accuracy`."""

    full: float
    compressed: float
    drop: float
    interval: tuple[float, float]


class Run(Part):
    """One run.

    Attributes:
        machine: its CPU.
        measured: whether the engines ran; else the score is that of their FP32 graphs.
        latency_ms: of one inference of `batch` samples; None: it was not timed.
        speedup: None where the machine was too noisy to tell.
        energy_mj: of one sample; None: it was not counted.
        best: whether no comparable run is at least as accurate and as cheap, and better in one of the two.
        number: its place among all.
    """

    name: str
    model: str
    data: str
    target: str
    seed: CountOrNone
    macs: Reduced
    params: Reduced
    bytes: Reduced
    blocks: Blocks
    metric: Metric
    machine: str
    batch: Count
    result: Result
    reason: str
    budget: Costs
    accuracy: Score
    measured: bool
    latency_ms: Pair[Interval] | None
    speedup: Interval | None
    energy_mj: Pair[float] | None
    best: dict[What, bool]
    number: CountOrNone


class Comparison(Document):
    """Runs by their latency, and what a reader has to know before he compares."""

    schema_version: Literal[1] = Field(alias="schema")
    runs: list[Run]
    notes: list[str]
