"""The command: `python -m polar_deploy.pipeline --model resnet56 --target trt-fp16`.

Stages in order: full, gates, export, surgery, build, parity, bundle, report. One run is one folder; a stage whose
settings and inputs did not change is skipped, a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import __version__
from polar_deploy.commands import add_debug, guarded
from polar_deploy.errors import UsageError
from polar_deploy.stages import NAMES, between

if TYPE_CHECKING:
    from polar_deploy.config import Settings
    from polar_deploy.stages.context import RunContext

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
    add("--from", metavar="STAGE", dest="first", choices=NAMES, default=NAMES[0], help=f"one of {', '.join(NAMES)}")
    add("--until", metavar="STAGE", dest="last", choices=NAMES, default=NAMES[-1], help="stop after this stage")
    add("--dry-run", action="store_true", help="print the plan: stages, gates, costs, what the target needs")
    add("--json", action="store_true", help="print the result as JSON on stdout")
    add("--quiet", action="store_true", help="show no progress, only the result and errors")
    add_debug(parser)
    add("--version", action="version", version=f"polar_deploy {__version__}")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    stages = between(arguments.first, arguments.last)
    if not stages:
        raise UsageError(
            f"--from {arguments.first} lies behind --until {arguments.last}", "swap them, or leave one out"
        )
    from polar_deploy.progress import Progress
    from polar_deploy.stages.context import RunContext
    from polar_deploy.stages.plan import plan
    from polar_deploy.stages.resolve import choose_target, default_folder, resolve
    from polar_deploy.stages.runner import require_machine, run_stages

    settings = choose_target(_settings(arguments))
    require_machine(settings, stages, builds=not arguments.dry_run)
    folder = arguments.out or default_folder(settings)
    quiet = arguments.quiet or arguments.dry_run
    run = RunContext(resolve(settings, folder), folder, Progress(quiet=quiet))
    if arguments.dry_run:
        _print_plan(plan(run, stages), as_json=arguments.json)
        return 0
    run_stages(run, stages)
    return _print_result(run, {stage.name for stage in stages}, arguments)


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


def _print_result(run: RunContext, names: set[str], arguments: argparse.Namespace) -> int:
    """Tell what came out; returns the exit code, which is the verdict's where there is one."""
    from polar_deploy import parity
    from polar_deploy.stages.artefacts import BUNDLE, PAGE, PARITY, REPORT
    from polar_deploy.workspace import read_json

    if "report" in names:
        _print_report(read_json(run.path(REPORT)), as_json=arguments.json)
        if not arguments.json:
            print(f"page: {run.path(PAGE)}")
        if "bundle" in names and not arguments.json:
            _print_bundle(run.path(BUNDLE))
    elif arguments.json:
        print(json.dumps({"folder": str(run.folder), "stages": [name for name in NAMES if name in names]}, indent=1))
    return parity.exit_code(read_json(run.path(PARITY))) if {"parity", "bundle"} & names else 0


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
