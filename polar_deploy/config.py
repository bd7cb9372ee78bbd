"""What a run is: one frozen, validated tree of settings. `polar_deploy.recipes` reads and writes it.

`Settings` are what somebody asked for, where None leaves a choice to the data set, the target or the machine.
`polar_deploy.resolved` has the same with these choices made: what a run works with.

Each setting is declared once, here: type, range, default, and in `About` what people are told of it. The options of
the command line, `polar-deploy settings` and the messages about wrong values are made of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polar_deploy.errors import CONTROL

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
OpenShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
PositiveShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]  # none at all, too
BatchSize = Annotated[int, Field(ge=2)]
Decoder = Literal["auto", "dali", "pillow"]
Capability = Annotated[str, Field(pattern=r"^[1-9][0-9]*\.[0-9]$")]  # compute capability, such as "8.9"
Text = Annotated[str, Field(max_length=2000, pattern=f"^[^{CONTROL}]*$")]  # all of which may be shown on a terminal
Pixels = Annotated[int, Field(ge=8, le=1024)]
Channels = Annotated[int, Field(ge=1, le=64)]
Triple = tuple[float, float, float]


LOCAL_PATHS = {"data_dir", "full_weights", "latency_table"}  # where files lie; what they hold counts for itself


@dataclass(frozen=True)
class About:
    """What people are told of a setting.

    Attributes:
        meaning: what it says, one line.
        unit: of its value; "" where it has none.
        unset: what None stands for; "" where it cannot be None.
        option: the option of the command line that sets it, with what stands for its value in --help where values are
            not listed, such as "--align N"; "" where only --set and recipes do.
    """

    meaning: str
    unit: str = ""
    unset: str = ""
    option: str = ""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Normalize(_Frozen):
    """Input normalisation, `(rgb / 255 - mean) / std` a channel."""

    mean: Annotated[Triple, About("of red, green and blue, each from 0 to 1")]
    std: Annotated[tuple[Positive, Positive, Positive], About("standard deviations of red, green and blue")]


class Budget(_Frozen):
    """Upper bounds on the compressed network's cost, each as a share of the full network's."""

    macs: Annotated[
        OpenShare | None, About("multiply-accumulates of one inference", "share of the full network's", "any number")
    ] = None
    params: Annotated[OpenShare | None, About("parameters", "share of the full network's", "any number")] = None
    latency: Annotated[
        OpenShare | None, About("time of one inference on the target", "share of the full network's", "any")
    ] = None

    @model_validator(mode="after")
    def _not_empty(self) -> Budget:
        if not self.asked():
            raise ValueError("a budget names at least one of macs, params, latency")
        return self

    def asked(self) -> dict[str, float]:
        """The bounds that were set, by the name of the cost."""
        return {name: share for name, share in self.model_dump().items() if share is not None}


class AcceptanceCriteria(_Frozen):
    """When the compressed engine counts as good: accuracy in points, latency as a speed-up over the full engine."""

    max_drop: Annotated[
        NonNegative, About("accuracy that the compressed network may lose", "points", "", "--max-drop POINTS")
    ] = 1.0
    accuracy_rule: Annotated[
        Literal["interval", "point"],
        About(
            "what has to be within --max-drop: the drop's whole 95 % interval, or the drop as counted",
            option="--accuracy-rule",
        ),
    ] = "interval"
    min_speedup: Annotated[
        Positive, About("how much faster it must be at least", "times as fast", "", "--min-speedup X")
    ] = 1.02
    max_latency_ms: Annotated[
        Positive | None,
        About(
            "what an inference of the compressed network may take: 5 (the median), or p99=5",
            "ms",
            "any",
            "--max-latency-ms [P=]MS",
        ),
    ] = None
    latency_percentile: Annotated[
        Literal["p50", "p90", "p95", "p99", "p99.9"], About("which latency is held against max_latency_ms")
    ] = "p50"
    batch: Annotated[Count, About("batch size at which the speed-up is judged", "images", "", "--verdict-batch N")] = 1


class Calibration(_Frozen):
    """What fixes the ranges of INT8: so many training images, and how a range is read off the values they give."""

    images: Annotated[Count, About("training images whose values are looked at", "images")] = 512
    method: Annotated[Literal["minmax", "entropy", "percentile"], About("how a range is read off the values")] = (
        "percentile"
    )
    percentile: Annotated[
        float, Field(gt=50, le=100, allow_inf_nan=False), About("values within the range, with that method", "%")
    ] = 99.99


class Build(_Frozen):
    """How engines are built."""

    batches: Annotated[
        tuple[Count, Count, Count],
        About("min, opt and max batch of the engines", "images", "", "--batch N[,N,N]"),
    ] = (1, 8, 64)
    io_dtype: Annotated[
        Literal["fp32", "native"], About("types of the graph's input and output; native: the engine's own")
    ] = "fp32"
    tf32: Annotated[bool, About("whether FP32 may be computed with the precision of TF32, in both engines")] = False
    workspace: Annotated[Count | None, About("scratch memory of TensorRT", "MiB", "the library's choice")] = None
    optimization_level: Annotated[
        Annotated[int, Field(ge=0, le=5)] | None,
        About("how long TensorRT looks for fast kernels, 0 to 5", unset="the library's choice"),
    ] = None
    version_compatible: Annotated[
        bool, About("whether the plan runs with later TensorRT versions of the same major one")
    ] = False
    hardware_compatible: Annotated[bool, About("whether the plan runs on later GPU architectures")] = False
    capabilities: Annotated[
        tuple[Capability, ...],
        About("GPUs that TensorRT for RTX builds for, as compute capabilities; none: the GPU's here, or all that can"),
    ] = ()
    max_layer_error: Annotated[
        Positive, About("INT8: a layer that alone moves the logits by more stays wider", "share of the logits' RMS")
    ] = 0.1
    reduce_range: Annotated[
        bool | None,
        About(
            "whether INT8 weights have 7 bits, for CPUs without VNNI, whose kernels overflow with 8",
            unset="where the kernels here do",
        ),
    ] = None
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _ordered(self) -> Build:
        least, opt, most = self.batches
        if not least <= opt <= most:
            raise ValueError(f"build.batches are min,opt,max, but {least},{opt},{most} do not ascend")
        return self


class Training(_Frozen):
    """How both networks are trained."""

    epochs: Annotated[Count | None, About("length of the gated run", "epochs", "the data set's", "--epochs N")] = None
    full_epochs: Annotated[
        Count | None, About("length of the full network's training", "epochs", "as training.epochs", "--full-epochs N")
    ] = None
    batch_size: Annotated[BatchSize | None, About("images in one step", "images", "what suits the data set")] = None
    accumulate: Annotated[
        Count,
        About("passes that a step is made in, for devices with little memory; BatchNorm sees one pass's images"),
    ] = 1
    lr: Annotated[Positive, About("largest learning rate")] = 0.1
    gated_lr: Annotated[
        Positive | None,
        About("that of the gated run", unset="training.lr, or half of it where the run starts from the full weights"),
    ] = None
    momentum: Annotated[Share, About("of SGD, Nesterov's")] = 0.9
    weight_decay: Annotated[NonNegative, About("of SGD")] = 5e-4
    warmup: Annotated[Share, About("over which the learning rate rises", "share of the run")] = 0.05
    label_smoothing: Annotated[Share, About("share of a label that is spread over all classes")] = 0.0
    flip: Annotated[bool | None, About("whether images are mirrored at random", unset="what suits the data set")] = None
    crop_padding: Annotated[
        CountOrNone | None, About("by how much images are shifted at random", "pixels", "what suits the data set")
    ] = None
    crop_scale: Annotated[
        PositiveShare | None,
        About(
            "least area of a random resized crop; 1: shifted by training.crop_padding instead",
            "share of the image",
            "what suits the data set",
        ),
    ] = None
    cutout: Annotated[CountOrNone, About("side of a square that is blanked at random; 0: none", "pixels")] = 0
    decoder: Annotated[
        Decoder, About("what reads the JPEGs of random resized crops; auto: NVIDIA DALI beside a GPU, if installed")
    ] = "auto"
    init_from: Annotated[Literal["full", "scratch"], About("weights that the gated run starts from")] = "full"
    distill: Annotated[Share, About("how much the full network teaches in the gated run", "share of the loss")] = 0.9
    distill_share: Annotated[
        PositiveShare, About("how much of each batch the full network looks at", "share of the images")
    ] = 0.5
    distill_temperature: Annotated[Positive, About("of the teacher's and the student's logits")] = 4.0
    amp: Annotated[
        Literal["auto", "fp32", "bf16"], About("what training computes in; auto: bf16 where a step is faster in it")
    ] = "auto"
    channels_last: Annotated[bool, About("whether tensors lie in memory with their channels last")] = True
    train_on_validation: Annotated[
        bool, About("whether all of the training set is trained on, without a validation split")
    ] = False
    threads: Annotated[CountOrNone, About("CPU threads of PyTorch; 0: its own choice")] = 0
    deterministic: Annotated[
        bool,
        About("whether GPUs compute the same each time; slower, and some networks cannot", option="--deterministic"),
    ] = False


CLOSING = {"batch": 0.07, "sample": 0.25}  # share of the run in which gates close; what samples decide is learned first


def fixed_at(close_from: float, freeze_at: float | None, closing: float) -> float:
    """The share of the run at which gates are fixed: as asked, or after so long a `closing`."""
    return round(min(1.0, close_from + closing), 6) if freeze_at is None else freeze_at


class Gates(_Frozen):
    """How gates learn. `close_from` and `freeze_at` say where they begin to close, and are fixed."""

    mode: Annotated[
        Literal["batch", "sample"], About("who decides: one for all samples, or a light network for each")
    ] = "batch"
    blocks: Annotated[bool, About("whether whole residual blocks have gates, too")] = True
    heads: Annotated[bool, About("whether heads of attention have gates, too")] = False
    close_from: Annotated[
        Share | None,
        About("where gates begin to close", "share of the gated run", "0.05, or 0.3 in a run from scratch"),
    ] = None
    freeze_at: Annotated[
        PositiveShare | None,
        About(
            "where gates are fixed",
            "share of the gated run",
            "0.07 after gates.close_from, or 0.25 in a run from scratch or where samples decide",
        ),
    ] = None
    min_width: Annotated[Share, About("what a layer that stays keeps at least", "share of its channels")] = 0.25

    @model_validator(mode="after")
    def _ordered(self) -> Gates:
        if self.close_from is not None and self.freeze_at is not None and self.close_from >= self.freeze_at:
            raise ValueError(f"gates.close_from ({self.close_from}) must lie before gates.freeze_at ({self.freeze_at})")
        return self


class Bundle(_Frozen):
    """What the edge team gets."""

    full: Annotated[
        bool, About("whether the full network goes along, for timing on the device", option="--with-full")
    ] = True
    golden: Annotated[
        Literal["data", "random"],
        About("golden inputs: of the data set, or random where that is confidential", option="--golden"),
    ] = "data"
    licence: Annotated[Text | None, About('of the networks, such as "Apache-2.0"', unset="not said")] = None


class Settings(_Frozen):
    """All that decides a run's result. Defaults are those of the command line."""

    model: Annotated[
        str,
        About("resnet20/32/44/56/110, a torchvision classifier, or package.module:function", option="--model MODEL"),
    ]
    task: Annotated[
        str,
        About(
            "what the network is for: classification, segmentation, detection, or package.module:function",
            option="--task TASK",
        ),
    ] = "classification"
    target: Annotated[
        str, About("what the engine is for, such as trt-fp16; auto: the fastest one here", option="--target TARGET")
    ] = "ort-fp32"
    data: Annotated[
        str | None,
        About(
            "folder:DIR, digits, cifar10, cifar100, tiny-imagenet, imagenet, or package.module:function; "
            "for segmentation pairs:DIR, for detection coco:DIR",
            "",
            "cifar10, or the task's own",
            "--data DATA",
        ),
    ] = None
    data_dir: Annotated[Path | None, About("where the data lies", "", "data", "--data-dir DIR")] = None
    input_size: Annotated[Pixels | None, About("side of the images", "pixels", "the data set's own")] = None
    normalize: Annotated[Normalize | None, About("input normalisation", "", "the data set's own")] = None
    skip_broken: Annotated[
        bool,
        About(
            "whether picture files that cannot be decoded are left out; else they end the run", option="--skip-broken"
        ),
    ] = False
    full_weights: Annotated[
        Path | None,
        About("take the full network as given (.safetensors, .npz, .pth)", "", "it is trained", "--full-weights FILE"),
    ] = None
    budget: Annotated[
        Budget | None,
        About(
            "share of the full cost to keep: 0.5, or macs=0.5,params=0.6",
            "",
            "latency=0.6 where the target can be measured here and the network reaches that, else macs=0.5",
            "--budget B",
        ),
    ] = None
    align: Annotated[
        Channels | None, About("widths become multiples of this", "channels", "the target's", "--align N")
    ] = None
    device: Annotated[
        Text | None,
        About(
            "widths become such as this device likes (`polar-deploy devices list`)",
            "",
            "multiples of --align",
            "--device NAME",
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**32), About("of split, start values, order and gates", option="--seed N")] = 0
    build: Build = Build()
    accept: AcceptanceCriteria = AcceptanceCriteria()
    bundle: Bundle = Bundle()
    latency_table: Annotated[
        Path | None,
        About(
            "for a latency budget; `polar-deploy engines table` makes one",
            "",
            "it is measured here",
            "--latency-table FILE",
        ),
    ] = None
    training: Training = Training()
    gates: Gates = Gates()

    @model_validator(mode="after")
    def _judged_within_profile(self) -> Settings:
        least, _, largest = self.build.batches
        if not least <= self.accept.batch <= largest:
            raise ValueError(
                f"accept.batch is {self.accept.batch}, the engines are built for batches of {least} to {largest}"
            )
        return self

    @property
    def latency_is_measured(self) -> bool:
        """Whether a latency table tells what a latency budget limits; else the device's file does."""
        return self.device is None or self.latency_table is not None
