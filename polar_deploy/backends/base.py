"""What every backend says of itself: targets, packages, artefact, and what it lacks on this machine.

Nothing here imports a runtime: TensorRT ends the process where there is no GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from polar_deploy import gpu
from polar_deploy.gpu import Gpu

# The oldest compute capability that has a precision in its matrix units.
PRECISION_SINCE = {"fp32": (5, 0), "fp16": (7, 0), "bf16": (8, 0), "int8": (7, 2), "fp8": (8, 9)}


@dataclass(frozen=True)
class Package:
    """A Python package: the module, the distributions that bring it, the oldest version that will do."""

    module: str
    distributions: tuple[str, ...]
    oldest: str

    def installed(self) -> str | None:
        """The version that is installed, or None."""
        return next((version for name in self.distributions if (version := installed_version(name))), None)

    def missing(self) -> str | None:
        """Say what is missing, or None."""
        found = self.installed()
        if found is None or not _found(self.module):
            return f"{self.distributions[0]} >= {self.oldest} is not installed"
        if numbers(found) < numbers(self.oldest):
            return f"{self.distributions[0]} is {found}, older than {self.oldest}"
        return None


@dataclass(frozen=True)
class GpuSupport:
    """Which GPUs a backend runs on.

    Attributes:
        since: the oldest compute capability.
        never: compute capabilities that it leaves out.
        to_build: whether engines are built on the GPU, too.
    """

    since: tuple[int, int]
    never: frozenset[tuple[int, int]] = frozenset()
    to_build: bool = True


@dataclass(frozen=True)
class Artefact:
    """The kind of file that an engine is loaded from.

    Attributes:
        suffix: end of its name.
        is_code: whether loading one runs what its maker wrote, so that the maker has to be trusted.
    """

    suffix: str
    is_code: bool


GRAPH = Artefact(".onnx", is_code=False)  # the typed graph itself, which the runtime compiles when it is loaded
PLAN = Artefact(".plan", is_code=True)  # TensorRT's file beside the typed graph


@dataclass(frozen=True, eq=False)
class Backend:
    """A runtime that engines are built for.

    Attributes:
        name: first part of its targets' names, and "backend" in build.json.
        library: its name for people.
        runtime: the module of `polar_deploy.engines` that builds and loads its engines.
        extra: the extra of this package that brings what it takes.
        align: default alignment of the compressed network's widths, in channels, by precision; these are its targets.
        packages: what it takes to run its engines.
        build_packages: what it takes besides to build them.
        artefact: what an engine is loaded from.
        int8: the dialect of Q/DQ pairs that it fuses, a key of `precision.qdq.SCHEMES`.
        gpu: the GPUs that it runs on; None: it runs on the CPU.
        triton: name of Triton's backend that serves its artefact; None: there is none.
        proves_types: whether a built engine tells in which types its layers run, so that `build` can hold it to that.
    """

    name: str
    library: str
    runtime: str
    extra: str
    align: Mapping[str, int]
    packages: tuple[Package, ...]
    build_packages: tuple[Package, ...] = ()
    artefact: Artefact = GRAPH
    int8: Literal["onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    gpu: GpuSupport | None = None
    triton: str | None = None
    proves_types: bool = True

    def lacks_to_build(self, precision: str) -> list[str]:
        """What is missing here to build an engine in a precision, a clause each; [] if nothing is."""
        lacking = [lack for each in self._needed_to_build if (lack := each.missing())]
        hardware = self.lacking_hardware(precision) if self.gpu is None or self.gpu.to_build else None
        return [hardware, *lacking] if hardware else lacking

    def lacks_to_run(self, precision: str) -> list[str]:
        """What is missing here to run an engine of a precision, a clause each; [] if nothing is."""
        lacking = [lack for each in self.packages if (lack := each.missing())]
        hardware = self.lacking_hardware(precision)
        return [hardware, *lacking] if hardware else lacking

    def lacking_hardware(self, precision: str) -> str | None:
        """Why the GPU or the CPU here cannot run a precision, or None."""
        if self.gpu is None:
            return None
        try:
            return self.why_not_on(gpu.first(), precision)
        except gpu.NoGpuError as error:
            return str(error)

    def why_not_on(self, device: Gpu, precision: str) -> str | None:
        """Why a GPU is no good for a precision: what its architecture lacks; None: it is."""
        assert self.gpu is not None
        what, since = max(
            (f"support for {self.name}", self.gpu.since),
            (precision.upper(), PRECISION_SINCE[precision]),
            key=lambda each: each[1],
        )
        has, needed = (".".join(map(str, each)) for each in (device.capability, since))
        if device.capability in self.gpu.never:
            return f"{device.name} has no support for {self.name} (compute capability {has})"
        if device.capability >= since:
            return None
        return f"{device.name} has no {what} (compute capability {has}, {needed} is needed)"

    def identity(self) -> dict[str, str | None]:
        """What an engine depends on here: versions of packages, GPU and driver."""
        found = {each.module: each.installed() for each in (*self._needed_to_build, *self.packages)}
        if self.gpu is not None:
            try:
                device = gpu.first()
                found |= {"gpu": f"{device.name} {device.capability}", "driver": gpu.cuda_version()}
            except gpu.NoGpuError:
                found |= {"gpu": None, "driver": None}
        return found

    def triton_settings(self, *, threads: int, tf32: bool) -> list[str]:
        """Lines of Triton's config.pbtxt that its backend needs to run an artefact as it was measured.

        Args:
            threads: CPU threads of an inference.
            tf32: whether FP32 may be computed as TF32.
        """
        return [triton_instances("CPU" if self.gpu is None else "GPU")]

    def triton_notes(self, precision: str) -> list[str]:
        """What whoever serves an artefact of this precision with Triton has to know, a line each."""
        return []

    @property
    def _needed_to_build(self) -> tuple[Package, ...]:
        return (self.packages[0], *self.build_packages)


def triton_instances(kind: str) -> str:
    """The line of config.pbtxt that says where a model runs: "CPU" or "GPU"."""
    return f"instance_group [ {{ count: 1 kind: KIND_{kind} }} ]"


def numbers(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version, for comparing: "10.13.3.9.post1" gives (10, 13, 3, 9)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


def installed_version(distribution: str) -> str | None:
    """The version of a distribution that is installed here, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
