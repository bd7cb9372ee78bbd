"""What of a bundle runs on this device: its artefacts, if they fit and are trusted, or engines that are built here.

A plan is code: loading one gives whoever made it this machine. The hashes in a manifest only say that plan and
manifest belong together, so it takes a word from outside: the manifest's own sha256, got by another way, or the
owner's `--trust-plan`. ONNX files and the timing cache are data; engines are rebuilt from them without that word.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from polar_deploy.backends import PLAN
from polar_deploy.documents.build import Built, BuiltEngine, Plan, Types
from polar_deploy.errors import ContentError, MachineError, UsageError

if TYPE_CHECKING:
    from polar_deploy.bundle import manifest
    from polar_deploy.bundle.manifest import Network
    from polar_deploy.bundle.read import Bundle
    from polar_deploy.engines import Engine
    from polar_deploy.targets import Target


@dataclass(frozen=True)
class Options:
    """How to come by engines.

    Attributes:
        trusted: plans may be loaded.
        rebuild: engines may be built where no plan can be loaded.
        engine_cache: the folder for rebuilt engines; None: they are not kept.
    """

    trusted: bool = False
    rebuild: bool = False
    engine_cache: Path | None = None


@dataclass(frozen=True)
class AvailableEngines:
    """The engines of a bundle on this device.

    Attributes:
        engines: "compressed", and "full" where the bundle has it; {} if none runs here.
        origin: where they come from, or why there are none, a sentence without its full stop.
    """

    engines: dict[str, Engine]
    origin: str


def add_trust_arguments(parser: argparse.ArgumentParser) -> None:
    """The options by which a user says that a plan may be loaded."""
    parser.add_argument("--trust-plan", action="store_true", help="load the plan: I trust whoever made this bundle")
    parser.add_argument("--manifest-sha256", metavar="HEX", help="as the maker told you; a match makes plans trusted")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """`add_trust_arguments`, and those that say what to do where no plan can be loaded."""
    add_trust_arguments(parser)
    parser.add_argument("--rebuild", action="store_true", help="build from the ONNX files where no plan can be loaded")
    parser.add_argument("--engines", metavar="DIR", type=Path, help="keep rebuilt engines there, and find them again")


def trusted(arguments: argparse.Namespace, bundle: Bundle) -> bool:
    """Whether the plans may be loaded.

    Raises:
        ContentError: the manifest's hash is not the one that was given.
    """
    from polar_deploy.bundle.refusal import refused

    told = arguments.manifest_sha256
    if told is not None and told.strip().lower() != bundle.sha256:
        raise refused(bundle.path("manifest.json"), f"has the sha256 {bundle.sha256}, not the {told} that was given")
    return bool(arguments.trust_plan or told is not None)


def read_options(arguments: argparse.Namespace, bundle: Bundle) -> Options:
    """What the user gave to `add_engine_arguments`.

    Raises:
        As `trusted`. UsageError: engines would be kept inside of the bundle.
    """
    from polar_deploy.bundle.refusal import require_outside

    if arguments.engines is not None:
        require_outside(arguments.engines, arguments.bundle)
    return Options(trusted(arguments, bundle), arguments.rebuild, arguments.engines)


@contextmanager
def open_engines(bundle: Bundle, options: Options) -> Iterator[AvailableEngines]:
    """Load or build the bundle's engines.

    Raises:
        ContentError: a plan or graph is damaged, or what is built is not of the bundle's precision.
    """
    from polar_deploy import targets

    target = targets.parse(bundle.manifest.target)
    if lacks := targets.lacks_to_run(target):
        words = "; ".join(lacks)
        is_plan = target.backend.artefact is PLAN
        how = f"plan not loadable here: {words}, rebuild needed on the device" if is_plan else f"not run here: {words}"
        yield AvailableEngines({}, how)
        return
    networks = bundle.manifest.each()
    why_not = plan_rejection(bundle, target, trusted=options.trusted)
    if why_not is None:
        yield AvailableEngines(
            {name: _delivered(bundle, each, target) for name, each in networks.items()}, "as delivered"
        )
        return
    if options.engine_cache is not None and (options.engine_cache / "build.json").is_file():
        plans = [cached_engine(options.engine_cache, name, bundle).plan_file for name in networks]
        unfit = _unfit(plans, options.engine_cache, target)
        if unfit is None:
            yield _loaded(
                options.engine_cache, bundle, target, f"built here before, in {options.engine_cache} ({why_not})"
            )
            return
        why_not = f"{why_not}; those in {options.engine_cache} no longer fit: {unfit}"
    if not options.rebuild:
        yield AvailableEngines({}, f"{why_not}; --rebuild builds engines here from the ONNX files")
    elif lacks := targets.lacks_to_build(target):
        yield AvailableEngines({}, f"{why_not}; not rebuilt: {'; '.join(lacks)}")
    else:
        with _folder(options.engine_cache) as folder:
            _rebuild(bundle, target, folder)
            yield _loaded(folder, bundle, target, f"rebuilt here ({why_not})")


def plan_rejection(bundle: Bundle, target: Target, *, trusted: bool) -> str | None:
    """Why the plans must not or cannot be loaded on this machine, which runs the target; None: nothing against it."""
    plans = [as_built(network.plan) for network in bundle.manifest.each().values() if network.plan]
    if unfit := _unfit(plans, bundle.folder, target):
        return f"the plan does not fit: {unfit}"
    if target.backend.artefact.is_code and not trusted:
        return "the plan is not trusted (a plan is code): give --manifest-sha256 as its maker tells it, or --trust-plan"
    return None


def _unfit(plans: Iterable[Plan | None], folder: Path, target: Target) -> str | None:
    """Why one of the plans in a folder, of which these are the descriptions, does not run here; None: all do."""
    from polar_deploy import engines

    try:
        for plan in filter(None, plans):
            engines.require_fit(folder / plan.file, target, plan)
    except MachineError as error:
        return error.what
    return None


def _delivered(bundle: Bundle, network: Network, target: Target) -> Engine:
    from polar_deploy import engines

    path = bundle.path(network.plan.file if network.plan else network.typed)
    plan = as_built(network.plan) if network.plan else None
    return engines.open_artefact(path, target, plan, tf32=network.tf32)


def as_built(plan: manifest.Plan) -> Plan:
    """A plan of a manifest, as build.json described it."""
    return Plan.model_validate(plan.model_dump())


def _loaded(folder: Path, bundle: Bundle, target: Target, how: str) -> AvailableEngines:
    from polar_deploy import engines

    return AvailableEngines({name: engines.load(folder, name, target) for name in bundle.manifest.each()}, how)


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with TemporaryDirectory(prefix="polar_deploy-") as name:
        yield Path(name)


def _rebuild(bundle: Bundle, target: Target, folder: Path) -> None:
    """Build from the typed graphs, with the timing cache, so that the same kernels are chosen where that can be."""
    from polar_deploy import engines
    from polar_deploy.workspace import atomic_path

    networks = bundle.manifest.each()
    cache = next((each.plan.timing_cache for each in networks.values() if each.plan and each.plan.timing_cache), None)
    ours = {f"{name}.{end}" for name in networks for end in ("onnx", "onnx.data", "plan", "layers.json")}
    ours |= {"timing.cache", "build.json"}
    if folder.exists() and (foreign := sorted(path.name for path in folder.iterdir() if path.name not in ours)):
        raise UsageError(f"{folder} has {foreign[0]!r}, which is no engine", "give a new folder with --engines")
    if cache is not None:
        with atomic_path(folder / "timing.cache") as temporary:
            shutil.copyfile(bundle.path(cache), temporary)
    sources = {name: (bundle.path(each.typed), bundle.path(each.fp32)) for name, each in networks.items()}
    written = {name: each.precision.model_dump(exclude={"asked", "found"}) for name, each in networks.items()}
    types = {name: Types.model_validate(each) for name, each in written.items()}
    here = bundle.manifest.build.settings().model_copy(
        update={"capabilities": ()}
    )  # for this GPU, whatever they were built for
    built = engines.rebuild(sources, folder, target, here, types)
    built.model_copy(update={"bundle": bundle.sha256}).write(folder / "build.json")


def cached_engine(folder: Path, name: str, bundle: Bundle) -> BuiltEngine:
    """The entry in build.json of an engine that was built into `folder` from this very bundle.

    Raises:
        UsageError: there is no build.json, or it is another bundle's. ContentError: it does not list the engine.
    """
    path, again = folder / "build.json", "run `verify --rebuild --engines DIR` with a new folder"
    try:
        built = Built.read(path)
    except ContentError as error:
        raise ContentError(f"{path} does not list engines of a bundle: {error.what}", again) from error
    entry = built.engines.get(name)
    if built.bundle is None or entry is None or entry.plan_file is None or f"{name}.plan" not in entry.files:
        raise ContentError(f"{path} does not list engines of a bundle", again)
    if built.bundle != bundle.sha256:
        raise UsageError(f"{folder} has engines of another bundle", again)
    return entry
