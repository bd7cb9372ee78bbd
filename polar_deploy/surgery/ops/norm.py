"""BatchNormalization with stored statistics: an affine function a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Floats, Step

SCALE, OFFSET, MEAN, VARIANCE = 1, 2, 3, 4


class BatchNormalization(Operator):
    """`(x - mean) / sqrt(variance + epsilon) * scale + offset`, every parameter a vector over axis 1."""

    def couple(self, step: Step) -> None:
        if step.node.attrs.get("training_mode", 0) or len(step.node.outputs) > 1:
            raise Wall("it is in training mode")
        if not step.node.attrs.get("spatial", 1):
            raise Wall("it has a parameter for every position")
        names = ("scale", "offset", "mean", "variance")
        scale, offset, mean, variance = (
            step.parameter(i, name).astype(np.float64) for i, name in enumerate(names, start=1)
        )
        if step.require().axes != (1,):
            raise Wall("the channels of its input are not on axis 1")
        factor = scale / np.sqrt(variance + step.node.attrs.get("epsilon", 1e-5))
        step.memo = (factor, offset - mean * factor)
        step.carry()

    def constants(self, step: Step) -> None:
        source, target = step.require(), step.output
        factor, shift = step.memo
        if step.facts.settled:  # the cut makes a channel that nobody needs zero
            target.constant, target.value, target.nonnegative = ~target.needed, np.zeros(len(target)), ~target.needed
            return
        target.constant = source.constant | (factor == 0)
        target.value = np.where(target.constant, source.value * factor + shift, 0.0)
        target.nonnegative = target.constant & (target.value >= 0)

    def need(self, step: Step) -> None:
        step.require().needed |= step.output.needed & (step.memo[0] != 0)

    def slice(self, step: Step) -> None:
        target = step.output
        unneeded = target.kept & ~target.needed
        for index in (SCALE, OFFSET, MEAN, VARIANCE):
            values = step.parameter(index, "parameter")
            cleared = np.where(unneeded, values.dtype.type(0), values) if index in (SCALE, OFFSET) else values
            if not (target.kept.all() and np.array_equal(cleared, values)):
                step.graph.set_constant(step.node, index, cleared[target.kept])

    def scale_output(self, step: Step, factors: Floats) -> bool:
        for index in (SCALE, OFFSET):
            values = step.parameter(index, "parameter")
            step.graph.set_constant(step.node, index, values * factors.astype(values.dtype))
        return True


HANDLERS = {"BatchNormalization": BatchNormalization()}
