"""Pooling and reductions over space: each channel by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polar_deploy.surgery.facts import Wall
from polar_deploy.surgery.operator import Operator

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Step


class Pool(Operator):
    """MaxPool, AveragePool and the global ones: a constant comes out as it goes in, unless zeros are counted in."""

    def couple(self, step: Step) -> None:
        if step.require().axes != (1,):
            raise Wall("the channels of its input are not on axis 1")
        if len(step.node.outputs) > 1 and step.node.outputs[1].outputs:
            raise Wall("its indices are used")
        step.carry()

    def constants(self, step: Step) -> None:
        super().constants(step)
        attrs = step.node.attrs
        padded = any(attrs.get("pads", ())) or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        if padded and attrs.get("count_include_pad", 0):
            step.output.constant &= step.output.value == 0


class Reduce(Operator):
    """ReduceMean, ReduceMax, ReduceMin and ReduceSum over axes other than the channels'."""

    def couple(self, step: Step) -> None:
        source = step.require()
        rank = len(step.graph.shape(step.original[0]) or ())
        given = step.parameter(1, "list of axes").tolist() if step.has(1) else step.node.attrs.get("axes")
        if given is None and step.node.attrs.get("noop_with_empty_axes", 0):
            given = []
        axes = {axis % rank for axis in (range(rank) if given is None else given)}
        if axes.intersection(source.axes):
            raise Wall("it reduces over the channels")
        if step.node.attrs.get("keepdims", 1):
            step.carry()
        else:
            step.carry(tuple(axis - sum(gone < axis for gone in axes) for axis in source.axes))

    def constants(self, step: Step) -> None:
        super().constants(step)
        if step.node.op == "ReduceSum":
            step.output.constant &= step.output.value == 0


HANDLERS: dict[str, Operator] = {
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), Pool()),
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"), Reduce()),
}
