"""Networks by name: the CIFAR ResNets, every classifier of torchvision, the user's own; and their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from polar_deploy.data.names import call_reference, is_reference, unknown
from polar_deploy.errors import ContentError, UsageError, first_line
from polar_deploy.models.cifar_resnet import DEPTHS, CifarResNet
from polar_deploy.models.weights import load_weights, save_weights
from polar_deploy.tensors import TensorSpec

if TYPE_CHECKING:
    from polar_deploy.tasks import Task

__all__ = ["build", "known", "load_weights", "save_weights", "zeros"]

_SAMPLES = 2  # of a trial


def known() -> list[str]:
    """The names that `build` takes, beside "package.module:function"."""
    import torchvision

    return [*DEPTHS, *torchvision.models.list_models(module=torchvision.models)]


def build(name: str, task: Task) -> nn.Module:
    """The untrained network `name` for what the task takes and gives.

    resnet20, 32, 44, 56 and 110 are those for CIFAR; resnet18, 34, 50 … are torchvision's. These classify. The user's
    "package.module:function" is for any task; it is called with `classes=`, or with nothing where the task has none.

    Raises:
        UsageError: there is no such network, or it is for another task or other images.
        ContentError: the user's function failed, or what it returned is no such network.
    """
    if is_reference(name):
        return _own(name, task)
    if task.name != "classification":
        known_ones = "a classifier" if name in known() else "no network that is known"
        problem = f"{name} is {known_ones}, and the task is {task.name}"
        raise UsageError(problem, "give a network of your own, as package.module:function")
    assert task.classes is not None
    if name in DEPTHS:
        return CifarResNet(DEPTHS[name], task.classes)
    if name not in known():
        raise unknown("model", name, known())
    return _torchvision(name, task, task.classes)


def _torchvision(name: str, task: Task, classes: int) -> nn.Module:
    import torchvision

    size = next(iter(task.inputs.values())).shape[-1]
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (size, size)}
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
        _trial(model, task)
    except Exception as error:  # each network fails on small images in its own way
        problem = f"{name} cannot be built for images of {size} pixels: {first_line(error)}"
        raise UsageError(problem, "choose another input_size, or resnet20 to resnet110 for small images") from error
    return model


def _own(reference: str, task: Task) -> nn.Module:
    arguments = {} if task.classes is None else {"classes": task.classes}
    model = call_reference(reference, {"classes": "num_classes"}, **arguments)
    if not isinstance(model, nn.Module):
        raise ContentError(f"'{reference}' returned a {type(model).__name__}", "return a torch.nn.Module")
    task.only_outputs(model)
    try:
        result = _trial(model, task)
    except Exception as error:
        given = ", ".join(f"{name} {spec}" for name, spec in task.inputs.items())
        problem = f"'{reference}' fails on {given}: {type(error).__name__}: {error}"
        raise ContentError(problem, "correct its forward") from error
    specs = {}
    for name, value in task.named(result).items():
        wanted = task.outputs[name]
        found = TensorSpec(tuple(value.shape[1:]), str(value.dtype).removeprefix("torch.")) if _batched(value) else None
        if found is None or not wanted.takes(found.shape) or found.dtype != wanted.dtype:
            answer = found if found is not None else list(getattr(value, "shape", [])) or type(value).__name__
            problem = f"'{reference}' answers {_SAMPLES} samples with {answer} for {name}, not with {wanted}"
            raise ContentError(problem, "correct its forward, or the outputs of the task")
        specs[name] = found
    if task.require is not None:
        task.require(specs)
    return model


def _batched(value: object) -> bool:
    """Whether an output is a tensor with one part for each sample."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == _SAMPLES


def zeros(task: Task) -> dict[str, torch.Tensor]:
    """Two samples of zeros, as the task's inputs are, by name."""
    return {name: torch.from_numpy(np.zeros((_SAMPLES, *spec.sizes), spec.dtype)) for name, spec in task.inputs.items()}


def _trial(model: nn.Module, task: Task) -> object:
    """What forward returns for samples of zeros; the network's mode stays what it was."""
    training = model.training
    with torch.no_grad():
        result: object = model.eval()(*zeros(task).values())
    model.train(training)
    return result
