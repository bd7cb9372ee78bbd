"""A run of several processes, as torchrun starts them: the first one runs the stages, the others help it to train.

Only the first one reads and writes the run's folder, which need not be there on other machines; what it has read goes
to the others when a stage trains. Between that they wait, and they leave when it does, with its exit code.

The launcher tells each process by its environment who it is: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and on its
machine LOCAL_RANK and LOCAL_WORLD_SIZE.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polar_deploy.errors import ContentError, MachineError, PolarDeployError, UsageError, first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from polar_deploy.stages.context import RunContext

_PATIENCE = timedelta(hours=1)  # for a process that reads data or waits for a slow disk, while the others wait for it
_POLL = 0.1  # seconds
_GRACE = 10.0  # seconds in which a process ends by itself after the first one has ended in the middle of a training


def rank() -> int:
    """Number of this process, from 0; 0 too for one that is alone."""
    return _number("RANK") if _number("WORLD_SIZE") > 1 else 0


def _number(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise UsageError(f"the environment says {name}={value}, which is no number", "start the run with torchrun")
    return int(value)


class Team:
    """The other processes, as the first one sees them; none, where it is alone. A context manager for all of the run.

    Attributes:
        code: the exit code that all of them leave with.
    """

    def __init__(self) -> None:
        self._store = _store() if _number("WORLD_SIZE") > 1 else None
        self._calls = 0
        self.code = 0

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (store := self._store) is None:
            return
        from polar_deploy.commands import exit_code

        store.set("end", str(self.code if error is None else exit_code(error)))
        if _hosts_store():  # it goes with this process
            others = [f"left {number}" for number in range(1, _number("WORLD_SIZE"))]
            _until(lambda: store.check(others), _GRACE)

    def call(self, run: RunContext, stage: str) -> None:
        """Call the others to the training of a stage, with all of the run that they cannot know."""
        if self._store is None:
            return
        from polar_deploy.stages.artefacts import LATENCY_TABLE

        table = run.path(LATENCY_TABLE)
        told = {
            "stage": stage,
            "settings": run.settings.model_dump(mode="json"),
            "latency_table": table.read_text(encoding="utf-8") if table.is_file() else None,
            "data": _signature(run),
        }
        self._calls += 1
        self._store.set(f"call {self._calls}", json.dumps(told))
        join(self._store)


def follow() -> int:
    """Be one of the others: train when the first one calls, until it ends; returns its exit code.

    Raises:
        ContentError: this process reads other data than the first one.
        MachineError: the first process is gone.
    """
    store = _store()
    try:
        for number in range(1, 1000):
            call = f"call {number}"
            _until(partial(_is_one_there, store, (call, "end")))
            if store.check(["end"]):
                break
            _train(store, json.loads(store.get(call)))
        return int(store.get("end"))
    except PolarDeployError as error:
        raise type(error)(f"process {rank()} on {socket.gethostname()}: {error.what}", error.todo) from error
    finally:
        with suppress(RuntimeError):  # it is gone: nobody wants to know
            store.set(f"left {rank()}", "")


def _train(store: Store, told: dict[str, Any]) -> None:
    """Take part in the training of a stage; what the first process has ended by itself is no error here."""
    from polar_deploy.progress import Progress
    from polar_deploy.resolved import ResolvedSettings
    from polar_deploy.stages import full, gates
    from polar_deploy.stages.artefacts import LATENCY_TABLE
    from polar_deploy.stages.context import RunContext
    from polar_deploy.stages.runner import translated

    over = threading.Event()
    threading.Thread(target=_leave_with_the_first, args=(store, over), daemon=True).start()
    try:
        join(store)
        with TemporaryDirectory(prefix="polar_deploy-") as folder:
            settings = ResolvedSettings.model_validate(told["settings"])
            run = RunContext(settings, Path(folder), Progress(quiet=True), leads=False)
            if told["latency_table"] is not None:
                run.path(LATENCY_TABLE).write_text(told["latency_table"], encoding="utf-8")
            if _signature(run) != told["data"]:
                what = f"its data are not those of process 0: {_signature(run)}, and there {told['data']}"
                raise ContentError(what, "give all machines the same data, at the same path")
            with translated(told["stage"]):
                {"full": full.train, "gates": gates.train}[told["stage"]](run)
    except Exception:
        if _until(lambda: store.check(["end"]), _GRACE / 2):  # it tells itself what has happened
            return
        raise
    finally:
        over.set()


def _leave_with_the_first(store: Store, over: threading.Event) -> None:
    """End this process when the first one has ended while a stage trains: NCCL would wait for it for minutes."""
    while not over.wait(1.0):
        if store.check(["end"]):
            if not over.wait(_GRACE):
                os._exit(int(store.get("end")))
            return


def join(store: Store) -> None:
    """Make the process group of a training, once: NCCL on GPUs, gloo on CPUs.

    Raises:
        UsageError: there are fewer GPUs on this machine than processes.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    backend, here = "gloo", _number("LOCAL_RANK")
    if torch.cuda.is_available():
        if here >= torch.cuda.device_count():
            raise UsageError(
                f"process {rank()} is number {here + 1} on this machine, which has {torch.cuda.device_count()} GPUs",
                f"start it with --nproc-per-node={torch.cuda.device_count()}",
            )
        backend = "nccl"
        torch.cuda.set_device(here)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=rank(),
        world_size=_number("WORLD_SIZE"),
        timeout=_PATIENCE,
    )


def _store() -> Store:
    """What all processes read and write: the launcher's, or one of the first process."""
    import torch.distributed as dist

    where, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT")
    if not where or not port:
        raise UsageError("WORLD_SIZE says several processes, but MASTER_ADDR and MASTER_PORT not where", "use torchrun")
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            where, port, None, _hosts_store(), timeout=timedelta(minutes=5), wait_for_workers=False
        )
    except RuntimeError as error:
        what = f"process {rank()} cannot reach {where}:{port}: {first_line(error)}"
        raise MachineError(what, "check that address and port can be reached from all machines") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the launcher's store outlives its processes
    return dist.PrefixStore(f"polar_deploy {attempt}", store)  # type: ignore[attr-defined]


def _is_one_there(store: Store, keys: Sequence[str]) -> bool:
    return any(store.check([key]) for key in keys)


def _hosts_store() -> bool:
    """Whether the store is in this process; torchrun has one in its own."""
    return rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _until(is_so: Callable[[], bool], seconds: float = float("inf")) -> bool:
    """Wait until something is so; False: it was not in so many seconds. In steps, so that Ctrl-C ends it."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if is_so():
                return True
        except RuntimeError as error:  # of a connection that broke
            raise MachineError(
                "the first process of the run is gone", "see what it said, and start all again"
            ) from error
        time.sleep(_POLL)
    return False


def _signature(run: RunContext) -> dict[str, Any]:
    """What tells other data from the same, without reading every picture again."""

    return {"samples": len(run.data.train), "data": run.data.fingerprint()[:16]}
