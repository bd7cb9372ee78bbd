"""One-pass training with gates: learn which channels and blocks to keep, freeze them, train what is left.

epochs      0 ......... start ................ freeze ................. end
gates       all open   | learning: a falling target | frozen: static sub-network
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from polar_deploy.gating.cost import Constraint
from polar_deploy.gating.freeze import Knapsack
from polar_deploy.gating.gate import Phase
from polar_deploy.gating.network import GatedNetwork
from polar_deploy.gating.schedule import Schedule
from polar_deploy.progress import Progress
from polar_deploy.training.checkpoint import State
from polar_deploy.training.loop import Fit, autocast, cross_entropy, evaluate, fit, set_rate, sgd

UNDECIDED = (0.05, 0.95)  # a gate counts as undecided while the share of samples that open it lies between


class OnePass:
    """Training of a gated network under a budget, with the full network as teacher where the settings say so.

    Args:
        run: the training run; its network is a `GatedNetwork`.
        constraint: the budget.
        teacher: the full network, or None.
    """

    def __init__(self, run: Fit, constraint: Constraint, teacher: nn.Module | None) -> None:
        assert isinstance(run.network, GatedNetwork)
        gates = run.settings.gates
        self.run, self.network, self.constraint = run, run.network, constraint.to(run.device)
        self.teacher = teacher.eval() if teacher is not None else None
        self.freeze_epoch = min(run.epochs, max(1, round(gates.freeze * run.epochs)))
        freeze = self.freeze_epoch / run.epochs
        self.schedule = Schedule(min(gates.start, freeze / 2), freeze, gates.temperature)
        self.weights = sgd(self.network.network_parameters(), run.settings)
        steps = max(1.0, (freeze - self.schedule.start) * run.epochs * run.train.steps)
        # The gates' loss is a mean over gates: with this rate, steering moves each logit by `travel` while they learn.
        rate = gates.travel * self.network.masks / (gates.steering * steps)
        self.gates = torch.optim.SGD(self.network.gate_parameters(), lr=rate)
        self.criterion = cross_entropy(run.settings)
        self._seen = self._opened = torch.zeros(())
        self._done = 0.0

    def optimizers(self) -> list[Optimizer]:
        """Weights by SGD, gates by plain SGD; both have their state in every checkpoint."""
        return [self.weights, self.gates]

    def before_step(self, done: float) -> None:
        """Set the learning rate, the gates' phase and their temperature."""
        training, self._done = self.run.settings.training, done
        set_rate(self.weights, training.gated_lr or training.lr, training.warmup, done)
        self.network.set_phase(self._phase(done))
        self.network.set_temperature(self.schedule.temperature(done))

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits [B, classes]."""
        with autocast(self.run.settings, self.run.device):
            logits = self.network(images)
            loss = self.criterion(logits, labels)
            if self.teacher is not None:
                loss = self._taught(loss, logits, images)
        if self._phase(self._done) == "learning":
            target = self.schedule.target(self._done)
            loss = loss + self.network.gate_loss(self.constraint, target, self.run.settings.gates)
            self._seen = self._seen + 1
            self._opened = self._opened + self.network.share().detach()
        return loss, logits

    def after_epoch(self, state: State) -> dict[str, Any]:
        """Freeze when it is time; record the cost of the network as its gates stand and how undecided they are."""
        record: dict[str, Any] = {}
        if state.epoch == self.freeze_epoch:
            record["freeze"] = state.notes["freeze"] = self._freeze()
        elif self._seen > 0:
            record["undecided"] = undecided(self._opened / self._seen)
        self._seen = self._opened = torch.zeros(())
        learning = self.schedule.progress(state.epoch / self.run.epochs) > 0
        opened = self.network.open().double() if learning else torch.ones_like(self.network.open()).double()
        cost = self.constraint.achieved(opened)
        tightest = max(cost, key=lambda name: cost[name] / self.constraint.asked[name])
        return record | {"cost": cost[tightest], "budget": self.constraint.asked[tightest], "costs": cost}

    def _phase(self, done: float) -> Phase:
        if done >= self.schedule.freeze - 1e-9:
            return "frozen"
        return "learning" if done >= self.schedule.start else "off"

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

    def _freeze(self) -> dict[str, Any]:
        """Fix the gates to the consensus of the training set within the budget; what that changed, in points."""
        run, settings = self.run, self.run.settings
        self.network.set_phase("learning")
        before = evaluate(self.network, run.validation) if run.validation else None
        share = consensus(self.network, run)
        knapsack = Knapsack(
            self.network.sites,
            self.constraint.to(torch.device("cpu")),
            self.network.utility(),
            (share >= 0.5).float(),
            align=settings.align or 1,
            min_width=settings.gates.min_width,
        )
        chosen = knapsack.solve()
        self.constraint.to(run.device)
        self.network.freeze(chosen)
        after = evaluate(self.network, run.validation) if run.validation else None
        return {
            "epoch": self.freeze_epoch,
            "undecided": undecided(share),
            "share": [round(value, 4) for value in share.tolist()],
            "changed": int((chosen != (share.cpu() >= 0.5)).sum()),
            "val_before": before,
            "val_after": after,
        }


def train_gated(run: Fit, constraint: Constraint, teacher: nn.Module | None, progress: Progress) -> State:
    """Train a gated network in place, to the end of its run; afterwards its gates are frozen.

    The state's note "freeze" holds the share of training samples that opened each gate and what freezing changed.
    """
    method = OnePass(run, constraint, teacher)
    state = fit(run, method, progress)
    method.network.set_phase("frozen")
    return state


def undecided(share: Tensor) -> float:
    """Share of gates whose samples disagree: UNDECIDED[0] < m < UNDECIDED[1], for m = `share` [G]."""
    low, high = UNDECIDED
    return float(((share > low) & (share < high)).float().mean())


@torch.no_grad()
def consensus(network: GatedNetwork, run: Fit) -> Tensor:
    """Share of training samples (un-augmented, evaluation mode) that open each gate, [G]."""
    network.eval()
    opened = torch.zeros(network.masks, device=run.device)
    for images, _ in run.train.plain():
        network(images)  # each gate notes the share of the batch that opens it
        opened += len(images) * network.share()
    return opened / len(run.train)
