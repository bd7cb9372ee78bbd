"""Engines: the two networks of a run, built for a target, loaded, run and timed. No torch.

`build_all` writes what build.json lists, `load` gives an `Engine`; `timing.compare` says which of two is faster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from polar_deploy import __version__, onnx_files, precision, targets
from polar_deploy.documents.build import Built, BuiltEngine, File, Plan, Precision, Types
from polar_deploy.engines import machine
from polar_deploy.engines.base import Array, Engine, Runtime, Timer, infer_all
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.surgery import detached
from polar_deploy.surgery.count import count
from polar_deploy.tensors import Arrays
from polar_deploy.workspace import sha256

if TYPE_CHECKING:
    import onnx

    from polar_deploy.config import Build
    from polar_deploy.precision.proof import Kernels

__all__ = [
    "Array",
    "Engine",
    "Runtime",
    "Timer",
    "build",
    "build_all",
    "infer_all",
    "kernels",
    "load",
    "open_artefact",
    "open_built",
    "rebuild",
    "reference_engine",
    "require_fit",
]


def build_all(
    full_onnx: Path,
    compressed_onnx: Path,
    folder: Path,
    target: targets.Target,
    options: Build,
    calibration: Arrays | None = None,
) -> Built:
    """Build both engines into `folder`.

    Args:
        full_onnx: the full network in FP32; the batch is all that varies in its inputs and outputs.
        compressed_onnx: the compressed one, of the same inputs and outputs.
        folder: the run's `engines/`.
        target: what to build for.
        options: how.
        calibration: inputs of training samples, by name, for an INT8 target.

    Raises:
        UsageError: a file is missing. MachineError: this machine lacks something.
        ContentError: a file is not a network that the target can run, or no calibration samples.
    """
    sources = {"full": full_onnx, "compressed": compressed_onnx}
    engines = {name: build(source, folder, name, target, options, calibration) for name, source in sources.items()}
    return Built(schema=2, target=target.name, engines=engines)


def build(
    source: Path, folder: Path, name: str, target: targets.Target, options: Build, calibration: Arrays | None = None
) -> BuiltEngine:
    """Build one engine from an FP32 network as `folder/NAME.*`; return its entry in build.json. See `build_all`."""
    start = time.perf_counter()
    targets.check(target)
    model = onnx_files.read(source)
    types = precision.write(source, folder / f"{name}.onnx", target, options, calibration, kernels(target))
    return _built(model, folder, name, target, options, types, start)


def rebuild(
    sources: Mapping[str, tuple[Path, Path]],
    folder: Path,
    target: targets.Target,
    options: Build,
    types: Mapping[str, Types],
) -> Built:
    """Build engines from graphs that have their types already, into `folder`.

    Args:
        sources: name -> (typed graph, FP32 graph that it was made from).
        folder: where to; a `timing.cache` that lies there is used.
        target: what the types were made for.
        options: how.
        types: name -> what `precision.write` said when it wrote them.

    Raises:
        As `build_all`.
    """
    engines: dict[str, BuiltEngine] = {}
    for name, (typed, fp32) in sources.items():
        start = time.perf_counter()
        detached.copy(typed, folder / f"{name}.onnx")
        engines[name] = _built(onnx_files.read(fp32), folder, name, target, options, types[name], start)
    return Built(schema=2, target=target.name, engines=engines)


def _built(
    model: onnx.ModelProto,
    folder: Path,
    name: str,
    target: targets.Target,
    options: Build,
    types: Types,
    start: float,
) -> BuiltEngine:
    """Build `folder/NAME.onnx`, which was made from the FP32 network `model`; return its entry in build.json."""
    costs = count(model)
    made = _runtime(target).build(folder / f"{name}.onnx", folder, name, target, options)
    versions = {"polar_deploy": __version__, "onnx": version("onnx"), **made.engine.versions}
    files = onnx_files.with_data(folder / file for file in made.files)
    return BuiltEngine(
        **made.engine.entries() | {"versions": versions},
        backend=target.backend.name,
        precision=Precision.model_validate({**types.entries(), "asked": target.precision, "found": made.found}),
        files={path.name: File(bytes=path.stat().st_size, sha256=sha256(path)) for path in files},
        macs=costs.macs,
        params=costs.params,
        seconds=round(time.perf_counter() - start, 3),
    )


def load(folder: Path, name: str, target: targets.Target) -> Engine:
    """Load the engine `name` ("full" or "compressed") that `folder/build.json` lists.

    Raises:
        UsageError: a file is missing.
        ContentError: it is not the file that was built, or is damaged.
        MachineError: it cannot run here.
    """
    if lacks := targets.lacks_to_run(target):
        raise MachineError(
            f"an engine for {target.name} cannot run here: {'; '.join(lacks)}",
            "`polar-deploy engines doctor` says what can",
        )
    entry = _entry(folder / "build.json", name, target)
    artefact = folder / f"{name}{target.backend.artefact.suffix}"
    for file in {f"{name}.onnx", artefact.name}:
        if file not in entry.files:
            raise ContentError(f"{folder / 'build.json'} does not list {file}", "let the build stage run again")
    for file, listed in entry.files.items():
        if (found := sha256(folder / file)) != listed.sha256:
            raise ContentError(
                f"{folder / file} is not the file that was built: its sha256 is {found[:12]}…, build.json says "
                f"{listed.sha256[:12]}…",
                "let the build stage run again",
            )
    return open_built(entry, folder, name, target)


def open_built(entry: BuiltEngine, folder: Path, name: str, target: targets.Target) -> Engine:
    """Load the engine that `build` has just made as `folder/NAME.*`. Raises as `open_artefact`."""
    artefact = folder / f"{name}{target.backend.artefact.suffix}"
    return open_artefact(artefact, target, entry.plan_file, tf32=entry.tf32)


def open_artefact(path: Path, target: targets.Target, plan: Plan | None, *, tf32: bool) -> Engine:
    """Load an artefact that is known to be the one which was built.

    Args:
        path: the file.
        target: what it was built for; it can run here.
        plan: what it was built with and for, if it is a plan.
        tf32: whether FP32 may be computed as TF32.

    Raises:
        ContentError: it is damaged. MachineError: it is for another machine.
    """
    return _runtime(target).load(path, target, plan, tf32=tf32)


def require_fit(path: Path, target: targets.Target, plan: Plan | None) -> None:
    """Raise unless an artefact can be loaded on this machine. As `Runtime.require_fit` says."""
    _runtime(target).require_fit(path, target, plan)


def kernels(target: targets.Target) -> Kernels | None:
    """How the target's runtime computes a typed graph. As `Runtime.kernels` says."""
    return _runtime(target).kernels(target)


def reference_engine(path: Path) -> Engine:
    """An FP32 ONNX file as an engine of ONNX Runtime on all cores: the reference that others are held against."""
    from polar_deploy.engines.ort import OrtEngine

    return OrtEngine(path, threads=machine.cores())


def _entry(path: Path, name: str, target: targets.Target) -> BuiltEngine:
    built = Built.read(path)
    entry = built.entry(name, path)
    if built.target != target.name:
        raise ContentError(
            f"{path}: the engines were built for {built.target}, not {target.name}", "let the build stage run again"
        )
    return entry


def _runtime(target: targets.Target) -> Runtime:
    return cast("Runtime", import_module(f"{__name__}.{target.backend.runtime}"))
