"""One-pass training with gates: ordinary training, in which `Gates` watch, close little by little, and are fixed.

epochs      0 ......... start ................ freeze ................. end
gates       all open   | closing: a falling target | fixed: static sub-network
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from polar_deploy.gating.gates import Gates
from polar_deploy.progress import Progress
from polar_deploy.training.checkpoint import State
from polar_deploy.training.loop import Fit, autocast, cross_entropy, evaluate, fit, set_rate, sgd

UNDECIDED = (0.05, 0.95)  # a gate counts as undecided while the share of samples that open it lies between


class OnePass:
    """Training of a network with gates under a budget, with the full network as teacher where the settings say so.

    Args:
        run: the training run; its network carries the gates.
        gates: of that network.
        teacher: the full network, or None.
    """

    def __init__(self, run: Fit, gates: Gates, teacher: nn.Module | None) -> None:
        self.run, self.gates = run, gates
        self.teacher = teacher.eval() if teacher is not None else None
        self.weights = sgd(list(run.network.parameters()), run.settings)
        self.criterion = cross_entropy(run.settings)
        self._share: Tensor | None = None  # of the last epoch's samples that open each gate, summed over steps
        self._steps = 0
        self._freeze: dict[str, Any] | None = None  # what fixing the gates changed

    def optimizers(self) -> list[Optimizer]:
        """The weights' own; gates move by themselves."""
        return [self.weights]

    def before_step(self, done: float) -> None:
        """Set the learning rate."""
        training = self.run.settings.training
        set_rate(self.weights, training.gated_lr or training.lr, training.warmup, done)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits [B, classes]."""
        with autocast(self.run.settings, self.run.device):
            logits = self.run.network(images)
            loss = self.criterion(logits, labels)
            if self.teacher is not None:
                loss = self._taught(loss, logits, images)
        return loss + self.gates.loss(), logits

    def after_step(self) -> None:
        """Let the gates learn; note what samples say, and what the freeze changes."""
        share = self.gates.share
        self._share = share if self._share is None else self._share + share
        self._steps += 1
        freezes = self.gates.freezes_next
        before = evaluate(self.run.network, self.run.validation) if freezes and self.run.validation else None
        self.gates.step()
        if freezes:
            after = evaluate(self.run.network, self.run.validation) if self.run.validation else None
            self._freeze = {
                "undecided": undecided(share),
                "share": [round(value, 4) for value in share.tolist()],
                "val_before": before,
                "val_after": after,
            }

    def after_epoch(self, state: State) -> dict[str, Any]:
        """The cost of the network as its gates stand, how undecided they are, and once what the freeze changed."""
        record: dict[str, Any] = {}
        if self._freeze is not None:
            record["freeze"] = state.notes["freeze"] = {"epoch": state.epoch, **self._freeze}
            self._freeze = None
        elif self.gates.phase == "learning" and self._share is not None:
            record["undecided"] = undecided(self._share / self._steps)
        self._share, self._steps = None, 0
        cost = self.gates.cost()
        tightest = max(cost, key=lambda name: cost[name] / self.gates.budget.get(name, 2.0))
        asked = self.gates.budget
        return record | {
            "cost": cost[tightest],
            "budget": asked[tightest],
            "costs": {name: cost[name] for name in asked},
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the gates."""
        return self.gates.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.gates.load_state_dict(state)

    def _taught(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """Distillation: KL divergence to the teacher at a temperature (Hinton et al., arXiv 1503.02531)."""
        assert self.teacher is not None
        training = self.run.settings.training
        heat = training.distill_temperature
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher(images).float() / heat, dim=1)
        given = F.log_softmax(logits.float() / heat, dim=1)
        divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True) * heat**2
        return (1 - training.distill) * loss + training.distill * divergence


def train_gated(run: Fit, gates: Gates, teacher: nn.Module | None, progress: Progress) -> State:
    """Train a network with gates in place, to the end of its run; afterwards its gates are frozen.

    The state's note "freeze" holds the share of samples that opened each gate and what freezing changed.
    """
    return fit(run, OnePass(run, gates, teacher), progress)


def undecided(share: Tensor) -> float:
    """Share of gates whose samples disagree: UNDECIDED[0] < m < UNDECIDED[1], for m = `share` [G]."""
    low, high = UNDECIDED
    return float(((share > low) & (share < high)).float().mean())
