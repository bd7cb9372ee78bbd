"""The command: `python -m polar_deploy.pipeline --model resnet56 --target trt-fp16`.

Stages in order: full, gates, export, surgery, build, parity, bundle, report. One run is one folder; a stage whose
settings and inputs did not change is skipped, a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import __version__, targets
from polar_deploy.commands import add_debug, guarded
from polar_deploy.errors import ContentError, MachineError, PolarDeployError, UsageError

if TYPE_CHECKING:
    from polar_deploy.config import Budget, Settings
    from polar_deploy.stages import Run

# The names of `stages.STAGES`, which takes half a second to import: `--help` shall answer at once.
STAGES = ("full", "gates", "export", "surgery", "build", "parity", "bundle", "report")
_TRAINING = {"full", "gates", "export"}

# option -> the setting it stands for
_SETTINGS = {
    "model": "model",
    "target": "target",
    "data": "data",
    "data_dir": "data_dir",
    "full_weights": "full_weights",
    "align": "align",
    "device": "device",
    "epochs": "training.epochs",
    "full_epochs": "training.full_epochs",
    "seed": "seed",
    "max_drop": "verdict.max_drop",
    "accuracy_rule": "verdict.accuracy_rule",
    "min_speedup": "verdict.min_speedup",
    "verdict_batch": "verdict.batch",
    "latency_table": "latency_table",
    "with_full": "bundle.full",
    "golden": "bundle.golden",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (see the README)."""
    again = "interrupted; the same command goes on from here"
    return guarded(lambda: _run(_parser().parse_args(argv)), argv, interrupted=again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m polar_deploy.pipeline",
        description="Train a CNN once with polarized gates, cut it exactly, build an engine, prove it is as good.",
        epilog="exit codes: 0 passed, 1 parity failed, 2 command line, 3 this machine, 4 a file's content, "
        "5 undecided, 70 a defect",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", help="resnet20/32/44/56/110, a torchvision classifier, or package.module:function")
    add("--target", help="what the engine is for, such as trt-fp16; auto: the fastest one here (default: ort-fp32)")
    add("--data", help="digits, cifar10, cifar100, tiny-imagenet, imagenet, or package.module:function")
    add("--data-dir", metavar="DIR", help="where the data lies (default: data)")
    add("--recipe", metavar="FILE", help="settings in YAML, or the name of a recipe such as cifar10-resnet56")
    add("--full-weights", metavar="FILE", help="take the full network as given (.safetensors, .npz, .pth)")
    add(
        "--budget",
        metavar="B",
        help="share of the full cost to keep: 0.5, or macs=0.5,params=0.6 (default: latency=0.6 "
        "where the target can be measured here, else macs=0.5)",
    )
    add("--align", metavar="N", help="widths become multiples of this (default: the target's)")
    add(
        "--device",
        metavar="NAME",
        help="widths become such as this device likes, instead of multiples (`python -m polar_deploy.devices list`)",
    )
    add("--epochs", metavar="N", help="epochs of the gated run (default: the data set's)")
    add("--full-epochs", metavar="N", help="epochs of the full network (default: --epochs)")
    add("--seed", metavar="N", help="of split, start values, order and gates (default: 0)")
    add("--max-drop", metavar="POINTS", help="accuracy the compressed network may lose (default: 1.0)")
    add(
        "--accuracy-rule",
        choices=("interval", "point"),
        help="what has to be within --max-drop: the drop's whole 95 %% interval (default), or the drop as counted",
    )
    add("--min-speedup", metavar="X", help="how much faster it must be at least (default: 1.02)")
    add("--verdict-batch", metavar="N", help="batch size at which the speed-up is judged (default: 1)")
    add(
        "--max-latency-ms",
        metavar="[P=]MS",
        help="what an inference of the compressed network may take: 5 (the median), or p99=5 (default: any)",
    )
    add("--batch", metavar="N[,N,N]", help="smallest, usual and largest batch of the engines (default: 1,8,64)")
    add("--latency-table", metavar="FILE", help="for a latency budget; made by `python -m polar_deploy.engines table`")
    add(
        "--with-full",
        action=argparse.BooleanOptionalAction,
        help="whether the bundle has the full network too, for timing on the device (default: it has)",
    )
    add("--golden", choices=("data", "random"), help="the bundle's golden inputs (default: data, of the data set)")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="any setting, such as training.lr=0.05")
    add("--out", metavar="DIR", type=Path, help="the run's folder (default: runs/MODEL-DATA-TARGET-BUDGET-sSEED)")
    add("--from", metavar="STAGE", dest="first", choices=STAGES, default=STAGES[0], help=f"one of {', '.join(STAGES)}")
    add("--until", metavar="STAGE", dest="last", choices=STAGES, default=STAGES[-1], help="stop after this stage")
    add("--dry-run", action="store_true", help="print the plan: stages, gates, costs, what the target needs")
    add("--json", action="store_true", help="print the result as JSON on stdout")
    add("--quiet", action="store_true", help="show no progress, only the result and errors")
    add_debug(parser)
    add("--version", action="version", version=f"polar_deploy {__version__}")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    names = STAGES[STAGES.index(arguments.first) : STAGES.index(arguments.last) + 1]
    if not names:
        raise UsageError(
            f"--from {arguments.first} lies behind --until {arguments.last}", "swap them, or leave one out"
        )
    settings = _settings(arguments)
    if settings.target == "auto":
        settings = settings.model_copy(update={"target": targets.choose().name})
    target = targets.parse(settings.target)
    if settings.device is not None:
        from polar_deploy import devices

        devices.load(settings.device)  # before anything that takes long
    if "build" in names and not arguments.dry_run:
        targets.check(target)
    asked = settings.budget
    if "gates" in names and asked is not None and asked.latency is not None and settings.latency_table is None:
        _require_measurable(target)
    _require_packages(names)
    folder = arguments.out or default_folder(settings)
    settings = resolve(settings, target, folder)
    if arguments.dry_run:
        from polar_deploy.progress import Progress
        from polar_deploy.stages import Run

        run = Run(settings, folder, Progress(quiet=True))
        _print_plan(dry_run(run, names), as_json=arguments.json)
        return 0
    return _execute(settings, folder, names, arguments)


