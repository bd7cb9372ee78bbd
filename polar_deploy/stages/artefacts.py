"""Every file of a run's folder by its name, once, and which runs have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polar_deploy.stages.context import RunContext


def _always(run: RunContext) -> bool:
    return True


def _has_plans(run: RunContext) -> bool:
    return run.target.backend.artefact.suffix == ".plan"


def _measures_latency(run: RunContext) -> bool:
    return run.measures_latency


@dataclass(frozen=True)
class Artefact:
    """A file of a run's folder, or a folder in it, whose name ends in "/".

    Attributes:
        name: path below the run's folder.
        expected: whether runs with these settings have it.
    """

    name: str
    expected: Callable[[RunContext], bool] = _always

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, with whatever lies in it."""
        return self.name.endswith("/")

    def __fspath__(self) -> str:
        return self.name


FULL_WEIGHTS = Artefact("full/weights.safetensors")
FULL_LOG = Artefact("full/training.jsonl")
FULL_CHECKPOINT = Artefact("full/checkpoint.safetensors")
FULL_GRAPH = Artefact("full/model.onnx")

GATED_WEIGHTS = Artefact("gated/weights.safetensors")
GATED_LOG = Artefact("gated/training.jsonl")
GATED_CHECKPOINT = Artefact("gated/checkpoint.safetensors")
GATED_GRAPH = Artefact("gated/model.onnx")
GATES = Artefact("gated/gates.json")
REFERENCE = Artefact("gated/reference.npz")  # inputs, and what PyTorch made of them
LATENCY_TABLE = Artefact("latency-table.json", _measures_latency)

COMPRESSED_GRAPH = Artefact("compressed/model.onnx")
SURGERY = Artefact("compressed/surgery.json")

ENGINE_FOLDER = Artefact("engines/")
# Typed graph, plan and list of layers of both networks: all that an engine is.
ENGINES = tuple(
    artefact
    for name in ("full", "compressed")
    for artefact in (
        Artefact(f"engines/{name}.onnx"),
        Artefact(f"engines/{name}.plan", _has_plans),
        Artefact(f"engines/{name}.layers.json"),
    )
)
BUILD = Artefact("engines/build.json")

PARITY = Artefact("parity.json")
WORST_SAMPLES = Artefact("worst-samples.npz")
BUNDLE = Artefact("bundle/")
MANIFEST = Artefact("bundle/manifest.json")
REPORT = Artefact("report.json")
PAGE = Artefact("report.html")

SETTINGS = Artefact("run.yaml")  # no stage's: the resolved settings, every default written out
