"""A bundle with real plans on a GPU: verified as delivered, and with a falsified TensorRT version rebuilt and verified.

The example in docs/ classifies a picture with the plan, too, and has to agree with `bundle run`.

    python -m benchmarks.gpu_bundle RUN [--target trt-fp16]

RUN is the folder of a run that was trained anywhere with `--until surgery`; it is copied. Without a GPU or without
TensorRT this ends with exit code 3. Figures go to `benchmarks/results/gpu-bundle.json`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import ROOT, write_result
from polar_deploy import targets
from polar_deploy.engines import nvml
from polar_deploy.errors import MachineError
from polar_deploy.workspace import read_json, write_json

_FALSE_VERSION = "10.0.0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bars; 0 if all are met, 3 if they cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--target", default="trt-fp16")
    asked = parser.parse_args(arguments)
    try:
        targets.check(targets.parse(asked.target))
    except MachineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(asked.run, folder / "run")
        made = _call("pipeline", "--recipe", folder / "run/run.yaml", *_options(asked.target, folder))
        bundle = folder / "run/bundle"
        found = {"pipeline": made, **(_examine(bundle, folder) if bundle.is_dir() else {})}
    codes = {name: each["exit_code"] for name, each in found.items()}
    bars = {
        "a bundle with plans is made": codes["pipeline"] in (0, 5),
        "an untrusted plan is not loaded: exit code 5": codes.get("untrusted") == 5,
        "the plan is loaded, runs and passes": codes.get("trusted") == 0,
        "docs/examples/classify_tensorrt.py agrees with bundle run": _agree(found),
        "a falsified version is not loaded: exit code 5": codes.get("falsified") == 5,
        "with --rebuild it is built here and passes": codes.get("rebuilt") == 0,
    }
    about = {"gpu": nvml.conditions().as_json(), "target": asked.target}
    return write_result("gpu-bundle", bars, {**about, "commands": found})


def _options(target: str, folder: Path) -> list[object]:
    """Lenient on accuracy and speed: the bundle is looked at here, not the network."""
    lenient = ("--max-drop", "100", "--min-speedup", "0.5")
    return ["--target", target, "--out", folder / "run", "--from", "build", *lenient, "--json"]


def _examine(bundle: Path, folder: Path) -> dict[str, Any]:
    """The bundle as delivered, then falsified."""
    verify = ("bundle", "verify", bundle, "--json")
    found = {"untrusted": _call(*verify, "--no-timing"), "trusted": _call(*verify, "--trust-plan")}
    picture = folder / "picture.png"
    Image.effect_noise((300, 200), 80).save(picture)
    found["run"] = _call("bundle", "run", bundle, picture, "--trust-plan", "--json")
    found["example"] = _started(ROOT / "docs/examples/classify_tensorrt.py", bundle, picture)
    manifest = read_json(bundle / "manifest.json")
    for network in manifest["networks"].values():
        network["plan"]["version"] = _FALSE_VERSION
    write_json(bundle / "manifest.json", manifest)
    found["falsified"] = _call(*verify, "--trust-plan", "--no-timing")
    found["rebuilt"] = _call(*verify, "--trust-plan", "--rebuild", "--engines", folder / "engines")
    return found


def _agree(found: dict[str, Any]) -> bool:
    """Whether command and example give the picture the same likeliest label."""
    if found.get("run", {}).get("exit_code") != 0 or found["example"]["exit_code"] != 0:
        return False
    _, best, *_ = found["example"]["answer"]
    label: str = found["run"]["answer"][0]["top"][0]["label"]
    return best.partition(" %  ")[2] == label


def _call(module: str, *arguments: object) -> dict[str, Any]:
    """Exit code and JSON answer of a command of polar_deploy."""
    done = _started("-m", f"polar_deploy.{module}", *arguments)
    return done | {"answer": json.loads("\n".join(done["answer"]))} if done["exit_code"] in (0, 1, 5) else done


def _started(*arguments: object) -> dict[str, Any]:
    """Exit code of a Python program, and the lines that it said."""
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "answer": (done.stdout or done.stderr).splitlines()}


if __name__ == "__main__":
    sys.exit(main())
