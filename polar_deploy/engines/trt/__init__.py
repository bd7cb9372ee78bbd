"""TensorRT (10.0 and later, 11.x) and TensorRT for RTX, one code path: strongly typed, the types are in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.backends.base import numbers
from polar_deploy.documents.build import BuiltPlan, EngineFacts, Plan
from polar_deploy.engines import child
from polar_deploy.engines.base import Made
from polar_deploy.errors import ContentError, MachineError

if TYPE_CHECKING:
    from polar_deploy.config import Build
    from polar_deploy.engines.trt.run import TrtEngine
    from polar_deploy.precision.proof import Kernels
    from polar_deploy.targets import Target

_AGAIN = "build again here: --from build"
_COMPATIBLE_SINCE = (8, 0)  # Ampere: a hardware-compatible plan runs on it and on what came later


def build(onnx_path: Path, folder: Path, name: str, target: Target, options: Build) -> Made:
    """Build in a child process. As `Runtime.build` says."""
    request = {
        "folder": str(folder.resolve()),
        "name": name,
        "target": target.name,
        "options": options.model_dump(mode="json"),
    }
    answer = child.call(f"{__name__}.builder:run", request, f"building an engine of {onnx_path}")
    made = BuiltPlan.model_validate(answer)
    plan = made.plan
    engine = EngineFacts(
        provider=plan.library,
        tf32=options.tf32,
        versions={plan.library: plan.version},
        plan=plan,
        reformats=made.reformats,
        padded_channels=made.padded_channels,
    )
    return Made(engine, made.found, (onnx_path.name, plan.file, f"{name}.layers.json"))


def kernels(target: Target) -> Kernels | None:
    """None: they run on a GPU only. As `Runtime.kernels` says."""
    return None


def load(artefact: Path, target: Target, plan: Plan | None, *, tf32: bool) -> TrtEngine:
    """Load a plan that was built for this GPU and this version of the library. As `Runtime.load` says."""
    from polar_deploy.engines.trt import library
    from polar_deploy.engines.trt.run import TrtEngine

    require_fit(artefact, target, plan)
    brings_code = plan is not None and plan.version_compatible
    backend = library.of(target)
    return TrtEngine(artefact, library.load(backend), library.logger(backend), host_code=brings_code)


def require_fit(artefact: Path, target: Target, plan: Plan | None) -> None:
    """Raise unless a plan is for the GPU and the version of the library that are here. As `Runtime.require_fit`."""
    from polar_deploy.engines.trt import library

    if plan is None:
        raise ContentError(f"{artefact}: build.json does not say what the plan is for", _AGAIN)
    require_plan_fits(artefact, plan, library.version(library.of(target)))


def require_plan_fits(path: Path, plan: Plan, version: str) -> None:
    """As `require_fit`, for a version of the library, which has four parts."""
    from polar_deploy import gpu

    later = plan.version_compatible and _runs_later(plan.version, version)
    if plan.version != version and not later:
        raise MachineError(f"{path} was built with {plan.library} {plan.version}, here is {version}", _AGAIN)
    here = gpu.first()
    capabilities = [numbers(each) for each in plan.capabilities]
    same = here.capability in capabilities and plan.gpu in (None, here.name)
    if not same and not (plan.hardware_compatible and here.capability >= _COMPATIBLE_SINCE):
        raise MachineError(
            f"{path} was built for {plan.gpu or 'GPUs'} (compute capability {', '.join(plan.capabilities)}), here is "
            f"{here.name} ({'.'.join(map(str, here.capability))})",
            _AGAIN,
        )


def _runs_later(built_with: str, version: str) -> bool:
    """Whether a version-compatible plan runs: with its own version and later ones of the same major version."""
    return numbers(built_with)[0] == numbers(version)[0] and numbers(built_with) <= numbers(version)
