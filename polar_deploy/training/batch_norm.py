"""BatchNorm over the whole batch, of which each process has a part: as one process with all of it would compute.

torch.nn.SyncBatchNorm does this on GPUs alone, for modules of its own type. This works on any device and for whatever
calls `torch.nn.functional.batch_norm`, in modules of the user's too, and leaves the modules as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polar_deploy.gating import processes


def of_whole_batch() -> AbstractContextManager[Any]:
    """Inside, statistics of batches are those of all processes together, each of which has to do the same passes."""
    return _WholeBatch() if processes.are_several() else nullcontext()


class _WholeBatch(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return (batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.batch_norm` for x [B, C, ...]; while training, B runs over all processes."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    with torch.no_grad():
        mean, var, count = _statistics(x)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
        if running_var is not None:
            running_var.lerp_((var * (count / (count - 1))).to(running_var), momentum)
    scale = torch.ones_like(mean) if weight is None else weight
    shift = torch.zeros_like(mean) if bias is None else bias
    made: Tensor = _Normalize.apply(x, scale, shift, mean, var, count, eps)
    return made


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all processes, [C], and how many values they are of."""
    kind = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(kind), _others(x), correction=0)
    var, mean = var.double(), mean.double()  # squares of sums are taken from sums of squares
    own = float(x.numel() // x.shape[1])
    sums = processes.total(torch.cat([mean * own, (var + mean.square()) * own, mean.new_tensor([own])]))
    count = float(sums[-1])
    mean, square = (sums[:-1] / count).chunk(2)
    return mean.to(kind), (square - mean.square()).clamp_min(0).to(kind), count


def _others(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are functions of all processes' x.

    Backward as in Ioffe & Szegedy, arXiv 1502.03167, section 3: with the gradient g of the output and the normalised
    y, that of x is weight / sqrt(var + eps) * (g - mean(g) - y * mean(g * y)), with means over all processes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: float, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt()
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(  # with statistics that stay as they are
            gradients[0], x, weight, mean, var, mean, inverse, False, ctx.eps, [True, True, True]
        )
        sums = processes.total(torch.cat([of_bias, of_weight]).double()) / ctx.count
        mean_of_g, mean_of_gy = sums.to(mean).chunk(2)
        # What the statistics add is a line in x for each channel.
        slope = weight * inverse.square() * mean_of_gy
        offset = weight * inverse * mean_of_g - slope * mean
        shape = [1, -1, *(1,) * (x.dim() - 2)]
        line = offset.view(shape) + slope.view(shape) * x
        return of_x - line.to(of_x), of_weight, of_bias, None, None, None, None
