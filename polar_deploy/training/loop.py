"""The training loop, shared by the full and the gated network."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from polar_deploy.config import ResolvedSettings
from polar_deploy.errors import ContentError
from polar_deploy.progress import Progress
from polar_deploy.training import checkpoint
from polar_deploy.training.batches import Batches
from polar_deploy.training.energy import Meter
from polar_deploy.workspace import atomic_path


class Method(Protocol):
    """What is particular to one way of training; `done` is the share of the run that is over.

    What `after_epoch` records has "work": multiply-accumulates for each image, forward and backward, in forward passes
    of the full network. A backward pass counts as two forward ones.

    `network` and `optimizers` may be others after a step, or after `load_state_dict`, than before.
    """

    @property
    def network(self) -> nn.Module: ...

    def optimizers(self) -> list[Optimizer]: ...

    def before_step(self, done: float) -> None: ...

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...

    def after_step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def after_epoch(self, state: checkpoint.State) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TrainingJob:
    """One training run: what it needs besides its method."""

    stage: str
    network: nn.Module
    train: Batches
    validation: Batches | None
    settings: ResolvedSettings
    epochs: int
    folder: Path
    key: str
    device: torch.device


def fit(job: TrainingJob, method: Method, progress: Progress) -> checkpoint.State:
    """Train to the end, from the folder's checkpoint if there is one for `job.key`; of another it says so.

    Writes `checkpoint.safetensors` and `training.jsonl` after every epoch, so that a killed run goes on from the
    last whole epoch and, on CPU with the same number of threads, ends with the same weights as an unbroken one.

    Raises:
        ContentError: the loss is not finite.
    """
    path = job.folder / "checkpoint.safetensors"
    state, tensors = checkpoint.load(path, job.key)
    if path.is_file() and not state.epoch:
        progress.note(f"{job.stage}: begins again: its checkpoint is damaged, or of other settings, data or training")
    if state.epoch:
        method.load_state_dict(state.method)
        checkpoint.restore(tensors, method.network, method.optimizers())
        write_log(job.folder / "training.jsonl", state.records)  # the kill can have come between checkpoint and log
    progress.stage(job.stage, total_epochs=job.epochs, done=state.epoch)
    meter = Meter(job.device)
    while state.epoch < job.epochs:
        started, waited = time.monotonic(), job.train.waited
        losses, accuracy = _epoch(job, method, state.epoch, progress)
        state.epoch += 1
        record: dict[str, Any] = {"epoch": state.epoch, "loss": round(losses, 5), "train_accuracy": round(accuracy, 3)}
        record["images"] = job.train.images_an_epoch
        record |= method.after_epoch(state)
        record["val_accuracy"] = evaluate(method.network, job.validation) if job.validation else None
        joules = meter.read()
        record |= {"data_seconds": round(job.train.waited - waited, 2)} if job.train.reads else {}
        record |= {"joules": round(joules, 1)} if joules is not None else {}
        state.records.append(record | {"seconds": round(time.monotonic() - started, 2)})
        state.method = method.state_dict()
        checkpoint.save(path, job.key, state, method.network, method.optimizers())
        write_log(job.folder / "training.jsonl", state.records)
        progress.epoch(
            epoch=state.epoch,
            loss=losses,
            accuracy=(accuracy if record["val_accuracy"] is None else record["val_accuracy"]) / 100,
            cost=record.get("cost"),
            budget=record.get("budget"),
            undecided=record.get("undecided"),
        )
    return state


def _epoch(job: TrainingJob, method: Method, epoch: int, progress: Progress) -> tuple[float, float]:
    """One pass over the training set; mean loss and training accuracy in percent."""
    method.network.train()
    torch.manual_seed(job.settings.seed * 1_000_003 + epoch)  # dropout and stochastic depth, the same after a resume
    total = torch.zeros(2, device=job.device)
    steps = job.train.steps
    for step, (images, labels) in enumerate(job.train.epoch(epoch)):
        method.before_step((epoch + step / steps) / job.epochs)
        loss, logits = method.loss(images, labels)
        for optimizer in method.optimizers():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in method.optimizers():
            optimizer.step()
        method.after_step()
        total += torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
        progress.step((step + 1) / steps)
    mean_loss, accuracy = (total / steps).tolist()
    if not math.isfinite(mean_loss):
        raise ContentError(
            f"the loss is {mean_loss} in epoch {epoch + 1} of {job.epochs} of stage {job.stage}",
            "lower training.lr (or training.gated_lr), or check the weights and the normalisation",
        )
    return mean_loss, 100 * accuracy


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


def cross_entropy(settings: ResolvedSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of logits [B, classes] against labels [B] with the settings' label smoothing."""
    smoothing = settings.training.label_smoothing
    return lambda logits, labels: F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def autocast(settings: ResolvedSettings, device: torch.device) -> torch.autocast:
    """Mixed precision as the settings ask: bf16 where the device multiplies matrices in it, else FP32."""
    amp = settings.training.amp
    wanted = amp == "bf16" or (amp == "auto" and _multiplies_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster there: on a CPU it takes AMX; with AVX512-BF16 alone a step takes 1.3 times as long."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(able.get("amx_bf16"))


@torch.no_grad()
def evaluate(network: nn.Module, batches: Batches, most: int | None = None) -> float:
    """Top-1 accuracy in percent, in evaluation mode, un-augmented, FP32; of about the first `most` images, or all."""
    was_training = network.training
    network.eval()
    right = seen = 0
    for images, labels in batches.plain():
        right += int((network(images).argmax(1) == labels).sum())
        seen += len(labels)
        if most is not None and seen >= most:
            break
    network.train(was_training)
    return 100 * right / seen


def write_log(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object a line, the whole file anew: a resumed run leaves no line twice."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def choose_device() -> torch.device:
    """The GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(network: nn.Module, settings: ResolvedSettings, device: torch.device) -> nn.Module:
    """Move a network to the device, in channels_last memory where asked."""
    if settings.training.threads:
        torch.set_num_threads(settings.training.threads)
    layout = torch.channels_last if settings.training.channels_last else torch.contiguous_format
    return network.to(device=device, memory_format=layout)  # type: ignore[call-overload, no-any-return]
