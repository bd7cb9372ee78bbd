"""The training loop, shared by the full and the gated network."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polar_deploy.documents.training_log import Epoch
from polar_deploy.errors import ContentError, UsageError, first_line
from polar_deploy.gating import processes
from polar_deploy.progress import Progress
from polar_deploy.resolved import ResolvedSettings
from polar_deploy.tasks import Batch, Statistics, Task, Tensors
from polar_deploy.training import checkpoint
from polar_deploy.training.batches import Batches
from polar_deploy.training.checkpoint import State
from polar_deploy.training.energy import Meter
from polar_deploy.training.mixed import MixedPrecision
from polar_deploy.training.passes import Passes

VECTOR = 16  # float32 values in the widest vectors of x86: with fewer channels oneDNN has rests to care for


class Method(Protocol):
    """What is particular to one way of training; `done` is the share of the run that is over.

    `loss` is called for each pass of a step; `discard` after one that failed, before the step is made again.

    `after_epoch` adds what is particular to the record of an epoch: its `work` at least, in which a backward pass
    counts as two forward ones.

    `network` and `optimizers` may be others after a step, or after `load_state_dict`, than before.
    """

    @property
    def network(self) -> nn.Module: ...

    def optimizers(self) -> list[Optimizer]: ...

    def before_step(self, done: float) -> None: ...

    def loss(self, batch: Batch) -> tuple[Tensor, Tensors]: ...

    def after_step(self) -> None: ...

    def discard(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def after_epoch(self, record: Epoch) -> Epoch: ...


@dataclass(frozen=True)
class TrainingJob:
    """One training run: what it needs besides its method.

    Attributes:
        fresh: makes such a network anew, without gates and on the device, to measure steps with.
        on_epoch: is given the record of each epoch.
    """

    stage: str
    task: Task
    network: nn.Module
    train: Batches
    validation: Batches | None
    settings: ResolvedSettings
    epochs: int
    folder: Path
    key: str
    device: torch.device
    mixed: MixedPrecision
    fresh: Callable[[], nn.Module]
    on_epoch: Callable[[Epoch], None] | None = None


def fit(job: TrainingJob, method: Method, progress: Progress) -> State:
    """Train to the end, from the folder's checkpoint if there is one for `job.key`; of another it says so.

    Writes `checkpoint.safetensors` and `training.jsonl` after every epoch, so that a killed run goes on from the
    last whole epoch and, on CPU with the same number of threads, ends with the same weights as an unbroken one.

    Of several processes all call it; the first one reads and writes. The weights are those of one process, but for
    rounding and for what networks draw (dropout), so that it can go on with another number of processes.

    Raises:
        ContentError: the loss is not finite.
        UsageError: a batch has too few images to be split as asked, or something cannot be computed deterministically.
    """
    with repeatable(job.settings):
        return _fit(job, method, progress)


def _fit(job: TrainingJob, method: Method, progress: Progress) -> State:
    path, writes = job.folder / "checkpoint.safetensors", processes.is_first()
    passes = Passes(job, progress.note)
    state, tensors = processes.of_the_first(checkpoint.load(path, job.key) if writes else (State(), {}))
    if path.is_file() and not state.epoch:
        progress.note(f"{job.stage}: begins again: its checkpoint is damaged, or of other settings, data or training")
    if state.epoch:
        method.load_state_dict(state.method)
        checkpoint.restore(tensors, method.network, method.optimizers())
        if writes:
            Epoch.write_all(
                job.folder / "training.jsonl", state.records
            )  # the kill can have come between checkpoint and log
        job.mixed.bf16 = state.bf16
    elif job.mixed.bf16 is None:
        progress.note(f"{job.stage}: {job.mixed.settle(job.fresh(), job.task, next(job.train.epoch(0)))}")
    progress.stage(job.stage, total_epochs=job.epochs, done=state.epoch)
    meter = Meter(job.device, processors=processes.is_first_here())
    while state.epoch < job.epochs:
        started, waited = time.monotonic(), job.train.waited
        losses, score = _epoch(job, method, state.epoch, passes, progress)
        state.epoch += 1
        trained = Epoch(
            epoch=state.epoch,
            loss=round(losses, 5),
            train_score=None if score is None else round(score, 3),
            samples=job.train.samples_an_epoch,
            bf16=bool(job.mixed.bf16),
        )
        trained = method.after_epoch(trained)
        validated, joules = evaluate(job.task, method.network, job.validation), _of_all(meter.read())
        spent = {"joules": round(joules, 1)} if joules is not None else {}
        spent |= {"data_seconds": round(job.train.waited - waited, 2)} if job.train.reads else {}
        spent["seconds"] = round(time.monotonic() - started, 2)
        record = trained.model_copy(update={"val_score": validated, **spent})
        state.records.append(record)
        state.method = method.state_dict()
        if writes:
            checkpoint.save(path, job.key, state, method.network, method.optimizers())
            Epoch.write_all(job.folder / "training.jsonl", state.records)
        if job.on_epoch is not None:
            job.on_epoch(record)
        progress.epoch(
            epoch=state.epoch,
            loss=losses,
            score=_told(job.task, score, validated),
            cost=record.cost,
            budget=record.budget,
            undecided=record.undecided,
        )
    return state


def _epoch(
    job: TrainingJob, method: Method, epoch: int, passes: Passes, progress: Progress
) -> tuple[float, float | None]:
    """One pass over the training set; mean loss, and mean of what the task monitors."""
    method.network.train()
    # Dropout and stochastic depth, the same after a resume; each process has samples of its own.
    torch.manual_seed(job.settings.seed * 1_000_003 + epoch + processes.rank() * 1_000_000_007)
    total = torch.zeros(2, device=job.device)
    steps = job.train.steps
    for step, batch in enumerate(job.train.epoch(epoch)):
        method.before_step((epoch + step / steps) / job.epochs)
        total += passes.backward(method, batch)
        processes.average_gradients(method.network.parameters())
        for optimizer in method.optimizers():
            optimizer.step()
        method.after_step()
        progress.step((step + 1) / steps)
    mean_loss, score = (processes.total(total) / steps).tolist()
    if not math.isfinite(mean_loss):
        raise ContentError(
            f"the loss is {mean_loss} in epoch {epoch + 1} of {job.epochs} of stage {job.stage}",
            "lower training.lr (or training.gated_lr), or check the weights and the normalisation",
        )
    return mean_loss, None if job.task.monitor is None else score


def _of_all(joules: float | None) -> float | None:
    """What all processes counted; None where this one counts nothing."""
    counted = float(processes.total(torch.tensor([joules or 0.0], dtype=torch.float64)))
    return None if joules is None else counted


def sgd(network: nn.Module, settings: ResolvedSettings) -> torch.optim.SGD:
    """SGD with Nesterov momentum and the settings' weight decay; the rate is set before each step."""
    training = settings.training
    return torch.optim.SGD(
        network.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        nesterov=training.momentum > 0,
        weight_decay=training.weight_decay,
    )


