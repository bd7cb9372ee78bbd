"""results.json of a sweep: its runs one by one, and over seeds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polar_deploy.config import CountOrNone, Share
from polar_deploy.documents.comparison import Run
from polar_deploy.documents.parity import Result
from polar_deploy.documents.part import Document, Part


class Spread(Part):
    """Over seeds: plain ends, since with few of them an interval would promise too much."""

    mean: float
    low: float
    high: float


class Group(Part):
    """Runs that differ in the seed alone; None: no run has that figure."""

    target: str
    budget: dict[str, Share]
    seeds: list[CountOrNone]
    results: list[Result | Literal["failed"]]
    accuracy: Spread | None
    drop: Spread | None
    speedup: Spread | None
    latency_ms: Spread | None
    macs: Spread | None
    params: Spread | None


class SweptRun(Part):
    """A run: where it lies, how its command ended, and its figures where it came to its end."""

    folder: str
    seed: CountOrNone
    budget: dict[str, Share]
    target: str
    exit_code: int
    error: str | None
    report: str | None
    figures: Run | None


class SweepResults(Document):
    """The file; `notes`: what a reader has to know before he compares."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    groups: list[Group]
    runs: list[SweptRun]
    notes: list[str]