def _require_measurable(target: targets.Target) -> None:
    """A latency budget without a table: the target has to be here, so that one can be made."""
    if lacks := targets.lacks_to_build(target) + targets.lacks_to_run(target):
        raise UsageError(
            f"budget latency= needs a latency table, and {target.name} cannot be measured here: "
            f"{'; '.join(dict.fromkeys(lacks))}",
            "make one where it runs, with `python -m polar_deploy.engines table GATED.onnx` on the gated/model.onnx of "
            "any run of this model, and give it with --latency-table",
        )


def _settings(arguments: argparse.Namespace) -> Settings:
    from polar_deploy import recipes

    overrides: dict[str, object] = {}
    options: dict[str, str] = {}
    for option, key in _SETTINGS.items():
        value = getattr(arguments, option)
        if value is not None:
            overrides[key], options[key] = value, f"--{option.replace('_', '-')}"
    if arguments.budget is not None:
        overrides["budget"], options["budget"] = recipes.parse_budget(arguments.budget), "--budget"
    if arguments.max_latency_ms is not None:
        for key, value in recipes.parse_latency(arguments.max_latency_ms).items():
            overrides[key], options[key] = value, "--max-latency-ms"
    if arguments.batch is not None:
        overrides["build.batches"], options["build.batches"] = recipes.parse_batches(arguments.batch), "--batch"
    overrides |= dict(recipes.parse_set(text) for text in arguments.set)
    if arguments.recipe is None and "model" not in overrides:
        raise UsageError("no model: neither --model nor --recipe is given", "name one, such as --model resnet56")
    recipe = None if arguments.recipe is None else recipes.find(arguments.recipe)
    return recipes.load(recipe, overrides, options)


def _require_packages(names: Sequence[str]) -> None:
    """Ask for what the stages import before anything is written."""
    needs = [("torch", "train"), ("torchvision", "train"), ("safetensors", "train")] if _TRAINING & {*names} else []
    needs += [("onnxscript", "train")] if "export" in names else []
    needs += [("onnxruntime", "ort")] if {*STAGES[2:-1]} & {*names} else []
    for module, extra in needs:
        if find_spec(module) is None:
            raise MachineError(f"{module} is not installed", f"install it: pip install 'polar-deploy[{extra}]'")


def resolve(settings: Settings, target: targets.Target, folder: Path) -> Settings:
    """Settings with every default that depends on the data set, the target, or an earlier part of the run filled in.

    Args:
        settings: as given.
        folder: the run's, which need not be there.
    """
    from polar_deploy import data
    from polar_deploy.config import Normalize

    spec, training = data.spec(settings.data, settings.data_dir), settings.training
    epochs = training.epochs or spec.epochs
    filled = {
        "epochs": epochs,
        "full_epochs": training.full_epochs or epochs,
        "gated_lr": training.gated_lr or (training.lr / 2 if training.start == "full" else training.lr),
        "flip": spec.flip if training.flip is None else training.flip,
        "crop_padding": spec.crop_padding if training.crop_padding is None else training.crop_padding,
    }
    return settings.model_copy(
        update={
            "input_size": settings.input_size or spec.input_size,
            "normalize": settings.normalize or Normalize(mean=spec.mean, std=spec.std),
            "budget": settings.budget or _default_budget(settings, target, folder),
            "align": _alignment(settings, target),
            "training": training.model_copy(update=filled),
            "gates": settings.gates.model_copy(update=_closing(settings)),
        }
    )


