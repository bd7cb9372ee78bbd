"""The demo's bundle in an environment of the core and ONNX Runtime alone: verified and timed; its size and its time.

Makes the environment with pip, so it needs a package index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, run_pipeline, write_result

REPEATS = 5


def main() -> int:
    """Run the bars; 0 if all are met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = run_pipeline(folder / "run", "--recipe", "digits")
        python, packages = _environment(folder / "environment")
        bundle = folder / "run/bundle"
        whole = [_verify(python, bundle, "--no-timing") for _ in range(REPEATS)]
        timed = _verify(python, bundle)
        archive = folder / "bundle.zip"
        _run(python, "archive", bundle, archive)
        sizes = {
            path.relative_to(bundle).as_posix(): path.stat().st_size for path in bundle.rglob("*") if path.is_file()
        }
        figures = {
            "demo_exit_code": demo["exit_code"],
            "packages": packages,
            "verify_no_timing": whole,
            "verify": timed,
            "bytes": {"all": sum(sizes.values()), "archive": archive.stat().st_size, "files": sizes},
        }
    bars = {
        "the demo makes a bundle": demo["exit_code"] == 0,
        "no torch in the environment": "torch" not in packages,
        "verified without timing: exit code 0 in at most 3 s": all(
            each["exit_code"] == 0 and each["seconds"] <= 3 for each in whole
        ),
        "verified and timed: exit code 0": timed["exit_code"] == 0,
    }
    return write_result("bundle", bars, figures)


def _environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """A fresh environment with what an edge team installs; its interpreter, and the packages in it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", f"{ROOT}[ort]"], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    return python, dict(line.split("==", 1) for line in listed.split() if "==" in line)


def _verify(python: Path, bundle: Path, *options: str) -> dict[str, Any]:
    start = time.monotonic()
    done = _run(python, "verify", bundle, *options)
    seconds = round(time.monotonic() - start, 2)
    return {"exit_code": done.returncode, "seconds": seconds, "said": done.stdout.splitlines()[2:]}


def _run(python: Path, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The bundle's command, of the installed package: from a folder in which there is no other."""
    line = [str(python), "-m", "polar_deploy.bundle", command, *map(str, arguments)]
    return subprocess.run(line, cwd=python.parent, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
