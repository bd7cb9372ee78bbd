"""Gates that decide sample by sample, as in the method of Zhi et al. (arXiv 2302.10798), until all samples agree.

A light network looks at the pooled input of the layer behind a site and gives one logit a gate; a gate is open where
its logit is > 0, and backward the step is a sigmoid (straight-through). The paper's full text was not at hand: the
formulas are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polar_deploy.gating import processes
from polar_deploy.gating.analysis import Analysis
from polar_deploy.gating.masking import Carriers
from polar_deploy.gating.utility import Observer

HIDDEN = 16  # units of the light network's hidden layer
FIRST_LOGIT = 1.0  # where logits start: open, and near enough to zero to close early
MARGIN = 1.0  # logits are pushed this far to the right side of zero, and no further: they can always come back
STEERING, POLARIZATION = 4.0, 1.0  # weights in the loss
RATE = 0.3  # of the light networks' optimizer, for losses that are means over gates times the number of gates
TEMPERATURES = (2.0, 0.5)  # of the sigmoid, at the start and at the freeze, geometric in between


class Decider(nn.Module):
    """Logits [B, gates] from features [B, width, ...] of one site."""

    def __init__(self, width: int, gates: int) -> None:
        super().__init__()
        self.hidden, self.logit = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, gates)
        nn.init.normal_(self.logit.weight, std=0.01)
        nn.init.constant_(self.logit.bias, FIRST_LOGIT)

    def forward(self, features: Tensor) -> Tensor:
        """Logits; the features are looked at and not shaped, and normalised, as they grow and shrink in training."""
        with torch.autocast(features.device.type, enabled=False):
            pooled = F.layer_norm(features.detach().float(), features.shape[1:])
            logits: Tensor = self.logit(F.relu(self.hidden(pooled)) / HIDDEN**0.5)
        return logits


class SampleGates:
    """Decisions a sample for all gates of a network; sees what passes the masks (`masking.Listener`).

    Args:
        carriers: of the masks.
        analysis: the network's gates.
        observer: is told the gradients at the gates.
    """

    def __init__(self, carriers: Carriers, analysis: Analysis, observer: Observer) -> None:
        choices = analysis.choices
        spans = [gates for gates, _, _ in choices.owners()]
        gate_of = analysis.gate_of(next(iter(analysis.example.tensors)).device)
        self._gates, self._spans, self._observer = choices.gates, spans, observer
        self._carriers = carriers
        self._gate_of = gate_of
        first = {}  # each site is decided at the first mask that closes its gates
        for index, gates in enumerate(gate_of):
            for site in range(len(spans)):
                if site not in first and bool(((gates >= spans[site].start) & (gates < spans[site].stop)).any()):
                    first[site] = index
        self._decided_at: dict[int, list[int]] = {}
        for site, index in first.items():
            self._decided_at.setdefault(index, []).append(site)
        self.deciders = nn.ModuleDict(
            {str(s): Decider(choices.masks[index].width, len(spans[s])) for s, index in sorted(first.items())}
        ).to(gate_of[0].device)
        self._optimizer = torch.optim.SGD(self.deciders.parameters(), lr=RATE * choices.gates)
        self._temperature = TEMPERATURES[0]
        self._decisions: Tensor | None = None  # float [B, gates + 1], the last one always open
        self._logits: dict[int, Tensor] = {}
        self._batch = 0
        self._is_shared = False  # whether all processes have the same deciders

    @property
    def share(self) -> Tensor:
        """Float [gates]: share of the last batch's samples that open each gate."""
        return torch.ones(self._gates, device="cpu") if self._decisions is None else self._decisions[:, :-1].mean(0)

    def passes(self, module: nn.Module, name: str, x: Tensor, mask: Tensor, axes: tuple[int, int]) -> Tensor | None:
        """The activations, B * k samples on the first of `axes`, times each sample's own mask."""
        index, batch = self._carriers.place(module, name), self._observer.batch
        if index is None or not batch or not x.numel() or x.shape[axes[0]] % batch:
            return None
        if self._decisions is None or self._fresh():
            self._decisions = x.new_ones(batch, self._gates + 1, dtype=torch.float32)
            self._logits, self._batch = {}, self._observer.number
        for site in self._decided_at.get(index, ()):
            if site not in self._logits:
                self._decide(site, x.movedim(axes, (0, 1)))
        gates = self._gate_of[index]
        own = self._decisions[:, torch.where(gates < 0, self._gates, gates)]  # [B, width]
        own = own.repeat_interleave(x.shape[axes[0]] // batch, 0).to(x.dtype)
        return x * own[(...,) + (None,) * (x.dim() - 2)].movedim((0, 1), axes)

    def loss(self, wanted: Tensor) -> Tensor:
        """Polarization, and the pull of each logit to the side of zero that the plan wants; bool [gates]."""
        device = self._gate_of[0].device
        if not self._logits:
            return torch.zeros((), device=device)
        sign = torch.where(wanted, 1.0, -1.0).to(device)
        pull = [torch.relu(MARGIN - sign[self._slice(s)] * logits) for s, logits in self._logits.items()]
        steering = torch.cat([each.mean(0) for each in pull]).mean()
        own = self.share
        share = own + (processes.mean(own.detach()) - own.detach())  # of all samples, with this process's gradient
        return STEERING * steering + POLARIZATION * polarization(share)

    def step(self, progress: float) -> None:
        """After a backward pass: move the deciders; `progress` of the learning phase, in [0, 1], cools them."""
        self.cool(progress)
        if self._logits:
            processes.average_gradients(self.deciders.parameters())
            torch.nn.utils.clip_grad_norm_(self.deciders.parameters(), 1.0 / RATE, error_if_nonfinite=False)
            self._optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the passes since the last step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._decisions, self._logits = None, {}

    def cool(self, progress: float) -> None:
        """Set the temperature for a share of the learning phase, in [0, 1]."""
        if not self._is_shared:
            processes.share_network(self.deciders)
            self._is_shared = True
        first, last = TEMPERATURES
        self._temperature = first * (last / first) ** progress

    def state_dict(self) -> dict[str, Any]:
        """The deciders' weights."""
        return {name: value.clone() for name, value in self.deciders.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the deciders' weights back."""
        self.deciders.load_state_dict(dict(state))

    def _slice(self, site: int) -> slice:
        return slice(self._spans[site].start, self._spans[site].stop)

    def _fresh(self) -> bool:
        return self._observer.number != self._batch

    def _decide(self, site: int, x: Tensor) -> None:
        """Put a site's decisions [B, gates] in place, from [B * k, width, ...]: hard forward, soft backward."""
        assert self._decisions is not None
        features = x.flatten(2).mean(2) if x.dim() > 2 else x
        features = features.reshape(len(self._decisions), -1, features.shape[1]).mean(1)
        logits = self._logits[site] = self.deciders[str(site)](features)
        soft = torch.sigmoid(logits / self._temperature)
        each = (logits > 0).to(soft.dtype) + soft - soft.detach()
        if each.requires_grad:
            each.register_hook(lambda gradient: self._observe(site, gradient))
        columns = torch.arange(self._spans[site].start, self._spans[site].stop, device=x.device)
        self._decisions = self._decisions.index_copy(1, columns, each)

    def _observe(self, site: int, gradient: Tensor) -> Tensor:
        """Tell the observer; to the logits goes the gradient over its root mean square, as a mean over all gates.

        A block's gate has a gradient hundreds of times a channel's, and would drown the pull to the plan.
        """
        self._observer.tell(self._spans[site].start, gradient)
        size = processes.mean(gradient.square().mean(0)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return torch.nan_to_num(gradient / size) / (len(gradient) * self._gates)


def polarization(share: Tensor) -> Tensor:
    """Mean over gates of m (1 - m), for m = `share` [G], the share of samples that open a gate; in [0, 1/4].

    Zero exactly when every gate is open for all samples or closed for all: then a static sub-network is left. Such
    gates get no gradient: m is at the end of its range, and pushing their logits on would only make them stiff.
    """
    split = (share > 0) & (share < 1)
    return torch.where(split, share * (1 - share), torch.zeros_like(share)).mean()
