"""The command from outside: how fast it answers, what it imports, what it says where a target cannot be built."""

from __future__ import annotations

import importlib
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polar_deploy import targets
from polar_deploy.errors import MachineError
from polar_deploy.stages import NAMES
from tests.conftest import ROOT, child_environment

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "onnx_graphsurgeon", "sklearn")


def timed(*arguments: str, cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds of a child without coverage, which would be measured too, and what it said."""
    environment = {name: value for name, value in child_environment().items() if not name.startswith("COVERAGE_")}
    start = time.monotonic()
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    return time.monotonic() - start, done


def trt_is_missing() -> bool:
    try:
        targets.check(targets.parse("trt-fp16"))
    except MachineError:
        return True
    return False


# --------------------------------------------------------------------------- fast answers


def test_help_answers_at_once(tmp_path: Path) -> None:
    calls = [timed("-m", "polar_deploy.pipeline", "--help", cwd=tmp_path) for _ in range(5)]
    assert statistics.median(seconds for seconds, _ in calls) <= 0.3
    done = calls[0][1]
    assert (done.returncode, done.stderr) == (0, "")
    options = {"--model", "--target", "--data", "--budget", "--from", "--until", "--dry-run", "--set", "--json"}
    assert options <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert all(stage in done.stdout for stage in NAMES)


def test_surgery_is_imported_at_once_and_imports_nothing_heavy(tmp_path: Path) -> None:
    calls = [timed("-c", "import polar_deploy.surgery", cwd=tmp_path) for _ in range(9)]
    assert statistics.median(seconds for seconds, _ in calls) <= 0.3
    code = f"import polar_deploy.surgery, polar_deploy.pipeline, sys; print([m for m in {HEAVY} if m in sys.modules])"
    _, done = timed("-c", code, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_the_console_script_is_this_command() -> None:
    script = re.search(r'^polar-deploy = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert script
    function = getattr(importlib.import_module(script[1]), script[2])
    with pytest.raises(SystemExit) as stopped:
        function(["--version"])
    assert stopped.value.code == 0


def test_argparse_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for wrong in (["--modle", "resnet20"], ["--until", "nowhere"]):
        _, done = timed("-m", "polar_deploy.pipeline", *wrong, cwd=tmp_path)
        assert done.returncode == 2
        assert "error: " in done.stderr
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- TensorRT where there is none


@pytest.mark.skipif(not trt_is_missing(), reason="this machine can build for TensorRT")
def test_a_target_that_cannot_be_built_is_refused_at_once(tmp_path: Path) -> None:
    command = ("-m", "polar_deploy.pipeline", "--model", "resnet56", "--target", "trt-fp16")
    seconds, done = timed(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert seconds <= 3
    first, todo = done.stderr.splitlines()
    assert first.startswith("error: target trt-fp16 cannot be built here: ")
    assert "tensorrt" in first
    assert "what to do: use --target ort-fp32" in todo
    assert "--until surgery" in todo
    assert os.listdir(tmp_path) == []
