"""Sweeps on Ray: killed and gone on with, trained once what runs share, timed one after the other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polar_deploy.documents.comparison import Run, Score
from polar_deploy.documents.parity import Interval, Metric
from polar_deploy.documents.part import Pair
from polar_deploy.documents.report import Blocks, Reduced
from polar_deploy.documents.sweep import Spread
from polar_deploy.progress import Progress
from polar_deploy.stages.context import RunContext
from polar_deploy.stages.runner import is_current
from polar_deploy.sweep import results
from polar_deploy.sweep.plan import Planned, planned
from polar_deploy.sweep.runs import TRAINED, Ended, Room, adopt, run_all
from tests.conftest import ROOT, Miniature, child_environment

ROOM = Room(address=None, workers=2, cpus=1, gpus=0)


def of_miniature(miniature: Miniature, folder: Path, **changed: object) -> Planned:
    """The miniature run as one of a sweep, in a folder without anything."""
    import yaml

    from polar_deploy.config import Settings
    from polar_deploy.stages.resolve import resolve

    values = yaml.safe_load((miniature.folder / "run.yaml").read_text()) | changed
    return Planned(resolve(Settings.model_validate(values), folder), folder)


def context(run: Planned) -> RunContext:
    return RunContext(run.settings, run.folder, Progress(quiet=True))


def test_what_another_run_has_trained_is_taken_over(miniature: Miniature, tmp_path: Path) -> None:
    same = context(of_miniature(miniature, tmp_path / "ov", target="ov-fp32"))
    adopt(same, miniature.folder)
    assert all(is_current(same, stage) for stage in TRAINED)
    other = context(of_miniature(miniature, tmp_path / "tighter", budget={"macs": 0.4}))
    adopt(other, miniature.folder)
    assert [stage.name for stage in TRAINED if is_current(other, stage)] == ["full"]
    assert not (tmp_path / "tighter/stamps/gates.json").exists()


def test_runs_that_are_trained_need_no_ray_and_are_timed_in_turn(miniature: Miniature, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(miniature.folder, folder)
    run = of_miniature(miniature, folder)
    ended = run_all([run], ROOM, Progress(quiet=True))
    assert ended == {"one": Ended(miniature.outcome.code)}
    found = results.document("mine", [run], ended)
    report = json.loads((folder / "report.json").read_text())
    (group,) = found.groups
    assert group.accuracy is not None
    assert group.accuracy.mean == report["accuracy"]["compressed"]
    assert group.macs == Spread(**dict.fromkeys(("mean", "low", "high"), report["macs"]["ratio"]))
    assert found.runs[0].report == "one/report.json"


def test_means_are_over_seeds_and_a_failed_run_is_none_of_them() -> None:
    def figures(accuracy: float, speedup: float) -> Run:
        cost = Reduced(full=4, compressed=2, ratio=0.5)
        return Run(
            **dict.fromkeys(("name", "model", "data", "target", "machine", "reason"), "x"),
            **dict.fromkeys(("macs", "params", "bytes"), cost),
            seed=3,
            blocks=Blocks(removed=0, total=0),
            metric=Metric(name="accuracy", unit="%"),
            batch=1,
            result="pass",
            budget={"macs": 0.5},
            accuracy=Score(full=accuracy + 1, compressed=accuracy, drop=1.0, interval=(0.0, 2.0)),
            measured=True,
            latency_ms=Pair(full=Interval(4.0, 4.0, 4.0), compressed=Interval(2.0, 2.0, 2.0)),
            speedup=Interval(speedup, speedup, speedup),
            energy_mj=None,
            best={},
            number=1,
        )

    class Settings:
        target, seed = "ort-fp32", 3

        class budget:
            @staticmethod
            def asked() -> dict[str, float]:
                return {"macs": 0.5}

    run = Planned(Settings, Path("a"))  # type: ignore[arg-type]
    group = results._group([(run, figures(90.0, 1.5)), (run, figures(92.0, 2.5)), (run, None)])
    assert group.accuracy == Spread(mean=91.0, low=90.0, high=92.0)
    assert group.speedup == Spread(mean=2.0, low=1.5, high=2.5)
    assert group.results == ["pass", "pass", "failed"]


SWEEP = """
settings:
  {model: "tests.support.tiny:net", data: digits, training: {epochs: 2, threads: 1, amp: fp32},
   accept: {max_drop: 90, min_speedup: 0.1}}
budgets: [0.6, 0.5, 0.001]
"""

# The command, without coverage in what it starts: Ray's processes do not live to tell what they did.
COMMAND = """
import os, sys
from polar_deploy.sweep.__main__ import main
from tests.conftest import quick_clock

for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
    del os.environ[name]
with quick_clock():
    sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    file, folder = tmp_path / "mine.yaml", tmp_path / "sweep"
    file.write_text(SWEEP)
    given = [str(file), "--out", str(folder), "--workers", "2", "--json"]
    environment = child_environment(traced=False) | {"RAY_worker_niceness": "0"}
    first, second, third = (run.folder for run in planned(file, folder))
    killed = subprocess.Popen(
        [sys.executable, "-m", "polar_deploy.sweep", *given],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    ends = time.monotonic() + 300
    while not (first / "stamps/full.json").is_file():
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < ends
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    environment = child_environment() | {"RAY_worker_niceness": "0"}
    command = [sys.executable, "-c", COMMAND, *given]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout)
    assert [run["error"] is None for run in found["runs"]] == [True, True, False], done.stderr
    assert done.returncode == 2  # of the budget that is out of reach
    assert "0.001" in found["runs"][2]["error"]
    assert json.loads((folder / "results.json").read_text()) == found
    logs = [(each / "run.log").read_text() for each in (first, second)]
    assert sum("full 2/2" in log for log in logs) == 1  # trained once for both
    assert not (third / "report.json").exists()
    windows = [_timed(each) for each in (first, second)]
    trained = max((each / "stamps/surgery.json").stat().st_mtime for each in (first, second))
    assert trained < min(begun for begun, _ in windows)  # no engine is built or timed while a network is trained
    assert windows[0][1] <= windows[1][0] or windows[1][1] <= windows[0][0]


def _timed(folder: Path) -> tuple[float, float]:
    """When the build of a run was finished, and when its comparison was, which has no stamp where it is undecided."""
    built, compared = ((folder / name).stat().st_mtime for name in ("engines/build.json", "parity.json"))
    return built, compared
