"""What the long checks share: running the command, and writing figures with the conditions they were taken under."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy.engines import machine
from polar_deploy.workspace import read_json, write_json

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # data and trained networks, where a checkout has them beside itself
# What report.json has for the page alone, epoch by epoch and layer by layer
_LONG = {"recipe", "classes", "worst_samples", "network", "sites", "history"}
RESULTS = ROOT / "benchmarks" / "results"


def _commit() -> str:
    """The commit of the working tree, and whether files differ from it, other than results."""
    changes = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
    asked = (["git", "rev-parse", "HEAD"], changes)
    head, changed = (subprocess.run(a, cwd=ROOT, capture_output=True, text=True, check=False).stdout for a in asked)
    return head.strip() + (" with changes" if changed.strip() else "")


COMMIT = _commit()  # when the check starts, not when it ends


def run_pipeline(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the command in a process of its own; return exit code, seconds, report.json, and how exact surgery was."""
    command = [sys.executable, "-m", "polar_deploy.pipeline", "--out", str(folder), *arguments]
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    seconds = time.monotonic() - start
    report, parity = folder / "report.json", folder / "parity.json"
    return {
        "command": "python -m polar_deploy.pipeline " + " ".join(_without_paths(arguments)),
        "exit_code": code,
        "seconds": round(seconds, 1),
        "report": {key: each for key, each in read_json(report).items() if key not in _LONG}
        if report.is_file()
        else None,
        "surgery": read_json(parity)["surgery"] if parity.is_file() else None,
    }


def report_of(run: dict[str, Any]) -> dict[str, Any]:
    """The report.json of what `run_pipeline` gave; SystemExit where the run ended without one."""
    if run["report"] is None:
        raise SystemExit(f"the run ended with exit code {run['exit_code']} and without a report")
    report: dict[str, Any] = run["report"]
    return report


def resnet20_run(folder: Path, data: Path, epochs: int = 6) -> Path:
    """A run of the public ResNet-20 on CIFAR-10, which lies in `data`, as far as surgery: 6 minutes an epoch."""
    recipe, weights = ROOT / "benchmarks/cifar10-resnet20.yaml", SHARED / "models/resnet20.npz"
    options = ("--data-dir", str(data), "--full-weights", str(weights), "--until", "surgery", "--epochs", str(epochs))
    made = run_pipeline(folder, "--recipe", str(recipe), *options)
    if made["exit_code"] != 0:
        raise SystemExit(f"the run failed with exit code {made['exit_code']}")
    return folder


def cifar_network(name: str, *, trained: bool = False) -> nn.Module:
    """A ResNet for CIFAR-10, with its public weights or without any."""
    from polar_deploy import models
    from polar_deploy.tasks.classification import classifier

    network = models.build(name, classifier(10, 32)).eval()
    if trained:
        models.load_weights(network, SHARED / "models" / f"{name}.npz")
    return network


def write_cifar_network(name: str, path: Path, *, trained: bool = False) -> None:
    """Write one as ONNX, from `input` [N, 3, 32, 32] to `logits`."""
    import torch

    from polar_deploy import export

    example = export.Example.of(torch.zeros(2, 3, 32, 32))
    structure = export.structure(cifar_network(name, trained=trained), example)
    export.save(structure, path, inputs=("input",), outputs=("logits",))


def edge_environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """A fresh environment with what an edge team installs; its interpreter, and the packages in it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", f"{ROOT}[ort]"], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    return python, dict(line.split("==", 1) for line in listed.split() if "==" in line)


def verify_bundle(python: Path, bundle: Path, *options: str) -> dict[str, Any]:
    """`bundle verify` in an environment: its exit code, seconds, and what it said behind the bundle's name."""
    start = time.monotonic()
    done = bundle_command(python, "verify", bundle, *options)
    seconds = round(time.monotonic() - start, 2)
    return {"exit_code": done.returncode, "seconds": seconds, "said": done.stdout.splitlines()[2:]}


def bundle_command(python: Path, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The bundle's command, of the installed package: from a folder in which there is no other."""
    line = [str(python), "-m", "polar_deploy.bundle", command, *map(str, arguments)]
    return subprocess.run(line, cwd=python.parent, capture_output=True, text=True, check=False)


def write_result(name: str, bars: dict[str, bool], figures: dict[str, Any]) -> int:
    """Write `benchmarks/results/NAME.json`, say which bars are met; exit code 0 if all are."""
    packages = ("torch", "onnx", "onnxruntime", "openvino", "numpy")
    write_json(
        RESULTS / f"{name}.json",
        {
            "bars": bars,
            "machine": machine.describe().as_json(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "versions": {package: found for package in packages if (found := _version(package))},
            "commit": COMMIT,
            **figures,
        },
    )
    for bar, met in bars.items():
        print(f"{'met' if met else 'NOT MET'}: {bar}")
    return 0 if all(bars.values()) else 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _without_paths(arguments: tuple[str, ...]) -> list[str]:
    return [Path(argument).name if argument.startswith("/") else argument for argument in arguments]
