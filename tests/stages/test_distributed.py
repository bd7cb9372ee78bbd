"""Who leads and who follows: how the others hear what to train, and that all leave with one exit code."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from polar_deploy.config import Settings
from polar_deploy.errors import ContentError, MachineError, UsageError
from polar_deploy.progress import Progress
from polar_deploy.stages import distributed, gates
from polar_deploy.stages.context import RunContext
from polar_deploy.stages.resolve import resolve
from tests.conftest import MINIATURE, ROOT, child_environment, polar


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """What the first process of two and the other one share, in this one."""
    made = dist.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda: made)
    monkeypatch.setattr(distributed, "_GRACE", 0.4)
    monkeypatch.setattr(distributed, "join", lambda store: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    return made


def run_in(folder: Path) -> RunContext:
    settings = Settings.model_validate({"model": "tests.support.tiny:net", "data": "digits", "budget": {"macs": 0.5}})
    return RunContext(resolve(settings, folder), folder, Progress(quiet=True))


def test_a_process_that_is_alone_leads_whatever_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.rank() == 0
    monkeypatch.setenv("RANK", "3")  # of a launcher of something else
    assert distributed.rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.rank() == 3
    monkeypatch.setenv("RANK", "many")
    with pytest.raises(UsageError, match="the environment says RANK=many"):
        distributed.rank()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 5),
        (UsageError("a", "b"), 2),
        (ContentError("a", "b"), 4),
        (KeyError("a"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_all_leave_with_the_first_ones_code(error: BaseException | None, code: int, store: dist.Store) -> None:
    left = []
    other = threading.Thread(target=lambda: left.append(distributed.follow()))
    other.start()
    with nullcontext() if error is None else pytest.raises(type(error)), distributed.Team() as team:
        team.code = 5
        if error is not None:
            raise error
    other.join(5)
    assert left == [code]
    assert store.check(["left 1"])


def test_the_others_hear_of_the_run_and_train_it(
    store: dist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(run: RunContext) -> None:
        trained.append((run.settings, run.leads, run.path("latency-table.json").read_text(), run.folder))

    monkeypatch.setattr(gates, "train", train)
    run = run_in(tmp_path)
    run.path("latency-table.json").write_text("a table")
    with distributed.Team() as team:
        team.call(run, "gates")
        other = threading.Thread(target=distributed.follow)
        other.start()
        while not trained and other.is_alive():
            time.sleep(0.01)
    other.join(5)
    ((settings, leads, table, folder),) = trained
    assert (settings, leads, table) == (run.settings, False, "a table")
    assert folder != run.folder
    assert not folder.exists()


def test_other_data_are_named_with_process_and_machine(store: dist.Store, tmp_path: Path) -> None:
    run = run_in(tmp_path)
    with distributed.Team() as team:
        team.call(run, "full")
        told = store.get("call 1").decode().replace('"samples": ', '"samples": 1')
        store.set("call 1", told)
        with pytest.raises(
            ContentError, match=f"process 1 on {re.escape(socket.gethostname())}: its data are not those"
        ):
            distributed.follow()


def test_what_the_first_one_tells_itself_is_not_told_twice(
    store: dist.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: RunContext) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(gates, "train", broken)
    with distributed.Team() as team:
        team.call(run_in(tmp_path), "gates")
    store.set("end", "4")
    assert distributed.follow() == 4
    store.delete_key("end")
    with pytest.raises(MachineError, match="another process of this run has ended"):
        distributed.follow()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="process 2 is number 3 on this machine, which has 2 GPUs") as caught:
        distributed.join(dist.HashStore())
    assert "--nproc-per-node=2" in caught.value.todo


def test_without_an_address_torchrun_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT") as caught:
        distributed.Team()
    assert "torchrun" in caught.value.todo


def test_a_first_process_that_is_gone_is_told() -> None:
    def gone() -> bool:
        raise RuntimeError("Connection reset by peer")

    with pytest.raises(MachineError, match="the first process of the run is gone"):
        distributed._until(gone)
    assert not distributed._until(lambda: False, seconds=0.01)


def test_a_wrong_command_is_told_once_and_ends_both_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "polar_deploy.pipeline", "--model", "resnet20", "--budget", "7"]
    both = [
        subprocess.Popen(
            command, env=child_environment() | place | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert "--budget 7" in said[0]
    assert said[1] == ""


def test_two_machines_train_and_one_goes_on_when_they_were_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [*MINIATURE, "--out", str(folder), "--until", "surgery"]
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf=is_host={is_host}"),
                *("-m", "polar_deploy.pipeline", *given),
            ],
            env=child_environment(traced=False),
            cwd=ROOT,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        for is_host in ("true", "false")
    ]
    try:
        ends = time.monotonic() + 300
        while not (folder / "gated/checkpoint.safetensors").is_file():  # after the first epoch of three
            assert all(machine.poll() is None for machine in machines), [each.communicate()[1] for each in machines]
            assert time.monotonic() < ends
            time.sleep(0.02)
    finally:
        for machine in machines:
            _kill(machine)
    outcome = polar(*given)
    assert outcome.code == 0, outcome.err
    assert outcome.up_to_date == ["full"]
    assert "gates: goes on after epoch" in outcome.err
    assert outcome.ran == ["gates", "export", "surgery"]


def _kill(machine: subprocess.Popen[str]) -> None:
    """SIGKILL a launcher and what it has started, which has a process group of its own."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(machine.pid)], capture_output=True, text=True, check=False
    )
    for number in [machine.pid, *map(int, children.stdout.split())]:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    machine.communicate()
