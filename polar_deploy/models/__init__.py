"""Networks by name: the CIFAR ResNets, every classifier of torchvision, the user's own; and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polar_deploy.data.names import call_reference, is_reference, unknown
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.models.cifar_resnet import DEPTHS, CifarResNet
from polar_deploy.models.weights import load_weights, save_weights

__all__ = ["build", "known", "load_weights", "save_weights"]


def known() -> list[str]:
    """The names that `build` takes, beside "package.module:function"."""
    import torchvision

    return [*DEPTHS, *torchvision.models.list_models(module=torchvision.models)]


def build(name: str, classes: int, input_size: int) -> nn.Module:
    """The untrained network `name` for images float32 [B, 3, input_size, input_size], with logits [B, classes].

    resnet20, 32, 44, 56 and 110 are those for CIFAR; resnet18, 34, 50 … are torchvision's. The user's
    "package.module:function" is called with `classes=` alone.

    Raises:
        UsageError: there is no such network, or it cannot take images of that size.
        ContentError: the user's function failed, or what it returned is no such network.
    """
    if name in DEPTHS:
        return CifarResNet(DEPTHS[name], classes)
    if is_reference(name):
        return _own(name, classes, input_size)
    if name not in known():
        raise unknown("model", name, known())
    return _torchvision(name, classes, input_size)


def _torchvision(name: str, classes: int, input_size: int) -> nn.Module:
    import torchvision

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": input_size}
    elif name.startswith("maxvit_"):
        options = {"input_size": (input_size, input_size)}
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
        _trial(model, input_size)
    except Exception as error:  # each network fails on small images in its own way
        problem = f"{name} cannot be built for images of {input_size} pixels: {str(error).splitlines()[0]}"
        raise UsageError(problem, "choose another input_size, or resnet20 to resnet110 for small images") from error
    return model


def _own(reference: str, classes: int, input_size: int) -> nn.Module:
    model = call_reference(reference, classes=classes)
    if not isinstance(model, nn.Module):
        raise ContentError(f"'{reference}' returned a {type(model).__name__}", "return a torch.nn.Module")
    try:
        output = _trial(model, input_size)
    except Exception as error:
        problem = f"'{reference}' fails on images of {input_size} pixels: {type(error).__name__}: {error}"
        raise ContentError(problem, "correct its forward") from error
    shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != [2, classes]:
        problem = f"'{reference}' answers two images with {shape}, not with logits [2, {classes}]"
        raise ContentError(problem, "return one tensor of one logit a class")
    return model


def _trial(model: nn.Module, input_size: int) -> object:
    """The answer to two black images; the network's mode stays what it was."""
    training = model.training
    with torch.no_grad():
        output = model.eval()(torch.zeros(2, 3, input_size, input_size))
    model.train(training)
    return output
