"""What a run is: one frozen, validated tree of settings. `polar_deploy.recipes` reads and writes it.

`Settings` are what somebody asked for, where None leaves a choice to the data set, the target or the machine.
`ResolvedSettings` are the same with these choices made (`polar_deploy.stages.resolve`): what a run works with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_deploy.errors import CONTROL

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Capability = Annotated[str, Field(pattern=r"^[1-9][0-9]*\.[0-9]$")]  # compute capability, such as "8.9"
Text = Annotated[str, Field(max_length=2000, pattern=f"^[^{CONTROL}]*$")]  # all of which may be shown on a terminal
Triple = tuple[float, float, float]


LOCAL_PATHS = {"data_dir", "full_weights", "latency_table"}  # where files lie; what they hold counts for itself


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Normalize(_Frozen):
    """Input normalisation, `(rgb / 255 - mean) / std` a channel."""

    mean: Triple
    std: tuple[Positive, Positive, Positive]


class Budget(_Frozen):
    """Upper bounds on the compressed network's cost, each as a share of the full network's (0 < share < 1)."""

    macs: OpenShare | None = None
    params: OpenShare | None = None
    latency: OpenShare | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Budget:
        if not self.asked():
            raise ValueError("a budget names at least one of macs, params, latency")
        return self

    def asked(self) -> dict[str, float]:
        """The bounds that were set, by the name of the cost."""
        return {name: share for name, share in self.model_dump().items() if share is not None}


class Verdict(_Frozen):
    """When the compressed engine counts as good: accuracy in points, latency as a speed-up over the full engine."""

    max_drop: NonNegative = 1.0
    accuracy_rule: Literal["interval", "point"] = "interval"  # what has to be within: the drop's 95 % interval, or it
    min_speedup: Positive = 1.02
    max_latency_ms: Positive | None = None  # of the compressed engine, beside the speed-up; None: any
    latency_percentile: Literal["p50", "p90", "p95", "p99", "p99.9"] = "p50"  # what is held against max_latency_ms
    batch: Count = 1


class Calibration(_Frozen):
    """What fixes the ranges of INT8: so many training images, and how a range is read off the values they give."""

    images: Count = 512
    method: Literal["minmax", "entropy", "percentile"] = "percentile"
    percentile: Annotated[float, Field(gt=50, le=100, allow_inf_nan=False)] = 99.99


class Build(_Frozen):
    """How engines are built."""

    batches: tuple[Count, Count, Count] = (1, 8, 64)  # smallest, usual and largest: the optimisation profile
    edges: Literal["fp32", "native"] = "fp32"  # types of the graph's input and output; native: the engine's own
    tf32: bool = False  # whether FP32 may be computed with the precision of TF32, in both engines
    workspace: Count | None = None  # MiB of scratch memory; None: the library's choice
    optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None  # None: the library's choice
    version_compatible: bool = False  # the plan runs with later TensorRT versions of the same major one
    hardware_compatible: bool = False  # the plan runs on later GPU architectures
    capabilities: tuple[Capability, ...] = ()  # TensorRT for RTX; (): the GPU's here, or all that can
    max_layer_error: Positive = 0.1  # INT8: a layer that alone moves the logits by more of their RMS stays wider
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _ordered(self) -> Build:
        least, usual, largest = self.batches
        if not least <= usual <= largest:
            raise ValueError(f"build.batches are smallest,usual,largest, but {least},{usual},{largest} do not ascend")
        return self


class Training(_Frozen):
    """How both networks are trained. Epochs default to what the data set needs."""

    epochs: Annotated[int, Field(ge=1)] | None = None
    full_epochs: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: Positive = 0.1
    gated_lr: Positive | None = None  # None: `lr`, or half of it where the gated run starts from the full weights
    momentum: Share = 0.9
    weight_decay: NonNegative = 5e-4
    warmup: Share = 0.05  # share of the run
    label_smoothing: Share = 0.0
    flip: bool | None = None  # None: what suits the data set
    crop_padding: Annotated[int, Field(ge=0)] | None = None  # pixels; None: what suits the data set
    cutout: Annotated[int, Field(ge=0)] = 0  # pixels a side; 0: off
    start: Literal["full", "scratch"] = "full"  # weights that the gated run starts from
    distill: Share = 0.5  # share of the loss that the full network teaches in the gated run
    distill_temperature: Positive = 2.0
    amp: Literal["auto", "off", "bf16"] = "auto"  # auto: bf16 where the GPU has it, else off
    channels_last: bool = True
    final: bool = False  # True: train on 100 % of the training set, no validation split
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads of torch; 0: torch's own choice


class Gates(_Frozen):
    """How gates learn. `start` and `freeze` are shares of the gated run: where they begin to close, and are fixed."""

    mode: Literal["batch", "sample"] = "batch"  # who decides: one for all samples, or a light network a sample
    blocks: bool = True
    start: Share | None = None  # None: 0.05, or 0.3 in a run from scratch, whose weights have to say something first
    freeze: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None  # None: 0.25 later
    min_width: Share = 0.25  # a layer that stays keeps at least this share of its channels

    @model_validator(mode="after")
    def _ordered(self) -> Gates:
        if self.start is not None and self.freeze is not None and self.start >= self.freeze:
            raise ValueError(f"gates.start ({self.start}) must lie before gates.freeze ({self.freeze})")
        return self


class Bundle(_Frozen):
    """What the edge team gets."""

    full: bool = True  # whether the full network goes along, so that the device can measure the speed-up itself
    golden: Literal["data", "random"] = "data"  # golden inputs; random where the data is confidential
    licence: Text | None = None  # of the networks, such as "Apache-2.0"


class Settings(_Frozen):
    """All that decides a run's result. Defaults are those of the command line."""

    model: str
    target: str = "ort-fp32"
    data: str = "cifar10"
    data_dir: Path | None = None
    input_size: Annotated[int, Field(ge=8, le=1024)] | None = None  # pixels a side; None: the data set's own
    normalize: Normalize | None = None  # None: the data set's own
    full_weights: Path | None = None
    budget: Budget | None = None  # None: latency=0.6 where the target can be measured here, macs=0.5 elsewhere
    align: Annotated[int, Field(ge=1, le=64)] | None = None  # None: the target's; 1 where a device says the widths
    device: Text | None = None  # whose widths are taken, a name or a file; None: multiples of `align`
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    build: Build = Build()
    verdict: Verdict = Verdict()
    bundle: Bundle = Bundle()
    latency_table: Path | None = None  # for a latency budget; None: the pipeline makes it, if the target is here
    training: Training = Training()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _verdict_within_profile(self) -> Settings:
        least, _, largest = self.build.batches
        if not least <= self.verdict.batch <= largest:
            raise ValueError(
                f"verdict.batch is {self.verdict.batch}, the engines are built for batches of {least} to {largest}"
            )
        return self


# --------------------------------------------------------------------------- with all that was left open decided


class ResolvedTraining(Training):
    """Training with every default filled in."""

    epochs: Count
    full_epochs: Count
    gated_lr: Positive
    flip: bool
    crop_padding: Annotated[int, Field(ge=0)]


class ResolvedGates(Gates):
    """Gates with both ends of their closing known."""

    start: Share
    freeze: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class ResolvedSettings(Settings):
    """Settings of which nothing is left to be decided; what is still None is off, or not given."""

    input_size: Annotated[int, Field(ge=8, le=1024)]
    normalize: Normalize
    budget: Budget
    align: Annotated[int, Field(ge=1, le=64)]
    training: ResolvedTraining
    gates: ResolvedGates