def _closing(settings: Settings) -> dict[str, float]:
    """When gates begin to close, and when they are fixed, as shares of the gated run."""
    start, freeze = settings.gates.start, settings.gates.freeze
    if start is None:
        start = 0.05 if settings.training.start == "full" else 0.3
        start = start if freeze is None else min(start, freeze / 2)
    return {"start": start, "freeze": min(1.0, start + 0.25) if freeze is None else freeze}


def _alignment(settings: Settings, target: targets.Target) -> int:
    """What widths are multiples of: of anything, where a device says which they are."""
    if settings.device is None:
        return settings.align or target.align
    if settings.align not in (None, 1):
        raise UsageError(
            f"both a device ({settings.device}) and an alignment ({settings.align}) say which widths to take",
            "leave --align out, or --device",
        )
    return 1


def _default_budget(settings: Settings, target: targets.Target, folder: Path) -> Budget:
    """Latency, which is what users feel, where it can be measured; else MACs.

    Of a run that has gates already, theirs: it may have been trained on another machine.
    """
    from pydantic import ValidationError

    from polar_deploy.config import Budget
    from polar_deploy.workspace import read_json

    gates = folder / "gated" / "gates.json"
    try:
        return Budget.model_validate(read_json(gates)["budget"])
    except (UsageError, ContentError, ValidationError, KeyError, TypeError):  # none, or none that could be used
        measurable = not targets.lacks_to_build(target) + targets.lacks_to_run(target)
        return Budget(latency=0.6) if measurable or settings.latency_table is not None else Budget(macs=0.5)


def default_folder(settings: Settings) -> Path:
    """runs/MODEL-DATA-TARGET-BUDGET-sSEED: no time stamp, so that the same command resumes."""
    budget = "_".join(f"{name}{share:g}" for name, share in settings.budget.asked().items()) if settings.budget else ""
    model, data = (name.replace(":", ".") for name in (settings.model, settings.data))
    parts = (model, data, settings.target, budget, f"s{settings.seed}")
    return Path("runs") / "-".join(filter(None, parts))


def dry_run(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """The resolved plan: stages, gates found, cost of the full network, smallest reachable cost, the target's needs.

    Raises:
        UsageError: the model has no place for a gate, or the budget is below the smallest reachable cost.
        ContentError: the network cannot be exported, or what surgery makes of it is not what is promised.
    """
    from polar_deploy.gating.choice import smallest

    settings, choices = run.settings, run.analysis.choices
    limits = run.require_reachable()
    least = smallest(choices, limits, choices.costs)
    return {
        "settings": settings.model_dump(mode="json"),
        "folder": str(run.folder),
        "stages": list(names),
        "gates": {
            "channel_sites": len(choices.sites),
            "channels": sum(site.width * site.size for site in choices.sites),
            "streams": sum(site.kind == "stream" for site in choices.sites),
            "blocks": len(choices.blocks),
            "ungated": {**choices.reasons, **run.analysis.unmasked},
        },
        "full": {name: round(cost.full) for name, cost in choices.costs.items()},
        "smallest": {name: cost.share(least) for name, cost in choices.costs.items()},
        "target": {"name": settings.target, "align": settings.align, **_missing(settings.target)},
        "device": run.device.described() if run.device else None,
    }


def _missing(name: str) -> dict[str, str | None]:
    """What this machine lacks to build for the target, and to run what it built; None: nothing."""
    target = targets.parse(name)
    try:
        targets.check(target)
    except MachineError as error:
        return {"missing": str(error), "not_run": None}
    return {"missing": None, "not_run": "; ".join(targets.lacks_to_run(target)) or None}


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan, indent=1))
        return
    from polar_deploy import recipes
    from polar_deploy.config import Settings

    gates, full, least = plan["gates"], plan["full"], plan["smallest"]
    print(recipes.dump(Settings.model_validate(plan["settings"])), end="")
    print(f"---\nfolder    {plan['folder']}\nstages    {' → '.join(plan['stages'])}")
    print(
        f"gates     {gates['channels']} channels at {gates['channel_sites']} sites ({gates['streams']} streams), "
        f"{gates['blocks']} blocks; {len(gates['ungated'])} layers without"
    )
    print(f"full      {full['macs'] / 1e6:.2f} M MACs, {full['params'] / 1e6:.3f} M parameters")
    print(f"smallest  macs={least['macs']:.3f}, params={least['params']:.3f} of the full network")
    if device := plan["device"]:
        widths = ", ".join(map(str, device["widths"]))
        print(f"device    {device['name']}, {device['precision']} ({device['source']}): {widths} channels, and so on")
    name, missing, not_run = (plan["target"][key] for key in ("name", "missing", "not_run"))
    can = f"{name}: can be built here, not run ({not_run})" if not_run else f"{name}: can be built and run here"
    print(f"target    {missing or can}")


