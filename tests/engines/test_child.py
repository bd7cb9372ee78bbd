"""A child process: its answer comes back, and however it ends, the caller gets one error with its last words."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polar_deploy.engines import child
from polar_deploy.errors import ContentError, MachineError, PolarDeployError
from tests.conftest import ROOT, child_environment

WHAT = "building an engine of a.onnx"
NO_MEMORY = f"^{WHAT} ran out of memory, or was killed for lack of it; last words: "


def call(function: str) -> dict[str, object]:
    return child.call(f"tests.engines.deaths:{function}", {"a": [1, "ü"]}, WHAT)


def test_answer_comes_back_from_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT), "/nowhere/at all"])
    got = call("answer")
    assert got["got"] == {"a": [1, "ü"]}
    assert got["pid"] != os.getpid()
    assert "/nowhere/at all" in got["path"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "kind", "what"),
    [
        (
            "abort",
            ContentError,
            rf"^{WHAT} died of SIGABRT; last words: first \| Assertion cudaRuntime >= 12 failed \| terminate called$",
        ),
        ("raise_own", MachineError, "^no room$"),
        ("raise_other", ContentError, rf"^{WHAT} ended with code 1; last words: .* \| ValueError: a bug in line 7$"),
        ("leave", ContentError, rf"^{WHAT} ended with code 0; last words: none$"),
        ("be_killed", MachineError, f"{NO_MEMORY}none$"),
        ("run_out_of_memory", MachineError, f"{NO_MEMORY}.*MemoryError$"),
    ],
)
def test_each_end_is_one_error(function: str, kind: type[PolarDeployError], what: str) -> None:
    with pytest.raises(kind) as error:
        call(function)
    assert re.search(what, error.value.what), error.value.what
    assert "\n" not in error.value.what


def test_what_the_caller_is_interrupted_by_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("sleep")
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child that its parent is gone")
def test_child_ends_with_its_parent(tmp_path: Path) -> None:
    mark = tmp_path / "asleep"
    code = f"from polar_deploy.engines import child; child.call('tests.engines.deaths:sleep', {{'mark': '{mark}'}}, '')"
    with subprocess.Popen([sys.executable, "-c", code], env=child_environment()) as parent:
        _wait_for(mark.is_file)
        status = Path("/proc", mark.read_text().strip(), "stat")
        parent.kill()
    _wait_for(lambda: not status.is_file() or status.read_text().rpartition(") ")[2].startswith("Z"))


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child that its parent is gone")
def test_child_of_a_parent_that_is_gone_already_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text("{}")
    function, nobody = "tests.engines.deaths:answer", 2**22 + 1  # no process has a number above 2^22
    arguments = [function, tmp_path / "asked.json", tmp_path / "answered.json", nobody]
    command = [sys.executable, "-m", "polar_deploy.engines.child", *map(str, arguments)]
    assert subprocess.run(command, env=child_environment(), check=False).returncode == 1
    assert not (tmp_path / "answered.json").exists()
