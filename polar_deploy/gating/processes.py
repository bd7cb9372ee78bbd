"""What the processes of a distributed run do together; in a run of one process nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def are_several() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that decides for all."""
    return rank() == 0


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if are_several() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if are_several() else 1


def is_first_here() -> bool:
    """Whether this is the first one on its machine, as the launcher says."""
    return not are_several() or int(os.environ.get("LOCAL_RANK", rank())) == 0


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if not are_several():
        return values
    summed = values.to(_device(), copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def mean(values: Tensor) -> Tensor:
    """The mean over all processes, which have as many samples each."""
    return total(values) / count() if are_several() else values


def mean_of_seen(seen: Tensor | None, gates: int) -> Tensor | None:
    """The mean over the processes that saw something, float [gates]; None where none did. All have to call it."""
    if not are_several():
        return seen
    told = total(torch.zeros(gates + 1, device="cpu") if seen is None else torch.cat([seen, seen.new_ones(1)]))
    return told[:-1] / told[-1] if float(told[-1]) else None


def of_the_first(value: T) -> T:
    """A value of the first process, tensors in it on the CPU, in all of them."""
    if not are_several():
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order; all have to call it."""
    if not are_several():
        return [value]
    held: list[T] = [value] * count()
    dist.all_gather_object(held, value)
    return held


def share_network(network: nn.Module) -> nn.Module:
    """A network with the parameters and buffers of the first process's."""
    for tensor in network.state_dict().values() if are_several() else ():
        held = tensor.contiguous()  # in memory with its channels last it is not
        dist.broadcast(held, 0)
        tensor.copy_(held)
    return network


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean of the gradients over all processes, which have gradients of the same parameters.

    One message for each type, after the backward pass. DistributedDataParallel sends them during it; but it takes a
    network that stays what it is, and this one is cut in the middle of its training.
    """
    if not are_several():
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in kinds.values():
        flat = mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, averaged in zip(gradients, torch.split(flat, [each.numel() for each in gradients]), strict=True):
            gradient.copy_(averaged.view(gradient.shape))


def _device() -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
