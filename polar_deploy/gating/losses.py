"""What makes gates agree (polarization) and what makes them close (the steering of cost against utility).

The paper's full text was not at hand; the formulas are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polar_deploy.gating.cost import Constraint

MARGIN = 1.0  # logits are pushed this far to the right side of zero, and no further: they can always come back
SHARPNESS = 8.0  # a gate whose utility is 10 % off the price moves at 0.36 of full speed


def polarization(share: Tensor) -> Tensor:
    """Mean over gates of m (1 - m), for m = `share` [G], the share of samples that open a gate; in [0, 1/4].

    Zero exactly when every gate is open for all samples or closed for all: then a static sub-network is left. Such
    gates get no gradient: m is at the end of its range, and pushing their logits on would only make them stiff.
    """
    split = (share > 0) & (share < 1)
    return torch.where(split, share * (1 - share), torch.zeros_like(share)).mean()


def steering(logits: Tensor, utility: Tensor, price: Tensor, marginal: Tensor, protected: Tensor) -> Tensor:
    """The loss that moves each gate towards what its utility is worth at today's price.

        d = (u^k - (price c)^k) / (u^k + (price c)^k) = tanh(k/2 log(u / (price c))),  k = SHARPNESS
        L = mean over samples and gates of |d| max(0, MARGIN - sign(d) logit)

    with u the loss that closing the gate would add and c its marginal cost (`Constraint.marginal`). The quotient d
    lies in [-1, 1]: its sign says on which side of the price the gate is, its size how clearly; it does not depend
    on the scale of the loss. A gate that nothing depends on (u = c = 0: inside a closed block) rests.

    Args:
        logits: [B, G], with their gradient.
        utility, marginal: u and c, [G], >= 0.
        price: scalar, from `find_price`.
        protected: bool [G], gates that must not close.
    """
    worth = price * marginal
    tiny = torch.finfo(torch.float64).tiny
    drift = torch.tanh(SHARPNESS / 2 * ((utility + tiny) / (worth + tiny)).log())
    drift = torch.where(protected, torch.ones_like(drift), drift).to(logits.dtype)
    return (drift.abs() * torch.relu(MARGIN - drift.sign() * logits)).mean()


def find_price(constraint: Constraint, utility: Tensor, marginal: Tensor, protected: Tensor, target: float) -> Tensor:
    """The price (loss per unit of excess) at which the gates worth keeping leave the excess `target`.

    Bisection on log price over the ratios utility / marginal cost; the cost of the gates above each candidate is
    evaluated exactly. Returns a scalar tensor on the gates' device, 0 where no gate has been observed yet.
    """
    ratio = utility / marginal.clamp_min(torch.finfo(torch.float64).tiny)
    known = ratio[(utility > 0) & (marginal > 0)]
    if known.numel() == 0:
        return ratio.new_zeros(())
    low, high = known.min().log() - 1, known.max().log() + 1
    for _ in range(24):
        middle = (low + high) / 2
        kept = protected | (ratio > middle.exp())
        too_dear = constraint(kept.double()) > target
        low, high = torch.where(too_dear, middle, low), torch.where(too_dear, high, middle)
    return high.exp()
