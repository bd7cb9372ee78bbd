"""The full network: trained, or taken as given; the baseline of every comparison."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from polar_deploy.documents.training_log import Epoch
from polar_deploy.progress import Progress
from polar_deploy.tasks import Batch, Tensors
from polar_deploy.training.checkpoint import State
from polar_deploy.training.loop import TrainingJob, fit, set_rate, sgd


class Plain:
    """Ordinary training: the task's loss, SGD, warm-up and cosine."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.optimizer = sgd(job.network, job.settings)

    @property
    def network(self) -> nn.Module:
        """The run's."""
        return self.job.network

    def optimizers(self) -> list[Optimizer]:
        """The one optimizer."""
        return [self.optimizer]

    def before_step(self, done: float) -> None:
        """Set the learning rate."""
        training = self.job.settings.training
        set_rate(self.optimizer, training.lr, training.warmup, done)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensors]:
        """Loss and outputs."""
        with self.job.mixed.autocast():
            outputs = self.job.task.forward(self.job.network, batch.inputs)
        return self.job.task.loss(outputs, batch), outputs

    def after_step(self) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing besides weights and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def after_epoch(self, record: Epoch) -> Epoch:
        """What training takes: one pass forward and, twice as much, one backward."""
        return record.model_copy(update={"work": 3.0})


def train_full(job: TrainingJob, progress: Progress) -> State:
    """Train the full network in place; see `loop.fit`."""
    return fit(job, Plain(job), progress)
