"""One-pass training with gates: ordinary training, in which `Gates` watch, close little by little, and are fixed.

epochs      0 ...... close_from ......... freeze_at ...... end
gates       all open | closing            | fixed
network     whole, with masks             | cut: what is closed is no longer computed
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from polar_deploy.documents.training_log import Epoch, LoggedFreeze
from polar_deploy.errors import ContentError, first_line
from polar_deploy.gating import processes
from polar_deploy.gating.gates import Gates
from polar_deploy.progress import Progress
from polar_deploy.tasks import Batch, Task, Tensors
from polar_deploy.tensors import count, take
from polar_deploy.training.batch_norm import of_whole_batch
from polar_deploy.training.checkpoint import State
from polar_deploy.training.loop import TrainingJob, evaluate, fit, prepare, set_rate, sgd

NORM_BATCHES = 20  # that statistics are estimated from
FREEZE_SAMPLES = 2000  # of the validation set, that show what the freeze changed
SHARE_BINS = 10  # of the histogram of shares, from 0 to 1
UNDECIDED = (0.05, 0.95)  # a gate counts as undecided while the share of samples that open it lies between


class OnePass:
    """Training of a network with gates under a budget, with the full network as teacher where the settings say so.

    Args:
        job: the training run; its network carries the gates.
        gates: of that network.
        teacher: the full network, or None.
        on_progress: is told what a user should know.
    """

    def __init__(
        self,
        job: TrainingJob,
        gates: Gates,
        teacher: nn.Module | None,
        on_progress: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.job, self.gates, self.on_progress = job, gates, on_progress
        self.teacher = teacher.eval() if teacher is not None else None
        self.small: nn.Module | None = None  # the cut network, once gates are fixed
        self.weights = sgd(job.network, job.settings)
        self._work = 0.0  # of the epoch's steps, see `loop.Method`
        self._share: Tensor | None = None  # of the last epoch's samples that open each gate, summed over steps
        self._steps = 0
        self._freeze: LoggedFreeze | None = None  # what fixing the gates changed

    @property
    def network(self) -> nn.Module:
        """The one that is trained: the run's with its gates, and when they are fixed what is left of it."""
        return self.small if self.small is not None else self.job.network

    def optimizers(self) -> list[Optimizer]:
        """The weights' own; gates move by themselves."""
        return [self.weights]

    def before_step(self, done: float) -> None:
        """Set the learning rate."""
        training = self.job.settings.training
        set_rate(self.weights, training.gated_lr, training.warmup, done)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensors]:
        """Loss and outputs."""
        task = self.job.task
        with self.job.mixed.autocast():
            outputs = task.forward(self.network, batch.inputs)
            loss = task.loss(outputs, batch)
            if self.teacher is not None:
                loss = self._taught(loss, outputs, batch)
        return loss + self.gates.loss(), outputs

    def after_step(self) -> None:
        """Let the gates learn; when they are fixed, note what samples say and what that changes, and cut."""
        left = self.gates.cost()["macs"] if self.small is not None else 1.0
        asked = self.job.settings.training.distill_share if self.teacher is not None else 0.0
        self._work += 3 * left + asked
        share = self.gates.share
        self._share = share if self._share is None else self._share + share
        self._steps += 1
        freezes = self.gates.freezes_next
        before = self._validated(self.job.network) if freezes else None
        self.gates.step()
        if freezes:
            after = self._validated(self.job.network)
            self.cut()
            self._estimate_norms()
            estimated = self._validated(self.network)
            share = processes.mean(share)
            self._freeze = LoggedFreeze(
                epoch=0,  # for `after_epoch` to tell
                undecided=undecided(share),
                share=[round(value, 4) for value in share.tolist()],
                val_before=before,
                val_after=after,
                val_estimated=estimated,
                cut=self.small is not None,
            )

    def discard(self) -> None:
        """The gates forget what they saw of the step."""
        self.gates.discard()

    def after_epoch(self, record: Epoch) -> Epoch:
        """What the gates leave of the network, how undecided they are, once what the freeze changed, and what training
        took.
        """
        added: dict[str, object] = {}
        if self._freeze is not None:
            added["freeze"] = self._freeze.model_copy(update={"epoch": record.epoch})
            self._freeze = None
        elif self.gates.phase == "learning" and self._share is not None:
            share = processes.mean(self._share / self._steps)
            added["undecided"] = undecided(share)
            added["shares"] = torch.histc(share, SHARE_BINS, 0, 1).int().tolist()
        gates = self.gates.state()
        added["open"] = [*gates.widths, *map(int, gates.blocks)]
        added["work"] = round(self._work / self._steps, 4)
        self._share, self._steps, self._work = None, 0, 0.0
        cost = self.gates.cost()
        tightest = max(cost, key=lambda name: cost[name] / self.gates.budget.get(name, 2.0))
        asked = self.gates.budget
        left = {"cost": cost[tightest], "budget": asked[tightest], "costs": {name: cost[name] for name in asked}}
        return record.model_copy(update=added | left)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the gates, and of the whole network where a cut one is trained."""
        whole = self.job.network.state_dict() if self.small is not None else None
        return {"gates": self.gates.state_dict(), "whole": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.gates.load_state_dict(state["gates"])
        if state["whole"] is not None:
            self.job.network.load_state_dict(state["whole"])
            self.cut()

    def finish(self) -> None:
        """Put what the cut network has learned into its places in the run's."""
        if self.small is not None:
            self.gates.merge(self.small)

    def cut(self) -> None:
        """Go on with what is left of the network, where it can be cut as a module; else with masks."""
        try:
            small = self.gates.cut()
        except ContentError as error:
            self.on_progress(f"trained with masks to the end: {first_line(error)}")
            return
        self.small = prepare(small, self.job.settings, self.job.device)
        self.weights = sgd(self.small, self.job.settings)

    def _validated(self, network: nn.Module) -> float | None:
        """The score on the beginning of the validation set, where there is one."""
        return evaluate(self.job.task, network, self.job.validation, FREEZE_SAMPLES)

    def _estimate_norms(self) -> None:
        """Statistics of BatchNorms anew, of training images: the closed channels moved them all."""
        inputs = (batch.inputs for batch in islice(self.job.train.epoch(0), NORM_BATCHES))
        frozen = [each for each in self.network.modules() if isinstance(each, _BatchNorm) and not each.training]
        if not frozen:  # who keeps them fixed wants them fixed
            with self.job.mixed.autocast(), of_whole_batch():
                update_bn(inputs, _ByName(self.network, self.job.task))

    def _taught(self, loss: Tensor, outputs: Tensors, batch: Batch) -> Tensor:
        """The loss, and what the teacher says of the same samples.

        It looks at the first `distill_share` of the batch only, whose order is random: a cut network's step is so
        cheap that the teacher's forward pass would be a third of it.
        """
        task, training, samples = self.job.task, self.job.settings.training, count(batch.inputs)
        assert self.teacher is not None
        assert task.distill is not None
        seen = math.ceil(training.distill_share * samples)
        with torch.no_grad():
            wanted = task.forward(self.teacher, take(batch.inputs, slice(seen)))
        weight = training.distill * seen / samples
        return (1 - weight) * loss + weight * task.distill(take(outputs, slice(seen)), wanted)


class _ByName(nn.Module):
    """A network as `update_bn` calls it, with all inputs in one."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self.task = network, task
        self.training = network.training

    def forward(self, inputs: Tensors) -> Tensors:
        """The outputs."""
        return self.task.forward(self.network, inputs)


def train_gated(job: TrainingJob, gates: Gates, teacher: nn.Module | None, progress: Progress) -> State:
    """Train a network with gates in place, to the end of its run; afterwards its gates are frozen.

    The state's note "freeze" holds the share of samples that opened each gate and what freezing changed.
    """
    method = OnePass(job, gates, teacher, progress.note)
    state = fit(job, method, progress)
    method.finish()
    return state


def undecided(share: Tensor) -> float:
    """Share of gates whose samples disagree: UNDECIDED[0] < m < UNDECIDED[1], for m = `share` [G]."""
    low, high = UNDECIDED
    return float(((share > low) & (share < high)).float().mean())
