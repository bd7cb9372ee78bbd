"""Conv and ConvTranspose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.mixing import Mix, Mixing

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Floats, Step
    from polar_deploy.surgery.graph import Array


class Conv(Mixing):
    """Convolution of any rank, plain, grouped or depthwise. weight: [filters, inputs a group, *kernel]."""

    def read(self, step: Step) -> Mix:
        weight = step.parameter(1, "weight")
        groups = _groups(step, weight.shape[0])
        blocks = weight.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        return Mix(blocks, _bias(step, groups), padded=_is_padded(step.node.attrs))

    def write(self, step: Step, weight: Array | None, bias: Floats | None, groups: int) -> None:
        if weight is not None:
            kernel = step.parameter(1, "weight").shape[2:]
            step.graph.set_constant(step.node, 1, weight.reshape(-1, weight.shape[2], *kernel))
        _write_bias(step, bias, groups)


class ConvTranspose(Mixing):
    """Transposed convolution. weight: [inputs, filters a group, *kernel]. Strides leave holes: never constant."""

    def read(self, step: Step) -> Mix:
        weight = step.parameter(1, "weight")
        groups = _groups(step, weight.shape[0])
        blocks = weight.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        return Mix(blocks.swapaxes(1, 2), _bias(step, groups), padded=True)

    def write(self, step: Step, weight: Array | None, bias: Floats | None, groups: int) -> None:
        if weight is not None:
            kernel = step.parameter(1, "weight").shape[2:]
            step.graph.set_constant(step.node, 1, weight.swapaxes(1, 2).reshape(-1, weight.shape[1], *kernel))
        _write_bias(step, bias, groups)


def _groups(step: Step, channels: int) -> int:
    groups: int = step.node.attrs.get("group", 1)
    if groups < 1 or channels % groups:
        raise Wall(f"{channels} channels do not divide into {groups} groups")
    return groups


def _bias(step: Step, groups: int) -> Floats | None:
    if not step.has(2):
        return None
    return step.parameter(2, "bias").astype(np.float64).reshape(groups, -1)


def _write_bias(step: Step, bias: Floats | None, groups: int) -> None:
    if bias is not None:
        step.graph.set_constant(step.node, 2, bias.astype(step.parameter(1, "weight").dtype))
    if groups != step.node.attrs.get("group", 1):
        step.graph.set_attribute(step.node, "group", groups)


def _is_padded(attrs: dict[str, Any]) -> bool:
    automatic = attrs.get("auto_pad", "NOTSET")
    return any(attrs.get("pads", ())) if automatic == "NOTSET" else automatic != "VALID"


HANDLERS = {"Conv": Conv(), "ConvTranspose": ConvTranspose()}
