"""Train a CNN once with gates on its channels and blocks, cut it exactly, build an engine, prove it is as good.

Stages in order: full, gates, export, surgery, build, parity, bundle, report. One run is one folder; a stage whose
settings and inputs did not change is skipped, a killed run goes on where it was.

Exit codes: 0 passed, 1 parity failed, 2 command line, 3 this machine, 4 a file's content, 5 undecided, 70 a defect.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import __version__, cli, recipes
from polar_deploy.errors import UsageError, printable
from polar_deploy.settings import Setting, every
from polar_deploy.stages import NAMES, between
from polar_deploy.stages.artefacts import SETTINGS
from polar_deploy.tracking import LIBRARIES, require

if TYPE_CHECKING:
    from polar_deploy.config import Settings
    from polar_deploy.documents.report import Report
    from polar_deploy.stages.context import RunContext
    from polar_deploy.stages.distributed import Team

_NAMES = 10  # of classes in a plan
_REASONS = 8  # why layers have no gates: so many lines of it in a plan
_READ: dict[str, Callable[[str], dict[str, object]]] = {  # options whose text says more than one value
    "budget": lambda text: {"budget": recipes.parse_budget(text)},
    "build.batches": lambda text: {"build.batches": recipes.parse_batches(text)},
    "accept.max_latency_ms": recipes.parse_latency,
}
main = cli.alone("run", "polar_deploy.pipeline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `polar-deploy run`: those of settings stand with the settings, in config.py."""
    settings = parser.add_argument_group("settings", "`polar-deploy settings` lists all of them")
    for setting in every():
        if setting.about.option:
            _add_option(settings, setting)
    add = settings.add_argument
    add("--recipe", metavar="FILE", help="settings in YAML, or the name of a recipe such as cifar10-resnet56")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="any setting, such as training.lr=0.05")
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, help="the run's folder (default: runs/MODEL-DATA-TARGET-BUDGET-sSEED)")
    add("--from", metavar="STAGE", dest="first", choices=NAMES, default=NAMES[0], help=f"one of {', '.join(NAMES)}")
    add("--until", metavar="STAGE", dest="last", choices=NAMES, default=NAMES[-1], help="stop after this stage")
    add(
        "--track",
        metavar="SERVICE",
        action="append",
        default=[],
        choices=tuple(LIBRARIES),
        help=f"tell {' or '.join(LIBRARIES)} of each epoch and the result; can be given twice",
    )
    add("--dry-run", action="store_true", help="print the plan: stages, gates, costs, what the target needs")
    add("--json", action="store_true", help="print the result as JSON on stdout")
    add("--quiet", action="store_true", help="show no progress, only the result and errors")
    add("--version", action="version", version=f"polar_deploy {__version__}")