def _execute(settings: Settings, folder: Path, names: Sequence[str], arguments: argparse.Namespace) -> int:
    from polar_deploy import parity, recipes
    from polar_deploy.progress import Progress
    from polar_deploy.stages import Run, stage_named
    from polar_deploy.workspace import atomic_path, read_json

    progress = Progress(quiet=arguments.quiet)
    training = settings.training
    epochs = {"full": training.full_epochs if settings.full_weights is None else None, "gates": training.epochs}
    progress.plan({name: count for name, count in epochs.items() if name in names and count})
    run = Run(settings, folder, progress)
    _preflight(run, names)
    with run.workspace.locked(), progress:
        with atomic_path(run.path("run.yaml")) as temporary:
            temporary.write_text(recipes.dump(settings), encoding="utf-8")
        if "gates" in names and "latency" in run.budget and not run.is_current("gates"):
            run.require_reachable(measured=True)  # before an epoch is trained
        for name in names:
            _run_stage(run, stage_named(name))
    if "report" in names:
        _print_report(read_json(run.path("report.json")), as_json=arguments.json)
        if not arguments.json:
            print(f"page: {run.path('report.html')}")
        if "bundle" in names and not arguments.json:
            _print_bundle(run.path("bundle"))
    elif arguments.json:
        print(json.dumps({"folder": str(run.folder), "stages": list(names)}, indent=1))
    return parity.exit_code(read_json(run.path("parity.json"))) if {"parity", "bundle"} & {*names} else 0


def _preflight(run: Run, names: Sequence[str]) -> None:
    """Look at model, budget, weights and data before a folder is made or an epoch trained."""
    from polar_deploy.stages import stage_named

    stage_named(names[0]).inputs(run)
    if _TRAINING & {*names}:
        run.network()  # before data is downloaded for a model that there is not
    if {*_TRAINING, "parity", "bundle"} & {*names}:
        _ = run.dataset
    if "full" in names and run.settings.full_weights is not None:
        from polar_deploy import models

        models.load_weights(run.network(), run.settings.full_weights)
    if "gates" in names and not run.is_current("gates"):
        run.require_reachable()  # last: it takes an export


def _run_stage(run: Run, stage: Any) -> None:
    _make(run, stage)
    for name in stage.scratch:  # of an earlier run, too, that was killed when its stage was finished
        run.path(name).unlink(missing_ok=True)


def _make(run: Run, stage: Any) -> None:
    """Run a stage unless all that it wrote is up to date."""
    state = stage.name, stage.key(run), stage.inputs(run), stage.outputs(run)
    if run.workspace.is_current(*state):
        run.progress.up_to_date(stage.name)
        return
    run.progress.stage(stage.name)
    run.workspace.forget(stage.name)
    try:
        stage.run(run)
    except (PolarDeployError, MemoryError):
        raise
    except Exception as error:  # the user's own network and data run in here
        if "out of memory" in str(error):
            raise MachineError(f"stage {stage.name}: {error}", "use a smaller training.batch_size") from error
        raise ContentError(
            f"stage {stage.name} failed: {type(error).__name__}: {error}",
            "see where with --debug; the same command goes on from here",
        ) from error
    if stage.settled(run):
        run.workspace.stamp(*state[:-1], stage.outputs(run))


def _print_report(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=1))
        return
    from polar_deploy.progress import console
    from polar_deploy.report import table

    table(report, console())


def _print_bundle(folder: Path) -> None:
    """Say where the bundle is and how the edge team verifies it; its hash is to reach them by another way."""
    from polar_deploy.workspace import sha256

    manifest = folder / "manifest.json"
    if manifest.is_file():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        print(f"bundle: {folder} ({size:.2f} MB). On the device:")
        print(f"  python -m polar_deploy.bundle verify {folder.name} --manifest-sha256 {sha256(manifest)}")


if __name__ == "__main__":
    sys.exit(main())
