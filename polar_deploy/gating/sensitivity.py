"""How much the outputs change when a site is narrowed or a block closed, each alone: measured, not estimated.

Gradients order the channels of one site, but what they tell holds near the open network, and adds up: half of a layer
is missed far more than twice as much as a quarter, and a whole block by none of its gradients. So how many stay, and
where, is chosen by trying, as in the sensitivity analysis of Li et al., arXiv 1608.08710, section 3.2; with the error
of the outputs in place of the accuracy, since gates know no labels.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from polar_deploy.costs import Floats
from polar_deploy.errors import first_line
from polar_deploy.export import Example, device_of
from polar_deploy.gating import masking, processes
from polar_deploy.gating.analysis import Analysis
from polar_deploy.surgery.facts import Ints

MOST_WIDTHS = 4  # below its full one that are tried of each site: between them the curve is taken to be straight


@dataclass(frozen=True)
class Call:
    """A forward pass of the model that can be made again: its arguments, and its mixed precision, None for none."""

    example: Example
    autocast: torch.dtype | None

    @classmethod
    def of(cls, example: Example, device: torch.device) -> Call:
        """What the model is being called with."""
        is_mixed = torch.is_autocast_enabled(device.type)
        return cls(example, torch.get_autocast_dtype(device.type) if is_mixed else None)

    def again(self, model: nn.Module) -> list[Tensor]:
        """All floating-point outputs, in training mode as they were, with the same random numbers each time."""
        torch.manual_seed(0)
        mixed = torch.autocast(device_of(model).type, dtype=self.autocast, enabled=self.autocast is not None)
        with torch.no_grad(), mixed:
            made = model(*self.example.args, **self.example.kwargs)
        leaves = torch.utils._pytree.tree_leaves(made)
        return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass(frozen=True)
class Sensitivity:
    """Errors of the outputs, as shares of their own variance.

    sites: for each site float [its allowed widths], with that many of its gates open, the most useful ones; falling
        to 0 at the full width.
    blocks: float [blocks], with that block closed.
    """

    sites: tuple[Floats, ...]
    blocks: Floats


def measure(
    model: nn.Module, analysis: Analysis, calls: Sequence[Call], widths: Sequence[Sequence[int]], worth: Floats
) -> Sensitivity | None:
    """The sensitivity of a model whose masks are all open, on the samples of `calls`; the model stays as it is.

    For each call the model is called again, without gradients, once for each state that is tried. In several processes
    each has its own samples, and all have to call this.

    Args:
        widths: of each site, ascending; the last is the full one.
        worth: float [gates]: the gates of a site close in its order.

    Returns:
        None, with a warning, where the model cannot be called again, or its outputs cannot be compared.
    """
    choices = analysis.choices
    tried = [_spread(each) for each in widths]
    closed: list[Ints] = []
    for site, few in zip(choices.sites, tried, strict=True):
        order = site.gates.start + np.argsort(-worth[site.gates.start : site.gates.stop], kind="stable")
        closed += [order[width:] for width in few]
    closed += [np.array([block.gate]) for block in choices.blocks]
    problem = ""
    try:
        with _undisturbed(model):
            errors = _errors(model, analysis, calls, closed)
    except Exception as error:  # noqa: BLE001  (whatever a forward raises that is called once more)
        errors = np.full(len(closed), np.nan)
        problem = f"the model cannot be called again ({type(error).__name__}: {first_line(error)})"
    errors = processes.mean(torch.from_numpy(errors)).numpy()
    if not calls or not np.isfinite(errors).all():
        problem = problem or "the model's outputs cannot be compared"
        warnings.warn(f"{problem}: how many channels stay where is chosen by gradients alone", stacklevel=4)
        return None
    ends = np.cumsum([len(few) for few in tried])
    of_sites = np.split(errors[: ends[-1]], ends[:-1]) if len(ends) else []
    return Sensitivity(
        tuple(_curve(*each) for each in zip(widths, tried, of_sites, strict=True)),
        errors[len(errors) - len(choices.blocks) :],
    )


def _spread(widths: Sequence[int]) -> list[int]:
    """At most `MOST_WIDTHS` of those below the full one, the least among them."""
    last = len(widths) - 2
    return [widths[i] for i in sorted({round(i) for i in np.linspace(0, last, min(MOST_WIDTHS, last + 1))})]


def _curve(widths: Sequence[int], tried: Sequence[int], errors: Floats) -> Floats:
    """Errors at all `widths` of those that were tried: straight between them, and never rising with the width."""
    falling = np.maximum.accumulate(np.append(errors, 0.0)[::-1])[::-1]
    curve: Floats = np.interp(widths, [*tried, widths[-1]], falling)
    return curve


def _errors(model: nn.Module, analysis: Analysis, calls: Sequence[Call], closed: Sequence[Ints]) -> Floats:
    """Of each state, given by the gates that are closed in it: the mean over calls of what `_difference` says."""
    whole = torch.ones(analysis.choices.gates, device="cpu")
    masking.write(model, analysis, whole)
    expected = [call.again(model) for call in calls]
    found = np.zeros((len(closed), len(calls)))
    for index, gates in enumerate(closed):
        values = whole.clone()
        values[torch.from_numpy(gates)] = 0
        masking.write(model, analysis, values)
        found[index] = [_difference(call.again(model), then) for call, then in zip(calls, expected, strict=True)]
    mean: Floats = found.mean(1)
    return mean


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The squared error as a share of the variance, or of the square of what is one number: the mean over outputs."""
    if not expected or [each.shape for each in found] != [each.shape for each in expected]:
        return float("nan")
    shares = []
    for now, then in zip(found, expected, strict=True):
        centre = then.mean() if then.numel() > 1 else 0.0
        size = (then - centre).square().sum()
        if float(size) > 0:  # else it says nothing of its inputs
            shares.append((now - then).square().sum() / size)
    return float(torch.stack(shares).mean()) if shares else float("nan")


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is called as it is written; its buffers and all random numbers are as before afterwards."""
    held = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if masking.is_compiled():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for module, name, buffer, value in held:
                module._buffers[name] = buffer.copy_(value)
