"""What a network is run under while PyTorch's exporter (2.15) makes a plain graph of it; the values are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Exportable(TorchFunctionMode):
    """Inside, calls that the exporter refuses, or writes in a way that hides the channels, are made in another form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _FORMS.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """On [..., L, E]: called with four axes, the only number that is taken: the first ones in one, or further ones."""
    *lead, length, _ = query.shape

    def four(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, -4) if tensor.dim() > 4 else tensor[(None,) * (4 - tensor.dim())]

    if query.dim() != 4 and attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = four(attn_mask.expand(*lead, *attn_mask.shape[-2:]))
    result = F.scaled_dot_product_attention(four(query), four(key), four(value), attn_mask, *args, **kwargs)
    return result.reshape(*lead, length, value.shape[-1])


def _pool(input: Tensor, output_size: Any) -> Tensor:
    """On [..., H, W] to one pixel: a mean, since what lies in memory with its channels last becomes a Gather else."""
    if output_size in (1, (1, 1), [1, 1]):
        return input.mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)


_FORMS = {F.scaled_dot_product_attention: _attention, F.adaptive_avg_pool2d: _pool}


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Inside, a network's own `torch.autocast` does nothing, be it on or off: graphs are in float32.

    PyTorch 2.15's exporter makes a graph of its own of what is computed in it, and loses which modules computed it.
    """
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(own: torch.autocast) -> torch.autocast:
        return own

    def left(own: torch.autocast, *error: object) -> bool:
        return False

    torch.autocast.__enter__, torch.autocast.__exit__ = entered, left  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


@contextlib.contextmanager
def constant_parameters(network: nn.Module) -> Iterator[None]:
    """Inside, parameters ask for no gradient: PyTorch 2.15 cannot export attention whose mask asks for one."""
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
