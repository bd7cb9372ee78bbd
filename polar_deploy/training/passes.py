"""How a step's gradients are made: in one pass forward and backward, or in several where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polar_deploy.errors import UsageError
from polar_deploy.gating import processes
from polar_deploy.tasks import Batch
from polar_deploy.tensors import count
from polar_deploy.training.batch_norm import of_whole_batch

if TYPE_CHECKING:
    from polar_deploy.training.loop import Method, TrainingJob


class Passes:
    """The forward and backward passes that a step is made in: as many as the settings ask for, and twice as many
    whenever the device has not the memory for it.

    BatchNorm sees the images of one pass, so that its statistics change with the number of passes, and nothing else.

    Args:
        job: the training run.
        tell: is told that there are more passes.
    """

    def __init__(self, job: TrainingJob, tell: Callable[[str], None]) -> None:
        self.job, self.tell = job, tell
        self.count = job.settings.training.accumulate
        self._most = job.train.batch_size // job.train.processes  # the smallest share of a process
        if self.count > self._most:
            raise UsageError(
                f"stage {job.stage}: a step has {job.train.batch_size} samples, for {job.train.processes} process(es) "
                f"with {self.count} passes each",
                "raise training.batch_size, or lower training.accumulate or the number of processes",
            )

    def backward(self, method: Method, batch: Batch) -> Tensor:
        """Leave the gradients of this process's share of a step; its share of mean loss and of what is monitored, [2].

        Raises:
            torch.OutOfMemoryError: it cannot be split further; or there are several processes: the others would wait.
        """
        while True:
            try:
                return self._try(method, batch)
            except torch.OutOfMemoryError:
                if 2 * self.count > self._most or processes.are_several():
                    raise
            self.count *= 2  # outside of the handler, which holds the tensors of the pass that failed
            method.discard()
            torch.cuda.empty_cache()
            size = -(-self.job.train.batch_size // self.count)
            self.tell(f"{self.job.stage}: out of memory; goes on with {size} samples in a pass, {self.count} a step")

    def _try(self, method: Method, batch: Batch) -> Tensor:
        for optimizer in method.optimizers():
            optimizer.zero_grad(set_to_none=True)
        told, monitor = torch.zeros(2, device=self.job.device), self.job.task.monitor
        for part in _split(batch, self.count):
            with of_whole_batch():
                loss, outputs = method.loss(part)
            share = count(part.inputs) / self.job.train.batch_size
            (loss * share * self.job.train.processes).backward()  # type: ignore[no-untyped-call]  # gradients are averaged
            with torch.no_grad():
                monitored = loss.new_zeros(()) if monitor is None else monitor(outputs, part)
                told += share * torch.stack([loss.detach(), monitored])
        return told


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in so many parts."""
    split = [{name: each.tensor_split(parts) for name, each in tensors.items()} for tensors in batch]
    for index in range(parts):
        yield Batch(*({name: each[index] for name, each in tensors.items()} for tensors in split))
