"""Runs the miniature's command in children that die at a chosen moment, and compares what the next run makes of it.

One process imports torch once and runs every command in a fork of itself: `Runner`. A child is killed by SIGKILL, from
outside at a time after a stage began, or by itself in the middle of a write, when half of the file is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.conftest import (
    MINIATURE,
    ROOT,
    Outcome,
    analysed_once,
    child_environment,
    contents,
    polar,
    quick_clock,
)

# What the stages import, so that a fork has it: seconds in which no stage does anything.
_IMPORTS = ("onnxruntime", "onnxscript", "rich.console", "torchvision")
_IMPORTS += ("torch.onnx._internal.exporter._core", "polar_deploy.stages.resolve", "polar_deploy.bundle.make")
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp(\.[^.]*)?")
DECIDED = {"pass": 0, "undecided": 5}  # exit codes; a tiny network that fails has no bundle to look at


@dataclass(frozen=True)
class Moment:
    """When to die: in `stage`, so many seconds after it began, or in its `write`-th write (from 1), of `file` alone."""

    stage: str
    seconds: float | None = None
    write: int | None = None
    file: str | None = None


@dataclass(frozen=True)
class Write:
    """A file that was about to become whole: its name in the run's folder, and its size."""

    file: str
    size: int


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        seconds: how long each stage took that ended, those that were up to date among them.
        writes: what each stage wrote, in order, the file in whose middle the command died among them.
    """

    outcome: Outcome
    seconds: dict[str, float]
    writes: dict[str, list[Write]]

    def hit(self, moment: Moment) -> bool:
        """Whether it died in the stage; False: the stage, or the whole command, was over before."""
        return self.outcome.code == -signal.SIGKILL and moment.stage not in self.seconds


class Runner:
    """A process with everything imported that runs the miniature's command in forks of itself; a context manager."""

    def __enter__(self) -> Runner:
        command = [sys.executable, "-m", "tests.support.kills"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=child_environment(traced=False), cwd=ROOT, stdin=pipe, stdout=pipe, text=True, encoding="utf-8"
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def run(self, folder: Path, moment: Moment | None = None) -> Ended:
        """Run the command on `folder`, to its end or to the moment."""
        assert self._process.stdin
        assert self._process.stdout
        request = {"folder": str(folder), "moment": moment and asdict(moment)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        writes = {stage: [Write(*write) for write in written] for stage, written in answer["writes"].items()}
        return Ended(Outcome(answer["code"], "", answer["err"]), answer["seconds"], writes)

    def killed(self, start: Callable[[], Path], moments: Iterable[Moment]) -> tuple[Path, Moment, Ended]:
        """Kill a run, at the first of the `moments` that really hits its stage.

        Args:
            start: makes a folder for the next attempt.
            moments: tried in turn.

        Raises:
            RuntimeError: none did, or the run ended with an error.
        """
        for moment in moments:
            folder = start()
            ended = self.run(folder, moment)
            if ended.hit(moment):
                return folder, moment, ended
            if ended.outcome.code not in (-signal.SIGKILL, *DECIDED.values()):
                raise RuntimeError(f"it was not the kill that ended it: {ended.outcome}")
            shutil.rmtree(folder)
        raise RuntimeError("no moment hit its stage")


# --------------------------------------------------------------------------- what lies in a folder


def becomes(name: Path) -> Path:
    """What a file is to become, by its name in the folder; a file that is no temporary one stays what it is."""
    parts = []
    for part in name.parts:
        while found := _TEMPORARY.fullmatch(part):
            part = f"{found[1]}{found[2] or ''}"
        parts.append(part)
    return Path(*parts)


def leftovers(folder: Path) -> dict[str, int]:
    """The temporary files and folders in a folder: what each was to become, and its bytes (of a folder: 0)."""
    found = {path: path.relative_to(folder) for path in sorted(folder.rglob("*"))}
    sizes = {path: path.stat().st_size if path.is_file() else 0 for path in found}
    return {becomes(name).as_posix(): sizes[path] for path, name in found.items() if becomes(name) != name}


def not_yet(unbroken: Path, folder: Path, stage: str) -> Path:
    """Copy a run as it was before `stage` began; before the first stage there is nothing."""
    from polar_deploy.stages import NAMES, STAGES

    if stage == NAMES[0]:
        return folder
    shutil.copytree(unbroken, folder)
    for later in STAGES[NAMES.index(stage) :]:
        (folder / f"stamps/{later.name}.json").unlink(missing_ok=True)
        for written in later.writes:
            path = folder / written
            shutil.rmtree(path, ignore_errors=True) if written.is_folder else path.unlink(missing_ok=True)
    return folder


# --------------------------------------------------------------------------- the same figures

_LAYERS = [f"{place}engines/{name}.layers.json" for place in ("", "bundle/") for name in ("full", "compressed")]
_LOGS = ["full/training.jsonl", "gated/training.jsonl"]
# What differs from run to run: seconds, and the names that ONNX Runtime gives to what it inserts.
_PAGES = ["report.html", "bundle/report.html"]
TIMED = {*_LAYERS, *_LOGS, *_PAGES, "engines/build.json", "parity.json", "bundle/manifest.json", "report.json"}
_STAMPS = {f"stamps/{stage}.json" for stage in ("full", "gates", "build", "parity", "bundle", "report")}
# Keys of what was timed, or follows from it: the hash of a bundle that tells latencies.
_SECONDS = {"seconds", "latency", "machine", "overall", "bundle"}
# The same files, by the names that other files call them by.
_CALLED = TIMED | {Path(name).name for name in _LAYERS} | {name.removeprefix("bundle/") for name in _LAYERS}


def differences(unbroken: Path, resumed: Path) -> list[str]:
    """Files that are not the same byte for byte; of those with seconds in them, not the same but for what was timed.

    A verdict that the machine was too noisy for has no stamp, as it is to be measured again.
    """
    expected, found = contents(unbroken), contents(resumed)
    unstamped = {"stamps/parity.json"} if "undecided" in (verdict(unbroken), verdict(resumed)) else set()
    unlike = {name for name in expected.keys() ^ found.keys() if name not in unstamped}
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            known = name in TIMED | _STAMPS
            if not known or _figures(unbroken / name) != _figures(resumed / name):
                unlike.add(name)
    return sorted(unlike)


def verdict(folder: Path) -> str:
    """The verdict of a run: pass, fail or undecided."""
    return str(json.loads((folder / "parity.json").read_text())["verdict"]["overall"]["result"])


def _figures(path: Path) -> Any:
    """A JSON file, or one of JSON lines, without what was timed; the page has its figures from report.json."""
    if path.suffix == ".html":
        return None
    text, dropped = path.read_text(), _SECONDS | _CALLED | ({"name"} if path.name.endswith(".layers.json") else set())
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [_without(dropped, json.loads(line)) for line in lines]


def _without(dropped: set[str], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(dropped, held) for key, held in value.items() if key not in dropped}
    return [_without(dropped, held) for held in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------- inside of the runner


def _serve() -> None:
    """Answer each line on stdin, a folder and a moment, with how the command ended.

    What can go from the network is found out before, so that all forks know it.
    """
    for name in _IMPORTS:
        import_module(name)
    with analysed_once():
        polar(*MINIATURE, "--dry-run")
        for line in sys.stdin:
            request = json.loads(line)
            moment = request["moment"] and Moment(**request["moment"])
            print(json.dumps(_forked(Path(request["folder"]), moment)), flush=True)


def _forked(folder: Path, moment: Moment | None) -> dict[str, Any]:
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(_command(folder, moment, writing))
        os.close(writing)
        told = _watch(reading, child, moment)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        err.seek(0)
        return {"code": code, "err": err.read().decode(), **told}


def _watch(reading: int, child: int, moment: Moment | None) -> dict[str, Any]:
    """Listen to the child until it has ended, and kill it when it is time."""
    told, deadline = b"", math.inf
    timed = moment is not None and moment.seconds is not None
    while True:
        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            deadline = math.inf
        elif chunk := os.read(reading, 65536):
            told += chunk
            if timed and moment is not None and f'["began", "{moment.stage}"'.encode() in told:
                deadline, timed = time.monotonic() + (moment.seconds or 0.0), False
        else:
            os.close(reading)
            return _told(told)


def _told(text: bytes) -> dict[str, Any]:
    began: dict[str, float] = {}
    seconds: dict[str, float] = {}
    writes: dict[str, list[list[Any]]] = {}
    for kind, stage, *facts in map(json.loads, text.splitlines()):
        if kind == "began":
            began[stage], writes[stage] = facts[0], []
        elif kind == "ended":
            seconds[stage] = facts[0] - began[stage]
        else:
            writes[stage].append(facts)
    return {"seconds": seconds, "writes": writes}


def _command(folder: Path, moment: Moment | None, pipe: int) -> int:
    """The command, with an eye on its stages and on its writes. It must not return into the runner's own loop."""
    from polar_deploy import pipeline, workspace
    from polar_deploy.stages import runner

    spy = _Spy(folder, moment, pipe, runner.run_stage, workspace._fsync)
    runner.run_stage, workspace._fsync = spy.run_stage, spy.fsync
    try:
        with quick_clock():
            return pipeline.main([*MINIATURE, "--out", str(folder)])
    except BaseException:  # noqa: BLE001  (whatever it is)
        traceback.print_exc()
        return 70
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


class _Spy:
    """Tells which stage runs and what it writes, and kills this process in the middle of the write it waits for."""

    def __init__(
        self,
        folder: Path,
        moment: Moment | None,
        pipe: int,
        run_stage: Callable[[Any, Any], None],
        fsync: Callable[[Path], None],
    ) -> None:
        self._folder, self._moment, self._pipe = folder, moment, pipe
        self._run_stage, self._fsync = run_stage, fsync
        self._stage, self._left = "", moment.write if moment else None

    def run_stage(self, run: Any, stage: Any) -> None:
        self._stage = stage.name
        self._tell("began", time.monotonic())
        self._run_stage(run, stage)
        self._tell("ended", time.monotonic())
        self._stage = ""

    def fsync(self, path: Path) -> None:
        """A file that is put on the disk under a temporary name is in the middle of being written."""
        name = path.relative_to(self._folder)
        if self._stage and path.is_file() and becomes(name) != name:
            self._tell("wrote", becomes(name).as_posix(), path.stat().st_size)
            if self._awaited(becomes(name).as_posix()):
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        self._fsync(path)

    def _awaited(self, name: str) -> bool:
        moment = self._moment
        if moment is None or self._left is None or self._stage != moment.stage or moment.file not in (None, name):
            return False
        self._left -= 1
        return self._left == 0

    def _tell(self, kind: str, *facts: object) -> None:
        os.write(self._pipe, json.dumps([kind, self._stage, *facts]).encode() + b"\n")


if __name__ == "__main__":
    _serve()
