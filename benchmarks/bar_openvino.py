"""OpenVINO on this CPU: the public ResNet-20 and its compressed network in FP32, BF16 and INT8, and their bundles.

    python -m benchmarks.bar_openvino [--run FOLDER | --epochs N] [--no-timing]

`--run` takes a run of bar_cifar10_resnet20.py, finished as far as surgery; without it one is made, of two epochs: what
is asked here is what runtime and precision cost, and no bar is on what the cut costs. Each precision is built, judged
and bundled from a copy of it; its bundle is then verified as on a device, by a process that has nothing else.
`--no-timing` leaves out the bars on time: the rest holds on a busy machine, too.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, SHARED, resnet20_run, run_pipeline, write_result
from polar_deploy import targets
from polar_deploy.workspace import read_json, sha256
from tests.support.shared import cifar_folder

FULL_TOP1 = (91.73, 0.05)  # what the weights' author reports, and the tolerance
MOST_LOST = {"fp32": 0.02, "bf16": 0.3, "int8": 0.5}  # points, of either network, against its own FP32 graph
FASTER = 1.02  # the compressed network against the full one, at least, batch 1: what the command asks by default
NARROW_FASTER = 2  # the full network in BF16 and INT8 against FP32, at least, batch 1; timed in processes of their own
COMPUTING = ("Convolution", "FullyConnected", "MatMul")


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run of bar_cifar10_resnet20.py")
    parser.add_argument("--epochs", type=int, default=2, help="of the run that is made (default: 2)")
    parser.add_argument("--no-timing", action="store_true", help="leave out the bars on time")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        print("skipped: no data and weights in ../shared")
        return 0
    figures, left_out = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = cifar_folder(folder, "cifar10")
        run = arguments.run or resnet20_run(folder / "run", data, arguments.epochs)
        epochs = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))["training"]["epochs"]
        for precision in MOST_LOST:
            if lacks := targets.lacks_to_build(targets.parse(f"ov-{precision}")):
                left_out[precision] = "; ".join(lacks)
                print(f"ov-{precision} is left out: {left_out[precision]}")
                continue
            figures[precision] = measure(run, folder / precision, precision, data)
            print(f"ov-{precision}: {figures[precision]}", flush=True)
    bars = {name: met for precision, found in figures.items() for name, met in judged(precision, found).items()}
    if not arguments.no_timing:
        bars |= timed(figures)
    told = {"epochs": epochs, "timed": not arguments.no_timing, "left_out": left_out, "ov": figures}
    return write_result("openvino", bars, told)


def measure(run: Path, folder: Path, precision: str, data: Path) -> dict[str, Any]:
    """Build, judge, bundle and verify in one precision, from a copy of a run."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("engines", "bundle", "parity.json", "report.*"))
    recipe = ("--recipe", str(run / "run.yaml"), "--data-dir", str(data))
    weights = ("--full-weights", str(SHARED / "models" / "resnet20.npz"))
    options = ("--target", f"ov-{precision}", "--from", "build", "--max-drop", "100", "--min-speedup", "0.01")
    options += ("--batch", "1,1,1")  # what the bars on time are about
    found = run_pipeline(folder, *recipe, *weights, *options)
    if not (folder / "bundle/manifest.json").is_file():
        raise SystemExit(f"the run for ov-{precision} ended with exit code {found['exit_code']} and no bundle")
    parity, built = read_json(folder / "parity.json"), read_json(folder / "engines/build.json")["engines"]
    return {
        "exit_code": found["exit_code"],
        "accuracy": {key: parity["accuracy"][key] for key in ("samples", "full", "compressed")},
        "lost": {name: parity["precision"][name] for name in ("full", "compressed")},
        "types": {name: computing_types(folder / f"engines/{name}.layers.json") for name in ("full", "compressed")},
        "kept": {name: entry["precision"]["high_precision_layers"] for name, entry in built.items()},
        "macs": found["report"]["macs"]["ratio"],
        "latency": [
            {key: each["rounds"][each["chosen"]][key] for key in ("full", "compressed", "speedup", "control")}
            | {"batch": each["batch"], "decided": each["decided"]}
            for each in parity["latency"]
        ],
        "verified": verified(folder / "bundle"),
    }


def computing_types(path: Path) -> dict[str, int]:
    """How many layers with weights run in each type, as OpenVINO's own graph says."""
    layers = [layer["type"] for layer in read_json(path)["layers"] if layer["op"] in COMPUTING]
    return {kind: layers.count(kind) for kind in sorted(set(layers))}


def verified(bundle: Path) -> int:
    """Exit code of `bundle verify`, golden samples only."""
    told = ("--manifest-sha256", sha256(bundle / "manifest.json"), "--no-timing")
    command = [sys.executable, "-m", "polar_deploy.bundle", "verify", str(bundle), *told]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode


def judged(precision: str, found: dict[str, Any]) -> dict[str, bool]:
    """The bars that no busy machine disturbs."""
    most, lost = MOST_LOST[precision], {name: each["drop"] for name, each in found["lost"].items()}
    worst = max(lost.values())
    bars = {
        f"ov-{precision}: the precision costs at most {most} points of either network: {worst:.2f}": worst <= most,
        f"ov-{precision}: every layer with weights runs in it, of both networks": all(
            each.keys() == {precision} for each in found["types"].values()
        ),
        f"ov-{precision}: the bundle is verified": found["verified"] == 0,
    }
    if precision == "fp32":
        close = abs(found["accuracy"]["full"] - FULL_TOP1[0]) <= FULL_TOP1[1]
        bars["ov-fp32: the full network scores 91.73 +- 0.05"] = close
    return bars


def timed(figures: dict[str, Any]) -> dict[str, bool]:
    """The bars on time, at batch 1."""
    bars, taken = {}, {}
    for precision, found in figures.items():
        (one,) = (each for each in found["latency"] if each["batch"] == 1)
        name = f"ov-{precision}: the compressed network is at least {FASTER} times as fast at batch 1"
        bars[f"{name}: {one['speedup']['median']:.2f}"] = one["decided"] and one["speedup"]["low"] >= FASTER
        taken[precision] = one["full"]["median_ms"]
    for precision in [each for each in taken if each != "fp32"]:
        times = taken["fp32"] / taken[precision]
        name = f"ov-{precision}: the full network is at least {NARROW_FASTER} times as fast as in FP32 at batch 1"
        bars[f"{name}: {times:.2f}"] = times >= NARROW_FASTER
    return bars


if __name__ == "__main__":
    sys.exit(main())
