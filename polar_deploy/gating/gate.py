"""The gate: a light network that opens or closes channels, straight-through, until its decisions are frozen."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Phase = Literal["off", "learning", "frozen"]
HIDDEN = 16  # units of the gate's hidden layer
FIRST_LOGIT = 1.0  # where logits start: open, and near enough to zero to close early


class Gate(nn.Module):
    """Gates of one site: pooled source → tiny MLP → one logit a gate; open where the logit is > 0.

    The logits are per sample in both modes. In mode "sample" each sample is gated by its own; in mode "batch" the
    majority of the batch decides for all of it. Backward, the step is replaced by sigmoid(logit / temperature)
    (straight-through). The source is detached: gates look at the features and do not shape them.

    Args:
        gates: how many gates stand here.
        source_width: channels of what they look at.
        mode: "batch" or "sample".
        peers: gates in the whole network, over which losses of gates are means.

    Attributes:
        phase: "off" (all open, nothing computed), "learning", or "frozen" (multiplies by the buffer `open`).
        open: float [gates], 0 or 1: the gates' state as it stands (learning: of the last batch; frozen: for good).
        logits: float [B, gates] of the last batch.
        share: float [gates]: share of the last batch's samples whose logit was > 0, with the sigmoid's gradient.
        utility: float [gates]: running estimate of the loss that closing each gate would cost, see `_observe`.
    """

    open: Tensor
    utility: Tensor
    observed: Tensor

    def __init__(
        self, gates: int, source_width: int, mode: Literal["batch", "sample"] = "batch", peers: int = 1
    ) -> None:
        super().__init__()
        self.mode = mode
        self.peers = peers
        self.phase: Phase = "off"
        self.temperature = 1.0
        self.hidden = nn.Linear(source_width, HIDDEN)
        self.logit = nn.Linear(HIDDEN, gates)
        nn.init.normal_(self.logit.weight, std=0.01)
        nn.init.constant_(self.logit.bias, FIRST_LOGIT)
        self.register_buffer("open", torch.ones(gates))
        self.register_buffer("utility", torch.zeros(gates))
        self.register_buffer("observed", torch.zeros(()))
        self.logits: Tensor = self.open
        self.share: Tensor = self.open

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Gate `x` [B, C, ...] by what `source` [B, C', ...] looks like; C = gates, or any where there is one gate."""
        if self.phase == "off":
            return x
        if self.phase == "frozen":
            return x * _as_channels(self.open.to(x.dtype).unsqueeze(0), x)
        mask = self._decide(self._logits(source))
        if mask.requires_grad:
            mask.register_hook(self._observe)  # type: ignore[no-untyped-call]
        return x * _as_channels(mask.to(x.dtype), x)

    def freeze(self, open_gates: Tensor) -> None:
        """Fix the gates to 0/1 values [gates]; from here on the module only multiplies."""
        self.open.copy_(open_gates)
        self.phase = "frozen"

    def _logits(self, source: Tensor) -> Tensor:
        pooled = source.detach().float()
        pooled = pooled.flatten(2).mean(2) if pooled.dim() > 2 else pooled
        with torch.autocast(source.device.type, enabled=False):
            pooled = F.layer_norm(pooled, pooled.shape[1:])  # features grow and shrink during training
            hidden = F.relu(self.hidden(pooled)) / HIDDEN**0.5
            self.logits = self.logit(hidden)
        return self.logits

    def _decide(self, logits: Tensor) -> Tensor:
        """Mask [B, gates] from logits [B, gates]; updates `share` and `open`."""
        soft = torch.sigmoid(logits / self.temperature)
        hard = (logits > 0).to(soft.dtype)
        each = hard + soft - soft.detach()
        self.share = each.mean(0)
        majority = (self.share.detach() >= 0.5).to(soft.dtype)
        self.open.copy_(majority)
        if self.mode == "sample":
            return each
        shared = majority + self.share - self.share.detach()
        return shared.expand(logits.shape[0], -1)

    def _observe(self, gradient: Tensor) -> Tensor:
        """Learn the utility from the loss gradient at the mask, [B, gates]; pass it on in units of its own size.

        With g_i the gradient of sample i's own loss, half the mean of g_i² is the Fisher approximation of the loss
        added by closing an open gate (second order; at a minimum the first order vanishes): Theis et al., "Faster
        gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787, eq. 7. A closed gate still sees
        its gradient, since the product's derivative at the mask is what it holds back: it can come back.

        What goes on to the logits is g_i over its root mean square, as a mean over samples and all gates: a block's
        gate has a gradient hundreds of times a channel's, and would drown the steering (`losses.steering`).
        """
        own = gradient.float() * gradient.shape[0]  # the loss is a mean over the batch
        now = torch.nan_to_num(0.5 * own.square().mean(0))
        self.observed += 1
        weight = torch.clamp(1.0 / self.observed, min=0.02)  # plain mean at first, then about 50 batches
        reached = now.sum() > 0  # inside a closed block no gradient arrives: keep what was known
        self.utility.copy_(torch.where(reached, torch.lerp(self.utility, now, weight), self.utility))
        size = (2 * self.utility).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        limit = gradient.shape[0] ** 0.5  # the most that one sample can have over the root mean square of all
        return ((own / size).clamp(-limit, limit) / (gradient.shape[0] * self.peers)).to(gradient.dtype)


def _as_channels(mask: Tensor, x: Tensor) -> Tensor:
    """Shape [B, gates] for a product with `x` [B, C, ...]."""
    return mask.reshape(*mask.shape, *([1] * (x.dim() - 2)))
