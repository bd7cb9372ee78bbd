"""report.json: the figures of a run in one place, each from the file of the stage that measured it."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from polar_deploy.config import Count, CountOrNone, NonNegative, Positive
from polar_deploy.documents.build import Precision
from polar_deploy.documents.gates import Costs
from polar_deploy.documents.parity import (
    Accuracy,
    ClassScore,
    Difference,
    Export,
    Interval,
    Judged,
    Loss,
    LostSample,
    Machine,
    Metric,
    RoundFigures,
    Sha256,
)
from polar_deploy.documents.part import Document, Pair, Part
from polar_deploy.documents.surgery import CutNotMade, LayerChange, Unsupported
from polar_deploy.documents.training_log import Curves, Freeze

Of = TypeVar("Of")
Name = Annotated[str, Field(min_length=1)]
Kind = Literal["channel", "block", "stream"]


class Reduced(Pair[Count]):
    """A cost of both networks, and the compressed one's as a share of the full one's."""

    ratio: Positive


class Trainings(Part, Generic[Of]):
    """The same of both trainings."""

    full: Of
    gated: Of


class Budget(Part):
    """Shares of the full network's cost."""

    asked: Costs
    achieved: Costs


class EnginePrecision(Precision):
    """Types of an engine, and what they cost; None: it did not run."""

    loss: Loss | None


class EngineLayers(Part):
    """Layers that run, and what in them costs time and computes nothing; None where nobody can tell."""

    layers: Count
    reformats: CountOrNone | None
    padded_channels: CountOrNone | None


class _AtBatch(Part):
    """What there is of a batch size as a whole, as of `BatchLatency`."""

    batch: Count
    decided: bool
    images_per_second: Pair[Positive]
    energy_mj: Pair[NonNegative | None]


class Timed(RoundFigures, _AtBatch):
    """One batch size, by the round that counts.

    `speedup_with_noise` is what the verdict is about: as much wider as two copies of one engine may differ.
    """

    speedup_with_noise: Interval


class SiteSaving(Part):
    """Milliseconds that a site saves."""

    name: str
    kind: str
    ms: float


class Predicted(Part):
    """What the latency table says; `saved` by place, blocks first, adds up to what is predicted."""

    batch: Count
    full_ms: Positive
    compressed_ms: Positive
    saved: list[SiteSaving]


class Blocks(Part):
    """Residual blocks that have a gate."""

    removed: CountOrNone
    total: CountOrNone


class Layer(LayerChange):
    """A layer by its module, or its node where there is none; `removed_block`: which removed block it belonged to."""

    removed_block: CountOrNone | None


class Network(Part):
    """What became of the network: layers in the graph's order, closed channels that stayed, where channels cannot be
    followed, and layers without gates with the reason."""

    layers: list[Layer]
    not_cut: list[CutNotMade]
    unsupported: list[Unsupported]
    ungated: dict[str, str]


class Saving(Part):
    """What is left of a cost, what went with whole layers, and what with narrower ones."""

    left: CountOrNone
    removed: CountOrNone
    narrowed: CountOrNone


class Savings(Part):
    """By cost."""

    macs: Saving
    params: Saving


class Site(Part):
    """A place for gates: gates, open ones, and [epoch, open ones at its end] where that changed."""

    name: str
    kind: Kind
    width: Count
    open: CountOrNone
    changes: list[tuple[CountOrNone, CountOrNone]]


class Trained(Part):
    """What training took: multiply-accumulates forward and backward, of teacher and search too; joules that the
    machine counted meanwhile, None where it counts none."""

    epochs: Count
    seconds: NonNegative
    macs: CountOrNone
    joules: NonNegative | None


class NamedClass(ClassScore):
    """A class by its name."""

    name: str


class NamedSample(LostSample):
    """A sample, of a classifier with the names of its label and answer."""

    label_name: str | None = None
    answer_name: str | None = None


class BundleMade(Part):
    """What is handed over."""

    manifest_sha256: Sha256
    bytes: Count


class Report(Document):
    """The file. Accuracy and what follows from it are as in parity.json.

    Attributes:
        settings: SHA-256 of the settings that decide the result; recipe: these, by name.
        verified: surgery proved the compressed network equal to the gated one.
        not_run: why the engines could not run here; then nothing of them is claimed.
        worst_samples: their pictures lie in worst-samples.npz.
        bytes: of the engines' graphs.
        predicted: of the latency table, where there is a latency budget.
        training, history: of networks that were trained here.
        bundle: None: there is none, since parity failed.
    """

    schema_version: Literal[2] = Field(alias="schema")
    settings: Sha256
    recipe: dict[str, Any]
    model: Name
    task: str
    metric: Metric | None
    outputs: Difference | None
    data: Name
    target: Name
    seed: CountOrNone
    full: Literal["trained", "given"]
    export: Export | None
    surgery: Difference | None
    budget: Budget
    verified: bool
    not_run: str | None
    accuracy: Accuracy | None
    classes: list[NamedClass] | None
    worst_classes: Annotated[list[ClassScore], Field(max_length=10)] | None
    worst_samples: Annotated[list[NamedSample], Field(max_length=12)]
    graphs: Accuracy | None
    precision: Pair[EnginePrecision]
    macs: Reduced
    params: Reduced
    bytes: Reduced
    layers: Pair[EngineLayers]
    latency: list[Timed]
    predicted: Predicted | None
    blocks: Blocks
    network: Network
    savings: Savings
    sites: list[Site]
    training: Trainings[Trained | None]
    history: Trainings[list[Curves]]
    freeze: Freeze | None
    verdict: Judged
    bundle: BundleMade | None
    versions: dict[str, Name]
    machine: Machine

    @property
    def counted(self) -> Accuracy | None:
        """What is known of accuracy: of the engines, or else of their FP32 graphs."""
        return self.accuracy or self.graphs

    @property
    def timed(self) -> Timed | None:
        """The latency at the batch size that the verdict is about."""
        return next((each for each in self.latency if each.batch == self.verdict.batch), None)
