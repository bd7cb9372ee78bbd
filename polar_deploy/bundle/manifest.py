"""The manifest of a bundle: docs/bundle.md as types, in the order of the file. What does not fit them is refused."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from polar_deploy import config
from polar_deploy.backends import PLAN
from polar_deploy.bundle.measured import Metrics
from polar_deploy.config import Capability, Count, Text
from polar_deploy.documents.build import Profile
from polar_deploy.documents.part import Part
from polar_deploy.targets import TARGETS

SCHEMA: Final = 2
CLASSIFICATION = "classification"  # the task whose inputs are pictures, and whose outputs have labels
MIN_GOLDEN, MAX_GOLDEN = 32, 1024  # samples
MOST_TENSORS = 16  # inputs, or outputs
MOST_VALUES = 1 << 28  # of the batch that latency is judged at: 1 GiB of float32

# A path of at most four parts, none of which begins with a dot: nothing outside of the bundle can be named.
FilePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}){0,3}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
NonNegativeInt = Annotated[int, Field(ge=0)]
Triple = tuple[float, float, float]
Pixels = Annotated[int, Field(ge=1, le=4096)]
ElementType = Literal["fp32", "fp16", "bf16", "int64", "int32", "int16", "int8", "uint16", "uint8", "bool"]
FLOATS = ("fp32", "fp16", "bf16")
Result = Literal["pass", "undecided"]  # what failed is not handed over


class File(Part):
    """Size in bytes and hash of one file."""

    bytes: NonNegativeInt
    sha256: Sha256


class Calibration(Part):
    """What fixed the ranges of INT8."""

    images: Count = 512
    method: Literal["minmax", "entropy", "percentile"] = "percentile"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99


class BuildOptions(Part):
    """How the engines are built. A copy of the settings `build`, so that the format stands still when these move."""

    batches: tuple[Count, Count, Count] = (1, 8, 64)
    io_dtype: Literal["fp32", "native"] = "fp32"
    tf32: bool = False
    workspace: Count | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    capabilities: tuple[Capability, ...] = ()
    max_layer_error: Annotated[float, Field(gt=0)] = 0.1
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _ordered(self) -> BuildOptions:
        least, opt, most = self.batches
        if not least <= opt <= most:
            raise ValueError(f"batches are min,opt,max, but {least},{opt},{most} do not ascend")
        return self

    def settings(self) -> config.Build:
        """The same as settings, to build by."""
        return config.Build.model_validate(self.model_dump())


class Criteria(Part):
    """What was asked of the compressed network. A copy of the settings `accept`, as `BuildOptions` is of `build`."""

    max_drop: Annotated[float, Field(ge=0)] = 1.0
    accuracy_rule: Literal["interval", "point"] = "interval"
    min_speedup: Annotated[float, Field(gt=0)] = 1.02
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    latency_percentile: Literal["p50", "p90", "p95", "p99", "p99.9"] = "p50"
    batch: Count = 1

    def settings(self) -> config.AcceptanceCriteria:
        """The same as settings, to judge by."""
        return config.AcceptanceCriteria.model_validate(self.model_dump())


class Tensor(Part):
    """An input or output of the graphs: the shape of one sample (None: of any length), its type in the typed graph.

    In the FP32 graph, fp32 stands for whatever float it is.
    """

    name: Text
    shape: Annotated[list[Count | None], Field(max_length=8)]
    dtype: ElementType

    @property
    def is_float(self) -> bool:
        """Whether it is of a float type; golden samples are float32 then."""
        return self.dtype in FLOATS


class Input(Tensor):
    """One that a network takes."""

    shape: Annotated[list[Count], Field(max_length=8)]  # type: ignore[assignment]  # all of it known


class Metric(Part):
    """What networks of a task are compared by: higher is better."""

    name: Text
    unit: Text  # of scores; differences of percentages are points


class Task(Part):
    """What the networks are for; `preprocessing` is how inputs are made where they are no pictures."""

    name: Text
    metric: Metric | None
    preprocessing: dict[Text, Any]


class Preprocessing(Part):
    """From a picture to the input: RGB, its shorter side resized, the centre cut out, `(rgb * scale - mean) / std`."""

    channels: Literal["RGB"]
    filter: Literal["bilinear"]
    shorter_side: Pixels
    crop: Pixels  # a side of the square that is cut out of the centre
    scale: float  # 1 / 255
    mean: Triple
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    @model_validator(mode="after")
    def _inside(self) -> Preprocessing:
        if self.scale != 1 / 255:
            raise ValueError(f"the scale is {self.scale}, not 1 / 255")
        if self.crop > self.shorter_side:
            raise ValueError(f"a crop of {self.crop} pixels does not lie in a picture of {self.shorter_side}")
        return self


class Golden(Part):
    """Inputs, and what the FP32 graphs give for them in ONNX Runtime on the CPU: .npy files by the tensors' names."""

    source: Literal["data", "random"]
    full: dict[Text, FilePath] | None
    samples: Annotated[int, Field(ge=MIN_GOLDEN, le=MAX_GOLDEN)]
    inputs: dict[Text, FilePath]
    compressed: dict[Text, FilePath]

    def files(self) -> list[str]:
        """All of them."""
        return [*self.inputs.values(), *self.compressed.values(), *(self.full or {}).values()]


