"""Runs a function in processes that train together."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable

import torch

# What the processes are forks of: PyTorch is imported once for all of them, and for all tests.
_IMPORTED = ["torch._dynamo", "torch.distributed", "polar_deploy.training.gated", "polar_deploy.gating.gates"]


def together(work: Callable[..., None], *args: object, processes: int = 2) -> None:
    """Call `work`, of a module that can be imported, with rank, a free port of this machine and `args` in each process.

    Raises:
        ProcessRaisedException: one of them did.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(_IMPORTED)
    torch.multiprocessing.start_processes(work, (port, *args), nprocs=processes, start_method="forkserver")
