"""engines/build.json: what the build stage made, one entry an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from polar_deploy.config import Capability, Count, CountOrNone, NonNegative
from polar_deploy.documents.parity import Reason, Sha256
from polar_deploy.documents.part import Document, Part
from polar_deploy.errors import ContentError

Name = Annotated[str, Field(min_length=1)]


class File(Part):
    """Size in bytes and hash of one file."""

    bytes: Count
    sha256: Sha256


class WiderLayer(Part):
    """A node that stays wider than the target.

    `error` is the share of an output's size by which it alone moves that in INT8; None: not measured.
    """

    layer: str
    operator: str
    error: NonNegative | None
    type: str
    why: Reason


class Types(Part):
    """What was written into a graph: layers by type, and which nodes stay wider. `calibration`: how INT8's ranges came
    about; None: there are none."""

    io_dtype: Literal["fp32", "native"]
    types: dict[str, CountOrNone]
    high_precision_layers: list[WiderLayer]
    calibration: dict[str, Any] | None


class Precision(Types):
    """Types that were asked for, in the graph, and found: element type -> layers of the engine that run in it."""

    asked: Literal["fp32", "fp16", "bf16", "int8"]
    found: Annotated[dict[str, Count], Field(min_length=1)]


class Profile(Part):
    """Batch sizes that a plan is built for."""

    min: Count
    opt: Count
    max: Count


class Plan(Part):
    """A plan, and the library, GPU and driver it was built with and for; None where it is for any of these.

    `trtexec` is the line that builds the same one with NVIDIA's own tool.
    """

    file: Name
    library: Name
    version: Annotated[str, Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,4}){1,3}$")]
    gpu: str | None
    capabilities: list[Capability]
    version_compatible: bool
    hardware_compatible: bool
    cuda: str | None
    driver: str | None
    timing_cache: str | None
    profile: Profile
    trtexec: str | None


class BuiltPlan(Part):
    """What the process that builds a plan answers: see `Precision.found` and `EngineFacts`. It is in no file."""

    found: dict[str, Count]
    reformats: CountOrNone | None
    padded_channels: CountOrNone | None
    plan: Plan


class EngineFacts(Part):
    """What a runtime tells of an engine.

    Attributes:
        threads: CPU threads of one inference.
        versions: package -> version.
        plan: or why there is no plan file.
        reformats: layers that only change a tensor's format; None where the layers are those before the build.
        padded_channels: channels that a format adds to fill its vectors, over all tensors that are written.
    """

    provider: Name
    threads: Count | None = None
    tf32: bool
    versions: Annotated[dict[str, Name], Field(min_length=1)]
    plan: Plan | Reason
    reformats: CountOrNone | None = None
    padded_channels: CountOrNone | None = None


class BuiltEngine(EngineFacts):
    """An engine.

    Attributes:
        files: by name.
        macs, params: of Conv, Gemm and MatMul at batch 1.
        seconds: time to check, build and inspect.
    """

    backend: Name
    precision: Precision
    files: Annotated[dict[str, File], Field(min_length=1)]
    macs: CountOrNone
    params: CountOrNone
    seconds: NonNegative

    @property
    def plan_file(self) -> Plan | None:
        """The plan, if there is one."""
        return self.plan if isinstance(self.plan, Plan) else None


class Built(Document):
    """The file. `bundle`: the sha256 of the manifest whose engines were built again."""

    schema_version: Literal[2] = Field(alias="schema")
    target: Name
    engines: Annotated[dict[str, BuiltEngine], Field(min_length=1)]
    bundle: Sha256 | None = None

    def entry(self, name: str, path: Path) -> BuiltEngine:
        """The engine `name`; ContentError where the file, which lies at `path`, does not list it."""
        if name not in self.engines:
            raise ContentError(f"{path} does not list the engine {name!r}", "let the build stage run again")
        return self.engines[name]
