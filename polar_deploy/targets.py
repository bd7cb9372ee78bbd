"""What an engine is built for: "trt-fp16" is a backend and a precision; and which of them work on this machine."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from polar_deploy import extras
from polar_deploy.backends import BACKENDS, Backend
from polar_deploy.errors import MachineError, UsageError

_BITS = {"int8": 8, "fp16": 16, "bf16": 16, "fp32": 32}


@dataclass(frozen=True)
class Target:
    """What an engine is built for: a runtime, and "fp32", "fp16", "bf16" or "int8"."""

    backend: Backend
    precision: str

    @property
    def name(self) -> str:
        """As the command line has it."""
        return f"{self.backend.name}-{self.precision}"

    @property
    def align(self) -> int:
        """Default alignment of the compressed network's widths, in channels."""
        return self.backend.align[self.precision]

    @property
    def wider(self) -> Target:
        """The same backend in its next wider precision; itself, if it has none."""
        wider = [each for each in self.backend.align if _BITS[each] > _BITS[self.precision]]
        return Target(self.backend, min(wider, key=_BITS.__getitem__, default=self.precision))


TARGETS = {each.name: each for backend in BACKENDS for each in (Target(backend, name) for name in backend.align)}
AUTO = ("trt-fp16", "rtx-fp16", "ort-cuda-fp16", "ort-fp32")  # what `auto` tries, the fastest first
EVERYWHERE = "ort"  # the backend that needs no particular hardware


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
    if not lacking and target.backend.lacking_hardware(target.precision) is None:
        lacking = lacks_to_run(target)
    if lacking:
        what = f"target {target.name} cannot be built here: {'; '.join(lacking)}"
        raise MachineError(what, f"{_way_out(target)}, or add --until surgery, which works anywhere")


def lacks_to_build(target: Target) -> list[str]:
    """What is missing here to build an engine for `target`, a clause each; [] if nothing is."""
    return target.backend.lacks_to_build(target.precision)


def lacks_to_run(target: Target) -> list[str]:
    """What is missing here to run an engine of `target`, a clause each; [] if nothing is."""
    return target.backend.lacks_to_run(target.precision)


def identity(target: Target) -> dict[str, str | None]:
    """What an engine depends on here: GPU, driver, and the versions of the packages that build and run it."""
    return target.backend.identity()


def install(target: Target) -> str:
    """The command that installs what `target` takes."""
    return extras.install(target.backend.extra)


def _way_out(target: Target) -> str:
    """Name the nearest target that works here, or what to install for it."""
    if target.backend.lacking_hardware(target.precision) is None:
        return f"install what is missing, {install(target)}"
    near = TARGETS.get(f"{EVERYWHERE}-{target.precision}", TARGETS[f"{EVERYWHERE}-fp32"])
    if lacks_to_build(near):
        return f"install what is enough for --target {near.name}, {install(near)}"
    return f"use --target {near.name}, which works here"
