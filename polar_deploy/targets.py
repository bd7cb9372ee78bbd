"""What an engine is built for: "trt-fp16" is a backend and a precision. The only place that probes this machine.

Probing imports neither TensorRT nor ONNX Runtime: TensorRT kills the process where there is no GPU.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

from polar_deploy import __version__, gpu
from polar_deploy.errors import MachineError, UsageError

BUILDS = frozenset({"ort-fp32"})  # the targets whose engines this version can build

# Channels that fill the hardware's matrix units, by precision. On a CPU any number of channels does: 1.
_ALIGN = {"fp32": 1, "fp16": 8, "bf16": 8, "int8": 32}


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


def _target(name: str) -> Target:
    backend, _, precision = name.rpartition("-")
    return Target(name, backend, precision, align=1 if backend == "ort" else _ALIGN[precision])


TARGETS = {
    name: _target(name)
    for name in (
        *("ort-fp32", "ort-int8", "ort-cuda-fp32", "ort-cuda-fp16"),
        *("trt-fp32", "trt-fp16", "trt-bf16", "trt-int8"),
        *("rtx-fp32", "rtx-fp16", "rtx-int8"),
    )
}


@dataclass(frozen=True)
class _Need:
    """A Python package: the module, the distributions that bring it, the oldest version that will do."""

    module: str
    distributions: tuple[str, ...]
    oldest: str

    def missing(self) -> str | None:
        """Say what is missing, or None."""
        found = next((version for name in self.distributions if (version := _version(name))), None)
        if found is None or importlib.util.find_spec(self.module) is None:
            return f"{self.distributions[0]} >= {self.oldest} is not installed"
        if _numbers(found) < _numbers(self.oldest):
            return f"{self.distributions[0]} is {found}, older than {self.oldest}"
        return None


_NEEDS = {
    "ort": (_Need("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "1.19"),),
    "ort-cuda": (_Need("onnxruntime", ("onnxruntime-gpu",), "1.19"),),
    "trt": (
        _Need("tensorrt", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "10.0"),
        _Need("polygraphy", ("polygraphy",), "0.53.4"),
    ),
    "rtx": (
        _Need("tensorrt_rtx", ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"), "1.1"),
        _Need("polygraphy", ("polygraphy",), "0.53.4"),
    ),
}


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


def check(target: Target) -> None:
    """Find out in milliseconds whether an engine for `target` can be built and run here.

    Raises:
        MachineError: names everything that is missing, and what works here instead.
    """
    lacking = [lack for need in _NEEDS[target.backend] if (lack := need.missing())]
    if target.backend != "ort" and (lack := _gpu_missing(target)):
        lacking.insert(0, lack)
    if target.name not in BUILDS:
        lacking.append(f"polar_deploy {__version__} builds {', '.join(sorted(BUILDS))} only")
    if lacking:
        what = f"target {target.name} cannot be built here: {'; '.join(lacking)}"
        raise MachineError(what, f"{_way_out(target)}, or add --until surgery, which works anywhere")


def _way_out(target: Target) -> str:
    """Name the nearest target that works here (ort-fp32 needs no GPU), or what to install for it."""
    if any(need.missing() for need in _NEEDS["ort"]):
        return "install polar-deploy[ort], which is enough for --target ort-fp32"
    return "use --target ort-fp32, which works here"


def _gpu_missing(target: Target) -> str | None:
    try:
        return _too_old(gpu.first(), target)
    except gpu.NoGpuError as error:
        return str(error)


def _too_old(device: gpu.Gpu, target: Target) -> str | None:
    if target.precision == "bf16" and device.capability < (8, 0):
        return f"{device.name} has no BF16 (compute capability {'.'.join(map(str, device.capability))}, 8.0 is needed)"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version, for comparing: "10.13.3.9.post1" gives (10, 13, 3, 9)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()
