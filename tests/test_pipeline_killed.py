"""SIGKILL in the middle of a write, in three stages one after the other: the same command still ends where it should.

The killed process is a real one, and the write is really hit: the file is half on the disk when the process dies.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.conftest import MINIATURE, Miniature, child_environment, contents, polar

# Imports torch once, then reads "FILE NUMBER" from stdin, each time: runs the command in a fork of itself that kills
# itself at that write of that file, and answers with how it ended.
RUNNER = """
import os, signal, sys
from pathlib import Path
import onnxruntime, torch, torchvision
from polar_deploy import workspace
from polar_deploy.pipeline import main

fsync = workspace._fsync

def run(final, left):
    def killer(path):
        nonlocal left
        if path.parent == final.parent and path.name.startswith(f".{final.stem}.") and path.suffix == final.suffix:
            left -= 1
            if left == 0:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(path)

    workspace._fsync = killer
    return main(sys.argv[1:])

for line in sys.stdin:
    final, number = line.split()
    child = os.fork()
    if not child:
        os._exit(run(Path(final), int(number)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# What differs from run to run: seconds, and the names that ONNX Runtime gives to what it inserts.
TIMED = {
    *("gated/training.jsonl", "parity.json", "report.json"),
    *("engines/build.json", "engines/full.layers.json", "engines/compressed.layers.json"),
    *(f"stamps/{stage}.json" for stage in ("gates", "build", "parity", "report")),
}


class Victim:
    """Runs the miniature's command in `folder`, and dies in it."""

    def __init__(self, folder: Path, stderr: Path) -> None:
        command = [sys.executable, "-c", RUNNER, *MINIATURE, "--out", str(folder)]
        self.folder, self.stderr = folder, stderr.open("w+")
        self._runner = subprocess.Popen(
            command,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )

    def killed(self, final: str, number: int) -> str:
        """Start the command, kill it in the `number`-th write of a file, and return what it said on stderr."""
        assert self._runner.stdin
        assert self._runner.stdout
        before = self.stderr.seek(0, 2)
        print(self.folder / final, number, file=self._runner.stdin, flush=True)
        code = self._runner.stdout.readline().strip()
        self.stderr.seek(before)
        said = self.stderr.read()
        assert code == f"{-signal.SIGKILL}", said
        return said

    def close(self) -> None:
        """Let the runner end."""
        self._runner.communicate()
        self.stderr.close()


def leftovers(folder: Path) -> list[str]:
    """The temporary files in a folder, by where they lie and what they were to become."""
    found = [path for path in folder.rglob("*.tmp*") if path.is_file()]
    return [(path.parent.relative_to(folder) / f"{path.name.split('.')[1]}{path.suffix}").as_posix() for path in found]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_killed_in_three_stages_and_still_the_same(miniature: Miniature, tmp_path: Path) -> None:
    folder = miniature.copy(tmp_path / "run", "gates", "export", "surgery", "build", "parity", "report")
    with closing(Victim(folder, tmp_path / "stderr")) as victim:
        said = victim.killed("gated/checkpoint.safetensors", 2)  # the second epoch, at whose end gates freeze
        assert "full: up to date" in said
        assert leftovers(folder) == ["gated/checkpoint.safetensors"]
        with safe_open(folder / "gated/checkpoint.safetensors", framework="np") as checkpoint:
            assert json.loads(checkpoint.metadata()["state"])["epoch"] == 1

        said = victim.killed("compressed/model.onnx", 1)
        assert "gates: goes on after epoch 1 of 3" in said
        assert leftovers(folder) == ["compressed/model.onnx"]  # that of the first kill is gone
        assert not (folder / "compressed/model.onnx").exists()
        assert not (folder / "stamps/surgery.json").exists()

        said = victim.killed("parity.json", 1)
        assert all(f"{stage}: up to date" in said for stage in ("full", "gates", "export"))
        assert leftovers(folder) == ["parity.json"]
        assert not (folder / "parity.json").exists()

    outcome = polar(*MINIATURE, "--out", folder, "--json")
    assert outcome.ran == ["parity", "report"]
    assert outcome.code in (0, 1, 5)
    assert leftovers(folder) == []
    same_figures(miniature.folder, folder)


def same_figures(unbroken: Path, resumed: Path) -> None:
    """Every file is the same byte for byte; of those with seconds in them, all that is no latency."""
    expected, found = contents(unbroken), contents(resumed)
    assert set(found) == set(expected)
    assert {name for name in found if found[name] != expected[name]} <= TIMED
    logs = [(folder / "gated/training.jsonl").read_text().splitlines() for folder in (unbroken, resumed)]
    epochs, again = ([json.loads(line) | {"seconds": None} for line in log] for log in logs)
    assert again == epochs
    for name, timed in {"parity.json": {"latency", "machine"}, "report.json": {"latency", "machine"}}.items():
        one, other = read(unbroken / name), read(resumed / name)
        compared = one.keys() - timed - {"verdict"}
        assert {key: other[key] for key in compared} == {key: one[key] for key in compared}
        assert other["verdict"]["accuracy"] == one["verdict"]["accuracy"]