def set_rate(optimizer: Optimizer, peak: float, warmup: float, done: float) -> None:
    """Linear warm-up over the first `warmup` of the run, then a cosine to zero; `done` in [0, 1]."""
    if done < warmup:
        rate = peak * (done + 1e-3) / (warmup + 1e-3)
    else:
        rate = peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def evaluate(task: Task, network: nn.Module, batches: Batches | None, most: int | None = None) -> float | None:
    """The task's score in evaluation mode, un-augmented, FP32, of the first `most` samples, or all.

    None without samples, or without a metric.
    """
    if task.metric is None or batches is None:
        return None
    was_training = network.training
    network.eval()
    statistics = processes.gathered(_statistics(task, network, batches, most))
    network.train(was_training)
    return task.metric.of_all(np.concatenate([part for parts in statistics for part in parts]))


def _statistics(task: Task, network: nn.Module, batches: Batches, most: int | None) -> list[Statistics]:
    """Of this process's samples, of the first `most`; in smaller batches where memory is short."""
    assert task.metric is not None
    size = batches.evaluation_batch
    while True:
        found = []
        try:
            for batch in batches.plain(size, most):
                outputs, targets = _arrays(task.forward(network, batch.inputs)), _arrays(batch.targets)
                found.append(task.metric.statistics(outputs, targets))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            return found
        size = -(-size // 2)
        torch.cuda.empty_cache()


def _arrays(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _told(task: Task, trained: float | None, validated: float | None) -> str | None:
    """The score, short enough for a line with all the rest."""
    score = trained if validated is None else validated
    if score is None or task.metric is None:
        return None
    return f"{'train' if validated is None else 'val'} {task.metric.shown(score).replace(' %', '%')}"


@contextmanager
def repeatable(settings: ResolvedSettings) -> Iterator[None]:
    """Inside, with `training.deterministic`, the same comes out each time on the same device, at a cost on GPUs.

    Raises:
        UsageError: something has no deterministic way to be computed.
    """
    if not settings.training.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what = f"--deterministic: {first_line(error)}"
        raise UsageError(what, "leave --deterministic out, or do without that operation") from error
    finally:
        torch.use_deterministic_algorithms(before)


def choose_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(network: nn.Module, settings: ResolvedSettings, device: torch.device) -> nn.Module:
    """Move a network to the device, in channels_last memory where asked."""
    if settings.training.threads:
        torch.set_num_threads(settings.training.threads)
    layout = torch.channels_last if settings.training.channels_last else torch.contiguous_format
    network = network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if device.type == "cpu":
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and _is_pointwise_strided(module) and module.in_channels < VECTOR:
                for parameter in module.parameters():
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
                module.register_forward_pre_hook(_contiguous)
    return network


def _is_pointwise_strided(module: nn.Conv2d) -> bool:
    return module.kernel_size == (1, 1) and max(module.stride) > 1


def _contiguous(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In channels_last memory oneDNN writes past the end of this layer's gradient (uxlfoundation/oneDNN#6035).

    Copied, as the weights are, and not asked for `contiguous`: of a side of 1 both layouts are, by other strides.
    """
    return tuple(each.clone(memory_format=torch.contiguous_format) for each in args)
