"""What an engine is built for: "trt-fp16" is a backend and a precision. The only place that probes this machine.

Probing imports neither TensorRT nor ONNX Runtime: TensorRT kills the process where there is no GPU.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

from polar_deploy import gpu
from polar_deploy.errors import MachineError, UsageError

# Channels that fill the hardware's matrix units, by precision. On a CPU any number of channels does: 1.
# Widths that are multiples of these run at full speed. ONNX Runtime on a CPU leaves its blocked kernels where a
# convolution reads more than 16 channels that are no multiple of 4, and computes 8 or 16 outputs at a time.
_ALIGN = {"fp32": 1, "fp16": 8, "bf16": 8, "int8": 32}
_ALIGN_ORT = {"fp32": 8, "int8": 16}
LIBRARIES = {"trt": "TensorRT", "rtx": "TensorRT for RTX"}  # of the backends whose engines are plans


@dataclass(frozen=True)
class Target:
    """What an engine is built for.

    Attributes:
        name: as the command line has it.
        backend: "ort", "ort-cuda", "trt" or "rtx".
        precision: "fp32", "fp16", "bf16" or "int8".
        align: default alignment of the compressed network's widths, in channels.
    """

    name: str
    backend: str
    precision: str
    align: int

    @property
    def has_plans(self) -> bool:
        """Whether its engines are files of their own beside the ONNX graph."""
        return self.backend in LIBRARIES


def _target(name: str) -> Target:
    backend, _, precision = name.rpartition("-")
    return Target(name, backend, precision, align=(_ALIGN_ORT if backend == "ort" else _ALIGN)[precision])


TARGETS = {
    name: _target(name)
    for name in (
        *("ort-fp32", "ort-int8", "ort-cuda-fp32", "ort-cuda-fp16"),
        *("trt-fp32", "trt-fp16", "trt-bf16", "trt-int8"),
        *("rtx-fp32", "rtx-fp16", "rtx-int8"),
    )
}


AUTO = ("trt-fp16", "rtx-fp16", "ort-cuda-fp16", "ort-fp32")  # what `auto` tries, the fastest first
EXTRAS = {"ort": "ort", "ort-cuda": "ort-gpu", "trt": "trt", "rtx": "rtx"}  # backend -> what pip installs for it


@dataclass(frozen=True)
class _Need:
    """A Python package: the module, the distributions that bring it, the oldest version that will do."""

    module: str
    distributions: tuple[str, ...]
    oldest: str

    def installed(self) -> str | None:
        """The version that is installed, or None."""
        return next((version for name in self.distributions if (version := _version(name))), None)

    def missing(self) -> str | None:
        """Say what is missing, or None."""
        found = self.installed()
        if found is None or not _found(self.module):
            return f"{self.distributions[0]} >= {self.oldest} is not installed"
        if _numbers(found) < _numbers(self.oldest):
            return f"{self.distributions[0]} is {found}, older than {self.oldest}"
        return None


_ORT = _Need("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "1.19")  # writes FP16 and INT8 graphs, too
_POLYGRAPHY = _Need("polygraphy", ("polygraphy",), "0.53.4")  # older ones break on TensorRT 11
_TRT_WHEELS = ("tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings")
_CUDA = _Need("cuda.bindings", ("cuda-bindings",), "12.6")
_RUNTIME = {
    "ort": _ORT,
    "ort-cuda": _Need("onnxruntime", ("onnxruntime-gpu",), "1.19"),
    "trt": _Need("tensorrt", ("tensorrt", *_TRT_WHEELS), "10.0"),
    "rtx": _Need("tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"), "1.1"),
}
_TO_BUILD = {
    backend: (need, *((_POLYGRAPHY, _ORT) if backend in LIBRARIES else ())) for backend, need in _RUNTIME.items()
}
_TO_RUN = {backend: (need, *((_CUDA,) if backend in LIBRARIES else ())) for backend, need in _RUNTIME.items()}

# The oldest compute capability that has a precision in its matrix units, and that a backend supports.
PRECISION_SINCE = {"fp32": (5, 0), "fp16": (7, 0), "bf16": (8, 0), "int8": (7, 2), "fp8": (8, 9)}
_BACKEND_SINCE = {"ort": (0, 0), "ort-cuda": (5, 0), "trt": (7, 5), "rtx": (7, 5)}
_BACKEND_NEVER = {"rtx": {(9, 0), (10, 0), (10, 3)}}  # no TensorRT for RTX on GPUs for data centres


def parse(name: str) -> Target:
    """Read a target's name.

    Raises:
        UsageError: no such target, or one that is planned but not built yet.
    """
    if name in TARGETS:
        return TARGETS[name]
    if name == "trt-fp8":
        raise UsageError("target trt-fp8 is not built yet", "use trt-fp16 or trt-int8")
    near = difflib.get_close_matches(name, TARGETS, n=1)
    todo = f"did you mean {near[0]}?" if near else "choose one of them"
    raise UsageError(f"unknown target {name!r}; known are {', '.join(TARGETS)}", todo)


def choose() -> Target:
    """The best target that can be built and run here: what `--target auto` means."""
    return next((t for t in map(parse, AUTO) if not lacks_to_build(t) + lacks_to_run(t)), TARGETS[AUTO[-1]])


def check(target: Target) -> None:
    """Find out in milliseconds whether an engine for `target` can be built here, and whether all is there to run it.

    TensorRT for RTX builds without a GPU; that such an engine cannot run here is no error (`lacks_to_run`).

    Raises:
        MachineError: names everything that is missing, and what works here instead.
    """
    lacking = lacks_to_build(target)
    if not lacking and _gpu_missing(target) is None:
        lacking = lacks_to_run(target)
    if lacking:
        what = f"target {target.name} cannot be built here: {'; '.join(lacking)}"
        raise MachineError(what, f"{_way_out(target)}, or add --until surgery, which works anywhere")


def lacks_to_build(target: Target) -> list[str]:
    """What is missing here to build an engine for `target`, a clause each; [] if nothing is."""
    lacking = [lack for need in _TO_BUILD[target.backend] if (lack := need.missing())]
    if target.backend in ("trt", "ort-cuda") and (lack := _gpu_missing(target)):
        lacking.insert(0, lack)
    return lacking


def lacks_to_run(target: Target) -> list[str]:
    """What is missing here to run an engine of `target`, a clause each; [] if nothing is."""
    lacking = [lack for need in _TO_RUN[target.backend] if (lack := need.missing())]
    if lack := _gpu_missing(target):
        return [lack, *lacking]
    if _CUDA in _TO_RUN[target.backend] and not lacking and (lack := _driver_too_old()):
        lacking.append(lack)
    return lacking


def identity(target: Target) -> dict[str, str | None]:
    """What an engine depends on here: GPU, driver, and the versions of the packages that build and run it."""
    found = {need.module: need.installed() for need in (*_TO_BUILD[target.backend], *_TO_RUN[target.backend])}
    if target.backend != "ort":
        try:
            device = gpu.first()
            found |= {"gpu": f"{device.name} {device.capability}", "driver": gpu.cuda_version()}
        except gpu.NoGpuError:
            found |= {"gpu": None, "driver": None}
    return found


def _way_out(target: Target) -> str:
    """Name the nearest target that works here (those of ONNX Runtime need no GPU), or what to install for it."""
    if _gpu_missing(target) is None:
        return f"install what is missing: pip install 'polar-deploy[{EXTRAS[target.backend]}]'"
    near = TARGETS.get(f"ort-{target.precision}", TARGETS["ort-fp32"])
    if lacks_to_build(near):
        return f"install polar-deploy[ort], which is enough for --target {near.name}"
    return f"use --target {near.name}, which works here"


def _gpu_missing(target: Target) -> str | None:
    if target.backend == "ort":
        return None
    try:
        return _too_old(gpu.first(), target)
    except gpu.NoGpuError as error:
        return str(error)


def _driver_too_old() -> str | None:
    """Why the installed cuda-bindings are none for this driver: CUDA 13's ask for a driver of CUDA 13."""
    bindings, driver = _CUDA.installed() or "", gpu.cuda_version()
    if _numbers(bindings)[:1] <= _numbers(driver)[:1]:
        return None
    major = _numbers(driver)[0]
    return f"cuda-bindings is {bindings}, the driver knows CUDA {driver} (pip install 'cuda-bindings<{major + 1}')"


def _too_old(device: gpu.Gpu, target: Target) -> str | None:
    """Why a GPU is no good for a target: what its architecture lacks."""
    what, since = max(
        (f"support for {target.backend}", _BACKEND_SINCE[target.backend]),
        (target.precision.upper(), PRECISION_SINCE[target.precision]),
        key=lambda each: each[1],
    )
    has, needed = (".".join(map(str, each)) for each in (device.capability, since))
    if device.capability in _BACKEND_NEVER.get(target.backend, ()):
        return f"{device.name} has no support for {target.backend} (compute capability {has})"
    if device.capability >= since:
        return None
    return f"{device.name} has no {what} (compute capability {has}, {needed} is needed)"


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version, for comparing: "10.13.3.9.post1" gives (10, 13, 3, 9)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()
