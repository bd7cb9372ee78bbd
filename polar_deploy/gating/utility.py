"""What each gate is worth: the loss that closing it would add, learned from the gradients of ordinary training steps.

With g_i the derivative of sample i's loss by a gate, half the mean of g_i^2 is the Fisher approximation of the loss
added by closing the gate (second order; at a minimum the first order vanishes): Theis et al., "Faster gaze prediction
with dense networks and Fisher pruning", arXiv 1801.05787, eq. 7. A gate that is closed still has a derivative, what it
holds back times the gradient behind it, so that it can come back.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polar_deploy.errors import UsageError
from polar_deploy.export import Example, device_of
from polar_deploy.gating.masking import Carriers
from polar_deploy.gating.sensitivity import Call

LEAST_WEIGHT = 0.05  # of the newest observation in the running mean: it looks back over about 20
MOST_NAMES = 5  # of sites, in a warning
MOST_CALLS = 2  # of a step that can be made again: they hold their inputs
MOST_PASSES = 64  # that a step may consist of; older ones belong to nobody who calls `step`


class Observer:
    """Sees what passes the masks of a network, forward and backward, and keeps a running mean of each gate's utility.

    Args:
        carriers: of the masks.
        gate_of: for each mask, int64 [width], the gate of each channel, or -1.
        gates: how many there are.

    Attributes:
        utility: float [gates]; in each observation all gates together make 1, so that neither the size of the loss nor
            the scale of a `GradScaler` matters.
        observations: how many steps were seen.
    """

    def __init__(self, carriers: Carriers, gate_of: Sequence[Tensor], gates: int) -> None:
        self.gates = gates
        self.utility = torch.zeros(gates, device="cpu")
        self.observations = 0
        self._carriers, self._gate_of = carriers, gate_of
        self._passes: list[_Pass] = []
        self._calls: list[Call] = []
        self._has_seen = False  # any gradient, be it finite or not
        self._looks = True  # at the pass that is under way
        self.keeps_calls = False  # whether passes can be made again, for as long as they are not concluded
        self.number = 0  # of forward passes so far

    @property
    def batch(self) -> int | None:
        """Samples of the pass that is under way; None where it is not looked at."""
        return self._passes[-1].batch if self._passes and self._looks else None

    def tell(self, first: int, gradient: Tensor) -> None:
        """Note the gradients [B, n] at the gates from `first` on."""
        if self._passes:
            self._passes[-1].put(first, gradient)

    def begin(self, call: Call) -> None:
        """A forward pass starts."""
        self._looks = True
        self.number += 1
        self._passes = [*self._passes[1 - MOST_PASSES :], _Pass(call.example.batch, self.gates)]
        self._calls = [*self._calls[1 - MOST_CALLS :], call] if self.keeps_calls else []

    def look_away(self) -> None:
        """A forward pass starts that is not to be learned from: one of an evaluation in the middle of a step."""
        self._looks = False

    def passes(self, module: nn.Module, name: str, x: Tensor, mask: Tensor, axes: tuple[int, int]) -> Tensor | None:
        """The masked activations, whose gradient will be looked at; see `masking.Listener`."""
        place = self._carriers.place(module, name)
        if place is None or not self._passes or not torch.is_grad_enabled():
            return None
        gates = self._gate_of[place]
        factor = mask.to(x.dtype)
        if not x.requires_grad:  # behind frozen layers, whose gates are worth something, too
            if not x.is_floating_point():
                return None
            factor = factor.detach().clone().requires_grad_()
        masked = x * factor
        now, held = self._passes[-1], x.detach()
        masked.register_hook(lambda gradient: now.add(held, gradient, gates, axes))  # type: ignore[no-untyped-call]
        return masked

    def calls(self) -> list[Call]:
        """The last passes since the last time, where they are kept; then they are forgotten."""
        calls, self._calls = self._calls, []
        return calls

    def conclude(self) -> Tensor | None:
        """The utilities of the passes since the last time, float [gates]; None where nothing finite was seen."""
        passes, self._passes = self._passes, []
        seen = [utility for each in passes if (utility := each.utility()) is not None]
        known = [utility for utility in seen if bool(torch.isfinite(utility).all())]
        self._has_seen |= bool(seen)
        return torch.stack(known).mean(0) if known else None

    def learn(self, utility: Tensor) -> None:
        """Take an observation [gates] into the running mean; one without any gradient tells nothing."""
        total = utility.sum()
        if float(total) > 0:
            self.observations += 1
            weight = max(1.0 / self.observations, LEAST_WEIGHT)
            self.utility = torch.lerp(self.utility, (utility / total).to(self.utility), weight)

    def require_observed(self, steps: int) -> None:
        """Raise UsageError where no gate was ever seen: whatever is closed then is arbitrary."""
        if not self._has_seen and not self.observations:  # of NaN and Inf whoever trains will tell
            raise UsageError(
                f"no gate has seen a gradient in {steps} steps",
                "in each step, call the model that was given to Gates, then backward of a loss, then Gates.step",
            )

    def warn_of_unseen(self, owners: Sequence[tuple[range, str, str]]) -> None:
        """Warn of sites and blocks, as (their gates, name, kind), that no gradient reached though it reached others."""
        unseen = [name for gates, name, _ in owners if not self.utility[gates.start : gates.stop].any()]
        if self.observations and unseen:
            others = f" and {len(unseen) - MOST_NAMES} more" if len(unseen) > MOST_NAMES else ""
            warnings.warn(
                f"no gradient reached the gates of {', '.join(unseen[:MOST_NAMES])}{others}: they count as worth "
                "nothing, and close first. Let gradients flow through these layers, or leave them out with ignore",
                stacklevel=4,  # whoever calls `Gates.step`
            )

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        return {"utility": self.utility.clone(), "observations": self.observations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what was learned."""
        self.utility, self.observations = state["utility"].cpu().clone(), int(state["observations"])