def _add_option(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """One option of a setting; its value is left as text for `recipes`, which says what is wrong with it."""
    flag, _, metavar = setting.about.option.partition(" ")
    default = "" if setting.required else f" (default: {_written(setting)})"
    text = f"{setting.about.meaning}{default}".replace("%", "%%")
    if setting.kind is bool:
        group.add_argument(flag, dest=setting.key, action=argparse.BooleanOptionalAction, help=text)
    elif setting.choices:
        group.add_argument(flag, dest=setting.key, choices=setting.choices, help=text)
    else:
        group.add_argument(flag, dest=setting.key, metavar=metavar, help=text)


def _written(setting: Setting) -> str:
    """A default as it is written on the command line."""
    value = setting.default
    if value is None:
        return setting.about.unset
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def run(arguments: argparse.Namespace) -> int:
    """Run the stages that are asked for, or print the plan; the exit code is the verdict's."""
    from polar_deploy.stages import distributed

    if distributed.rank():
        return distributed.follow()
    with distributed.Team() as team:
        team.code = _lead(arguments, team)
        return team.code


def _lead(arguments: argparse.Namespace, team: Team) -> int:
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
    from polar_deploy.workspace import Workspace

    settings = choose_target(_settings(arguments))
    require(arguments.track)
    require_machine(settings, stages, builds=not arguments.dry_run)
    folder = arguments.out or default_folder(settings)
    progress = Progress(quiet=arguments.quiet or arguments.dry_run)

    def context() -> RunContext:
        return RunContext(
            resolve(settings, folder),
            folder,
            progress,
            default_budget=settings.budget is None,
            team=team,
            track=arguments.track,
        )

    if arguments.dry_run:
        _print_plan(plan(context(), stages), as_json=arguments.json)
        return 0
    progress.note(f"run in {folder}")
    with Workspace(folder).locked():  # first: what comes next takes a minute on a slow machine
        run = context()
        run_stages(run, stages)
    return _print_result(run, {stage.name for stage in stages}, arguments)


def _settings(arguments: argparse.Namespace) -> Settings:
    """The settings of a command line, laid over its recipe."""
    overrides: dict[str, object] = {}
    options: dict[str, str] = {}
    for setting in every():
        value = vars(arguments).get(setting.key)
        if value is not None:
            read = _READ.get(setting.key, lambda text, key=setting.key: {key: text})
            given = read(value)
            overrides |= given
            options |= dict.fromkeys(given, setting.about.option.partition(" ")[0])
    overrides |= dict(recipes.parse_set(text) for text in arguments.set)
    if arguments.recipe is None and "model" not in overrides:
        written = None if arguments.out is None else arguments.out / SETTINGS
        known = written is not None and written.is_file()
        todo = (
            f"give --recipe {written}, the settings of that folder" if known else "name one, such as --model resnet56"
        )
        raise UsageError("no model: neither --model nor --recipe is given", todo)
    recipe = None if arguments.recipe is None else recipes.find(arguments.recipe)
    return recipes.load(recipe, overrides, options)


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan, indent=1))
        return
    from polar_deploy.config import Settings
    from polar_deploy.costs import rounded_up
    from polar_deploy.report.formats import short

    gates, full, least = plan["gates"], plan["full"], plan["smallest"]
    print(recipes.dump(Settings.model_validate(plan["settings"])), end="")
    print(f"---\nfolder    {plan['folder']}\nstages    {' → '.join(plan['stages'])}")
    if data := plan["data"]:
        held = ", ".join(f"{count} of {part}" for part, count in data["pictures"].items())
        print(printable(f"data      {len(data['classes'])} classes ({_few(data['classes'])}); pictures: {held}"))
    print(
        f"gates     {gates['channels']} channels at {gates['channel_sites']} sites ({gates['streams']} streams), "
        f"{gates['blocks']} blocks; {_layers(len(gates['ungated']))} without"
    )
    _print_ungated(gates["ungated"])
    print(f"full      {short(full['macs'])} MACs, {short(full['params'])} parameters")
    smallest = ", ".join(f"{name}={rounded_up(share):.3f}" for name, share in least.items())
    print(f"smallest  {smallest} of the full network")
    if device := plan["device"]:
        widths = ", ".join(map(str, device["widths"]))
        print(f"device    {device['name']}, {device['precision']} ({device['source']}): {widths} channels, and so on")
    name, missing, not_run = (plan["target"][key] for key in ("name", "missing", "not_run"))
    can = f"{name}: can be built here, not run ({not_run})" if not_run else f"{name}: can be built and run here"
    print(f"target    {missing or can}")


def _print_ungated(reasons: Mapping[str, str]) -> None:
    """Why layers have no gates: a line for each reason, with the first layer that it holds for."""
    layers: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        layers.setdefault(reason, []).append(layer)
    lines = [
        f"no gate   {names[0]}{f' and {_layers(len(names) - 1)} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in layers.items()
    ]
    for line in lines[:_REASONS]:
        print(printable(line))
    if rest := lines[_REASONS:]:
        print(f"no gate   for {len(rest)} other reasons: see --json")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES]) + (", …" if len(names) > _NAMES else "")


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _print_result(run: RunContext, names: set[str], arguments: argparse.Namespace) -> int:
    """Tell what came out; returns the exit code, which is the verdict's where there is one."""
    from polar_deploy.documents.parity import Parity
    from polar_deploy.documents.report import Report
    from polar_deploy.stages.artefacts import BUNDLE, PAGE, PARITY, REPORT

    if "report" in names:
        _print_report(Report.read(run.path(REPORT)), as_json=arguments.json)
        if not arguments.json:
            print(f"page: {run.path(PAGE)}")
        if "bundle" in names and not arguments.json:
            _print_bundle(run.path(BUNDLE))
    elif arguments.json:
        print(json.dumps({"folder": str(run.folder), "stages": [name for name in NAMES if name in names]}, indent=1))
    return Parity.read(run.path(PARITY)).verdict.exit_code if {"parity", "bundle"} & names else 0


def _print_report(report: Report, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.as_json(), indent=1))
        return
    from polar_deploy.progress import console
    from polar_deploy.report import table

    table(report, console(least=80))


def _print_bundle(folder: Path) -> None:
    """Say where the bundle is and how the edge team verifies it; its hash is to reach them by another way."""
    from polar_deploy.workspace import sha256

    manifest = folder / "manifest.json"
    if manifest.is_file():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        print(f"bundle: {folder} ({size:.2f} MB). On the device:")
        print(f"  polar-deploy bundle verify {folder.name} --manifest-sha256 {sha256(manifest)}")


if __name__ == "__main__":
    sys.exit(main())
