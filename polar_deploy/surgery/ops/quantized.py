"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear. Layers that compute with integers are in `integer`.

Between quantising and dequantising, facts are about the integers: a closed channel holds the zero point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.dtype_limits import fits
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.quantization import INPUT, SCALE, ZERO, Scheme, doubt, quantize, scheme, smallest

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Floats, Step
    from polar_deploy.surgery.ir import Node, Tensor


class Quantization(Operator[Scheme]):
    """QuantizeLinear or DequantizeLinear with one scale for all, or one for every index of an axis.

    The channels of a constant lie on the one axis that it has an extent along. Other constants have none: layers cut
    their weights themselves.
    """

    def couple(self, step: Step[Scheme]) -> None:
        values, shape = step.constant(INPUT), step.graph.shape(step.original[INPUT]) or ()
        along = [axis for axis, size in enumerate(shape) if size != 1]
        if values is not None and len(along) != 1:
            return
        axis = step.node.attrs.get("axis", 1) % max(len(shape), 1)
        step.plan = scheme(step.graph, step.node, SCALE, ZERO, axis, self.stored(step))
        if values is None:
            step.carry()
        else:
            step.create((along[0],))

    def stored(self, step: Step) -> np.dtype[Any]:
        """The type of the integers."""
        raise NotImplementedError

    def convert(self, step: Step, value: Floats, scale: Floats, zero: Array) -> tuple[Floats, Bools]:
        """The operator on constants, and where every runtime agrees. All: [variants, channels]."""
        raise NotImplementedError

    def keeps_sign(self, step: Step[Scheme], source: Bools) -> Bools:
        """[channels] where nothing below zero comes out."""
        raise NotImplementedError

    def constants(self, step: Step[Scheme]) -> None:
        for target in step.outputs:
            source, values = step.inputs[INPUT], step.constant(INPUT)
            value = source.value if source is not None else np.asarray(values, np.float64).ravel()
            scale, zero = (_met(target, step.plan.axis, part) for part in (step.plan.scale, step.plan.zero))
            results, certain = self.convert(step, value, scale, zero)
            target.constant = certain.all(axis=0) & (results == results[0]).all(axis=0)
            target.constant &= source.constant if source is not None else True
            target.value = np.where(target.constant, results[0], 0.0)
            signs = self.keeps_sign(step, source.nonnegative if source is not None else value >= 0)
            target.nonnegative = np.where(target.constant, target.value >= 0, signs)

    def slice(self, step: Step[Scheme]) -> None:
        for target in step.outputs:
            if target.kept.all():
                continue
            values, axis = step.constant(INPUT), step.plan.axis
            if values is not None:
                (along,) = target.axes
                step.graph.set_constant(step.node, INPUT, values.take(target.keep(along), axis=along))
            if axis is None or axis not in target.axes:
                continue
            for index in step.plan.vectors:
                step.graph.set_constant(step.node, index, step.parameter(index, "scale")[target.keep(axis)])


class Quantize(Quantization):
    """`saturate(round(x / scale) + zero point)`."""

    def stored(self, step: Step) -> np.dtype[Any]:
        return step.graph.dtype(step.made[0])

    def convert(self, step: Step, value: Floats, scale: Floats, zero: Array) -> tuple[Floats, Bools]:
        values = step.constant(INPUT)
        dtype = step.graph.dtype(step.original[INPUT]) if values is None else values.dtype
        return quantize(value, scale, zero, doubt(dtype))

    def keeps_sign(self, step: Step[Scheme], source: Bools) -> Bools:
        upward = bool((step.plan.offset >= 0).all() and (step.plan.scale > 0).all())
        return np.asarray(source & upward | (smallest(self.stored(step)) >= 0))


class Dequantize(Quantization):
    """`(x - zero point) * scale`."""

    def stored(self, step: Step) -> np.dtype[Any]:
        values = step.constant(INPUT)
        return step.graph.dtype(step.original[INPUT]) if values is None else values.dtype

    def convert(self, step: Step, value: Floats, scale: Floats, zero: Array) -> tuple[Floats, Bools]:
        numbers = (value - zero.astype(np.float64)) * scale
        return numbers, fits(numbers, step.graph.dtype(step.made[0]))

    def keeps_sign(self, step: Step[Scheme], source: Bools) -> Bools:
        found = step.plan
        above = smallest(self.stored(step)) >= found.offset.max()  # no integer is below the zero point
        return np.asarray((source & bool((found.offset <= 0).all()) | above) & bool((found.scale > 0).all()))


class DynamicQuantize(Operator):
    """DynamicQuantizeLinear before integer layers that take its zero point along.

    Its range always holds zero, so channels that are zero do not change it, and all others do. What they are stored as
    is not known: facts about its result count from the zero point, and nobody else may read it.
    """

    def couple(self, step: Step) -> None:
        result, _, zero = step.node.outputs
        known = all(_reads(reader, result, zero) for reader in result.outputs)
        if not known or not step.graph.is_private(result.name):
            raise Unsupported("its zero point is not known beforehand")
        step.carry()

    def constants(self, step: Step) -> None:
        source, target = step.require(), step.output
        target.constant = source.constant & (source.value == 0)
        target.nonnegative = target.constant.copy()

    def need(self, step: Step) -> None:
        source = step.require()
        counts = ~(source.constant & (source.value == 0))
        source.needed |= counts
        source.notes.append(step.note("its range depends on every channel that is not zero", counts))

    def must_keep_values(self, step: Step) -> list[tuple[Channels, Bools]]:
        """Zeros that stay must stay zero."""
        source = step.require()
        which = source.kept & ~source.needed
        return [(source, which)] if which.any() else []


def _met(target: Channels, axis: int | None, parameters: Array) -> Array:
    """[variants, channels] the parameters that each channel meets: one, or all where they lie across the channels."""
    if axis is None or axis not in target.axes or parameters.size == 1:
        return np.repeat(parameters[:, None], len(target), axis=1)
    shape = [1] * len(target.dims)
    shape[target.axes.index(axis)] = -1
    return np.broadcast_to(parameters.reshape(shape), target.dims).reshape(1, -1)


def _reads(reader: Node, result: Tensor, zero: Tensor) -> bool:
    """Whether `reader` is an integer layer that reads a tensor as data and knows its zero point."""
    tensors = reader.inputs
    layer = reader.op in ("ConvInteger", "MatMulInteger") and len(tensors) > 2
    return layer and tensors[0] is result and tensors[2] is zero


HANDLERS: dict[str, Operator] = {
    "QuantizeLinear": Quantize(),
    "DequantizeLinear": Dequantize(),
    "DynamicQuantizeLinear": DynamicQuantize(),
}
MICROSOFT: dict[str, Operator] = {  # what ONNX Runtime's quantiser writes for types of 16 and 4 bits
    "QuantizeLinear": HANDLERS["QuantizeLinear"],
    "DequantizeLinear": HANDLERS["DequantizeLinear"],
}