class Plan(Part):
    """A plan, and the library, GPU and driver it was built with and for."""

    file: FilePath
    library: Literal["TensorRT", "TensorRT for RTX"]
    version: Annotated[str, Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,4}){1,3}$")]
    gpu: Text | None
    capabilities: list[Capability]
    version_compatible: bool
    hardware_compatible: bool
    cuda: Text | None
    driver: Text | None
    timing_cache: FilePath | None
    profile: Profile
    trtexec: Text | None


class Precision(Part):
    """Types in the graph and in the engine, and which layers stay wider."""

    io_dtype: Literal["fp32", "native"]
    types: dict[Text, NonNegativeInt]
    high_precision_layers: list[Any]
    calibration: dict[Text, Any] | None
    asked: Literal["fp32", "fp16", "bf16", "int8"]
    found: dict[Text, Count]


class Network(Part):
    """One network: its FP32 graph, the typed graph (the same file where no type was changed), plan and facts.

    Weights of a graph that one file cannot hold lie in `fp32_data`, `typed_data`: beside it, as NAME.onnx.data.
    """

    fp32: FilePath
    typed: FilePath
    fp32_data: FilePath | None = None
    typed_data: FilePath | None = None
    layers: FilePath
    plan: Plan | None
    provider: Text
    threads: Count | None
    tf32: bool
    versions: dict[Text, Text]
    reformats: NonNegativeInt | None
    padded_channels: NonNegativeInt | None
    precision: Precision
    macs: Count
    params: Count

    @model_validator(mode="after")
    def _beside(self) -> Network:
        for graph, data in ((self.fp32, self.fp32_data), (self.typed, self.typed_data)):
            if data not in (None, f"{graph}.data"):
                raise ValueError(f"the weights of {graph} are in {data}, and not in {graph}.data")
        if self.typed == self.fp32 and self.typed_data != self.fp32_data:
            raise ValueError(f"{self.fp32} has weights in {self.fp32_data}, and in {self.typed_data}")
        return self


class Networks(Part):
    """The compressed network, and the full one unless it was left out."""

    full: Network | None
    compressed: Network


class Judgement(Part):
    """One answer with its reason."""

    result: Result
    reason: Text


class Judged(Part):
    """What was asked of the compressed network, and the answers where the bundle was made."""

    asked: Criteria
    accuracy: Judgement
    latency: Judgement
    overall: Judgement


class Data(Part):
    """The data set: its name and the SHA-256 of its content."""

    name: Text
    sha256: Sha256


class Provenance(Part):
    """Where it comes from: program and library versions, every setting but places, the data set."""

    polar_deploy: Text
    versions: dict[Text, Text]
    model: Text
    full: Literal["given", "trained"]
    data: Data
    settings: dict[Text, Any]


