"""What the processes of a distributed run do together; in a run of one process nothing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from polar_deploy.surgery.facts import Bools


def are_several() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that decides for all."""
    return not are_several() or dist.get_rank() == 0


def mean_of_seen(seen: Tensor | None, gates: int) -> Tensor | None:
    """The mean over the processes that saw something, float [gates]; None where none did. All have to call it."""
    if not are_several():
        return seen
    told = torch.zeros(gates + 1, device=_device()) if seen is None else torch.cat([seen, seen.new_ones(1)])
    dist.all_reduce(told)
    return told[:-1] / told[-1] if float(told[-1]) else None


def of_the_first(opened: Bools) -> Bools:
    """The choice bool [gates] of the first process, in all of them."""
    if not are_several():
        return opened
    state = torch.from_numpy(opened).to(torch.uint8).to(_device())
    dist.broadcast(state, 0)
    return np.asarray(state.bool().cpu().numpy())


def share(parameters: Iterable[nn.Parameter]) -> None:
    """Parameters as they are in the first process."""
    for parameter in parameters if are_several() else ():
        dist.broadcast(parameter.data, 0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of the gradients over all processes."""
    for parameter in parameters if are_several() else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _device() -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
