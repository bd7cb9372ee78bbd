"""Networks whose widths are chosen, as ONNX files that runtimes and compilers take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from polar_deploy import models
from polar_deploy.export import Example
from polar_deploy.gating.analysis import analyse
from polar_deploy.surgery import detached, rounds
from polar_deploy.surgery.choices import Choices
from polar_deploy.tasks.classification import classifier


def choices_of(name: str, pixels: int, classes: int) -> Choices:
    """What can be chosen of a network that comes with the package."""
    torch.manual_seed(0)
    network = models.build(name, classifier(classes, pixels)).eval()
    return analyse(network, Example.of(torch.zeros(2, 3, pixels, pixels))).choices


def write(choices: Choices, opened: np.ndarray, path: Path) -> None:
    """Write the network without the gates that are not open, bool [gates], with random weights."""
    cut = rounds.operate(choices.with_masks(choices.detached, opened))[-1].model
    onnx.save(_filled(detached.to_model(cut)), path)


def _filled(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with weights: the choices know shapes alone, and what lies in their place may be no number."""
    draw = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            sizes = tuple(tensor.dims)
            weights = draw.standard_normal(sizes) / np.prod(sizes[1:]) ** 0.5 if len(sizes) > 1 else np.ones(sizes)
            tensor.CopyFrom(numpy_helper.from_array(weights.astype(np.float32), tensor.name))
    return model
