"""Engines: the two networks of a run, built for a target, loaded, run and timed. No torch.

`build_all` writes what build.json lists, `load` gives an `Engine`; `timing.compare` says which of two is faster.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from polar_deploy.engines.base import Array, Backend, Engine, Timer
from polar_deploy.errors import MachineError

if TYPE_CHECKING:
    from polar_deploy.targets import Target

__all__ = ["Array", "Backend", "Engine", "Timer", "build_all", "load"]

_BACKENDS = {"ort-fp32": "ort"}  # target -> module of this package


def build_all(full_onnx: Path, compressed_onnx: Path, folder: Path, target: Target) -> dict[str, Any]:
    """Build both engines into `folder` and return the content of build.json.

    Args:
        full_onnx: the full network, input [batch,C,H,W] and logits [batch,classes] in FP32.
        compressed_onnx: the compressed one, of the same input and classes.
        folder: the run's `engines/`.
        target: what to build for.

    Raises:
        MachineError: no backend for the target here.
        UsageError: a file is missing. ContentError: a file is not a network that the target can run.
    """
    backend = _backend(target)
    sources = {"full": full_onnx, "compressed": compressed_onnx}
    engines = {name: backend.build(source, folder, name, target) for name, source in sources.items()}
    return {"schema": 1, "target": target.name, "engines": engines}


def load(folder: Path, name: str, target: Target) -> Engine:
    """Load the engine `name` ("full" or "compressed") that `build_all` wrote into `folder`. Raises as `build_all`."""
    return _backend(target).load(folder, name)


def _backend(target: Target) -> Backend:
    if target.name not in _BACKENDS:
        known = ", ".join(_BACKENDS)
        raise MachineError(f"no engine can be built for {target.name} here", f"choose one of these targets: {known}")
    return cast("Backend", import_module(f"{__name__}.{_BACKENDS[target.name]}"))
