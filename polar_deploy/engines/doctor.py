"""What this machine can build and run, and what to install for the rest, on one page."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from polar_deploy import __version__, gpu, targets
from polar_deploy.backends import BACKENDS
from polar_deploy.backends.base import PRECISION_SINCE, installed_version
from polar_deploy.documents.doctor import Device, Examined, TargetHere, Timed
from polar_deploy.engines import machine

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--time", action="store_true", help="time a small network in each target that runs here, too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the page; exit code 0, whatever is missing. `--time` takes about a minute."""
    found = examine()
    if arguments.time:
        from polar_deploy.engines import quick

        runs = [each for name, each in targets.TARGETS.items() if not found.targets[name].missing]
        found = found.model_copy(update={"timed": quick.measure(runs)})
    if arguments.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        _print(found)
    return 0


def examine() -> Examined:
    """Look at CPU, GPUs, packages and targets. Nothing is imported that may abort without a GPU."""
    try:
        gpus, cuda, lack = gpu.every(), gpu.cuda_version(), None
    except gpu.NoGpuError as error:
        gpus, cuda, lack = [], None, str(error)
    return Examined(
        polar_deploy=__version__,
        python=platform.python_version(),
        machine=machine.describe(),
        int8_instructions=machine.int8_instructions(),
        gpus=[_gpu(each) for each in gpus],
        no_gpu=lack,
        cuda=cuda,
        packages={name: installed_version(name) for name in _distributions()},
        providers=_providers(),
        targets={name: _target(target) for name, target in targets.TARGETS.items()},
        auto=targets.choose().name,
    )


def _gpu(device: gpu.Gpu) -> Device:
    lacks = [name for name, since in PRECISION_SINCE.items() if device.capability < since]
    return Device(name=device.name, capability=".".join(map(str, device.capability)), lacks=lacks)


def _target(target: targets.Target) -> TargetHere:
    return TargetHere(
        build=targets.lacks_to_build(target),
        run=targets.lacks_to_run(target),
        proves_types=target.backend.proves_types,
        install=targets.install(target),
    )


def _distributions() -> list[str]:
    """What there is to tell a version of: whatever any backend takes, and what comes before and beside that."""
    needed = [package for backend in BACKENDS for package in (*backend.packages, *backend.build_packages)]
    names = [name for package in needed for name in package.distributions]
    return list(dict.fromkeys(["torch", "onnx", *names, "nvidia-ml-py"]))


def _providers() -> list[str]:
    """What ONNX Runtime was built with; whether CUDA starts shows when it is used."""
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _print(found: Examined) -> None:
    from rich.table import Table

    from polar_deploy.progress import console

    page = console(highlight=False, markup=False)
    for label, value in _facts(found):
        page.print(f"{label:<14}{value}", soft_wrap=True)
    table = Table(title="targets")
    for heading in ("target", "build", "run", "missing"):
        table.add_column(heading, overflow="fold")
    for name, target in found.targets.items():
        answers = ("no" if lacking else "yes" for lacking in (target.build, target.run))
        table.add_row(name, *answers, "\n".join(target.missing), style="" if target.missing else "green")
    page.print(table)
    if unproven := [name for name, target in found.targets.items() if not target.proves_types]:
        words = "which types their layers really run in is not proven (docs/targets.md)"
        page.print(f"types          {', '.join(unproven)}: {words}", soft_wrap=True)
    if found.timed is not None:
        _print_times(found.timed, page)
    for install in dict.fromkeys(each.install for each in found.targets.values() if _installable(each)):
        page.print(f"to install     {install}", soft_wrap=True)
    page.print(f"--target auto  means {found.auto} here")


def _print_times(timed: Mapping[str, Timed], page: Console) -> None:
    """The fastest first."""
    from rich.table import Table

    from polar_deploy.engines.quick import BATCHES

    table = Table(title="a small residual network, median milliseconds an inference")
    for heading in ("target", *(f"batch {batch}" for batch in BATCHES), "build"):
        table.add_column(heading, overflow="fold")
    ran = [(name, each, each.ms) for name, each in timed.items() if each.ms is not None]
    for name, each, ms in sorted(ran, key=lambda item: item[2][str(BATCHES[0])]):
        table.add_row(name, *(f"{ms[str(batch)]:.3g}" for batch in BATCHES), f"{each.build_seconds:.1f} s")
    page.print(table)
    for name, each in timed.items():
        if each.error is not None:
            page.print(f"not timed      {name}: {each.error}", soft_wrap=True)


def _installable(target: TargetHere) -> bool:
    return any("not installed" in lack for lack in target.missing)


def _facts(found: Examined) -> list[tuple[str, str]]:
    cpu, quick = found.machine, found.int8_instructions
    packages = [f"{name} {version}" for name, version in found.packages.items() if version]
    facts = [
        ("polar_deploy", f"{found.polar_deploy}, Python {found.python}"),
        ("CPU", f"{cpu.cpu}, {cpu.cores} cores, {cpu.architecture}"),
        (
            "INT8 on it",
            f"fast ({', '.join(quick)})"
            if quick
            else "gains little, with weights of 7 bits: it has no dot products of bytes (VNNI)",
        ),
    ]
    for device in found.gpus:
        lacks = f", no {', '.join(map(str.upper, device.lacks))}" if device.lacks else ""
        facts.append(("GPU", f"{device.name}, compute capability {device.capability}{lacks}"))
    facts.append(("driver", f"CUDA up to {found.cuda}") if found.cuda else ("GPU", f"none: {found.no_gpu}"))
    return [*facts, ("packages", ", ".join(packages)), ("providers", ", ".join(found.providers) or "none")]