class Manifest(Part):
    """manifest.json."""

    schema_version: Literal[2] = Field(alias="schema")
    kind: Literal["polar_deploy.bundle"]
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
    licence: Text | None
    target: Text
    build: BuildOptions
    task: Task
    inputs: Annotated[list[Input], Field(min_length=1, max_length=MOST_TENSORS)]
    outputs: Annotated[list[Tensor], Field(min_length=1, max_length=MOST_TENSORS)]
    preprocessing: Preprocessing | None  # of pictures, which `run` reads then
    labels: FilePath | None
    golden: Golden
    networks: Networks
    surgery: FilePath
    report: FilePath | None = None  # a page for people
    metrics: Metrics
    verdict: Judged
    provenance: Provenance
    files: dict[FilePath, File]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        named, listed = set(self.named()), set(self.files)
        if unlisted := sorted(named - listed):
            raise ValueError(f"{unlisted[0]} is named but not listed in files")
        if unnamed := sorted(listed - named):
            raise ValueError(f"files lists {unnamed[0]}, which nothing else names")
        if folded := len(listed) - len({name.lower() for name in listed}):
            raise ValueError(f"files lists {folded} names that differ only in capital letters")
        small, large = self.networks.compressed, self.networks.full
        if large is not None and (small.macs > large.macs or small.params > large.params):
            raise ValueError("the compressed network is larger than the full one")
        if (self.golden.full is None) != (self.networks.full is None):
            raise ValueError("golden outputs and networks disagree about whether there is a full network")
        self._require_fitting_target()
        self._require_golden_samples()
        self._require_pictures()
        batch, (least, _, most) = self.verdict.asked.batch, self.build.batches
        values = sum(math.prod(each.shape) for each in self.inputs)
        if not least <= batch <= most or batch * values > MOST_VALUES:
            raise ValueError(f"latency is asked at batch {batch}, the engines take {least} to {most}, or it is endless")
        return self

    def _require_golden_samples(self) -> None:
        """There is a file for each input, and for each output of each network; no name is there twice."""
        for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [each.name for each in tensors]
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind} have the same name")
            golden = [self.golden.inputs] if kind == "inputs" else [self.golden.compressed, self.golden.full]
            for files in golden:
                if files is not None and set(files) != set(names):
                    raise ValueError(f"golden samples are of {', '.join(files)}, the {kind} are {', '.join(names)}")
        if len(set(self.golden.files())) < len(self.golden.files()):
            raise ValueError("two golden arrays lie in one file")

    def _require_pictures(self) -> None:
        """What pre-processing makes of a picture is the input, and logits are what labels are for."""
        if self.task.name == CLASSIFICATION and (self.preprocessing is None or self.labels is None):
            raise ValueError(f"the task is {CLASSIFICATION}, but pre-processing or labels are missing")
        if self.preprocessing is None:
            return
        pixels, shapes = self.preprocessing.crop, [each.shape for each in self.inputs]
        if shapes != [[3, pixels, pixels]]:
            raise ValueError(f"pre-processing gives 3 x {pixels} x {pixels}, the inputs are {shapes}")
        if self.task.name != CLASSIFICATION:
            return
        if [len(each.shape) for each in self.outputs] != [1]:
            raise ValueError(f"the task is {CLASSIFICATION}, but the outputs are no logits")
        for found in (self.metrics.accuracy, self.metrics.fp32_graphs):
            if found and not all(0 <= accuracy <= 100 for accuracy in (found.full, found.compressed)):
                raise ValueError(f"accuracies are {found.full} % and {found.compressed} %")

    def _require_fitting_target(self) -> None:
        """Networks have the target's precision, and plans of its library if plans are its artefacts."""
        if self.target not in TARGETS:
            raise ValueError(f"unknown target {self.target!r}; known are {', '.join(TARGETS)}")
        target = TARGETS[self.target]
        for name, network in self.each().items():
            if network.precision.asked != target.precision:
                raise ValueError(f"the {name} network is in {network.precision.asked}, the target is {self.target}")
            if network.tf32 != self.build.tf32:
                raise ValueError(f"build and the {name} network disagree about TF32")
            library = network.plan.library if network.plan else None
            if library != (target.backend.library if target.backend.artefact is PLAN else None):
                raise ValueError(f"the {name} network has a plan of {library}, the target is {self.target}")

    def named(self) -> list[str]:
        """Every path that the manifest gives a meaning to."""
        paths = [self.labels, self.surgery, self.report, *self.golden.files()]
        for network in self.each().values():
            plan = network.plan
            paths += [network.fp32, network.fp32_data, network.typed, network.typed_data, network.layers]
            paths += [plan.file, plan.timing_cache] if plan else []
        return [path for path in paths if path is not None]

    def each(self) -> dict[str, Network]:
        """The networks by name, "compressed" first."""
        networks = {"compressed": self.networks.compressed, "full": self.networks.full}
        return {name: network for name, network in networks.items() if network is not None}