class _Pass:
    """The gradients at the gates in one forward and backward pass."""

    def __init__(self, batch: int, gates: int) -> None:
        self.batch, self.gates = batch, gates
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor, gradient: Tensor, gate_of: Tensor, axes: tuple[int, int]) -> None:
        """Add what one mask saw: x and its gradient, with B * k samples for some k on the first of its two `axes`."""
        if not x.numel() or not self.batch or x.shape[axes[0]] % self.batch:
            return  # nothing is there, as for a detector's boxes where none is found; or samples lie elsewhere
        own = (x.float() * gradient.float()).movedim(axes, (0, -1))
        own = own.reshape(self.batch, -1, own.shape[-1]).sum(1)
        if self._sum is None:
            self._sum = own.new_zeros(self.batch, self.gates + 1)
        self._sum.index_add_(1, torch.where(gate_of < 0, self.gates, gate_of).to(own.device), own)

    @torch.no_grad()
    def put(self, first: int, gradient: Tensor) -> None:
        """Add gradients [B, n] at the gates from `first` on."""
        if self._sum is None:
            self._sum = gradient.new_zeros(self.batch, self.gates + 1, dtype=torch.float32)
        self._sum[:, first : first + gradient.shape[1]] += gradient.float()

    def utility(self) -> Tensor | None:
        """Half the mean square of the samples' own gradients, [gates]; the loss is taken to be a mean over samples."""
        if self._sum is None:
            return None
        return 0.5 * (self._sum[:, :-1] * self.batch).square().mean(0)


class Begin:
    """Forward pre-hook of the model: tells the observer that a pass begins. In a copy of the model it does nothing."""

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = weakref.ref(observer) if observer is not None else lambda: None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer = self._observer()
        if observer is None or torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            observer.begin(Call.of(Example(args, kwargs), device_of(module)))
        else:
            observer.look_away()

    def __deepcopy__(self, memo: object) -> Begin:
        return Begin()

    def __reduce__(self) -> tuple[type[Begin], tuple[()]]:
        return Begin, ()
