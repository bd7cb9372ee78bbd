"""Gemm and MatMul with a constant matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.mixing import Mix, Mixing

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Floats, Step
    from polar_deploy.surgery.graph import Array


class Gemm(Mixing):
    """`alpha * x @ weight + beta * bias`, weight: [outputs, inputs] with transB, else [inputs, outputs]."""

    def read(self, step: Step) -> Mix:
        attrs = step.node.attrs
        if attrs.get("transA", 0):
            raise Wall("its input is transposed")
        weight = step.parameter(1, "weight")
        rows = weight if attrs.get("transB", 0) else weight.T
        alpha, beta = attrs.get("alpha", 1.0), attrs.get("beta", 1.0)
        bias = None
        if step.has(2):
            values = step.parameter(2, "bias").astype(np.float64)
            if values.ndim > 1 and values.size not in (1, values.shape[-1]):
                raise Wall("its bias differs from row to row")
            bias = beta * np.broadcast_to(values.reshape(-1), len(rows))[None]
        scaled = rows if alpha == 1 else rows * rows.dtype.type(alpha)
        return Mix(scaled[None, :, :, None], bias, padded=False)

    def write(self, step: Step, weight: Array | None, bias: Floats | None, groups: int) -> None:
        dtype = step.parameter(1, "weight").dtype
        if weight is not None:
            rows = weight[0, :, :, 0]
            step.graph.set_constant(step.node, 1, rows if step.node.attrs.get("transB", 0) else rows.T)
            _reset(step, "alpha")
        if bias is not None:
            step.graph.set_constant(step.node, 2, bias.astype(dtype))
            _reset(step, "beta")


def _reset(step: Step, name: str) -> None:
    if step.node.attrs.get(name, 1.0) != 1:
        step.graph.set_attribute(step.node, name, 1.0)


class MatMul(Mixing):
    """`x @ weight`, weight: [inputs, outputs]; channels on the last axis."""

    def read(self, step: Step) -> Mix:
        weight = step.parameter(1, "second factor")
        if weight.ndim != 2:
            raise Wall("its second factor is no matrix")
        return Mix(weight.T[None, :, :, None], None, padded=False, takes_bias=False)

    def write(self, step: Step, weight: Array | None, bias: Floats | None, groups: int) -> None:
        if weight is not None:
            step.graph.set_constant(step.node, 1, weight[0, :, :, 0].T)

    def input_axis(self, step: Step) -> int:
        return self.output_axis(step)

    def output_axis(self, step: Step) -> int:
        shape = step.graph.shape(step.node.inputs[0])
        if shape is None or len(shape) < 2:
            raise Wall("the rank of its input is not known")
        return len(shape) - 1


HANDLERS = {"Gemm": Gemm(), "MatMul": MatMul()}
