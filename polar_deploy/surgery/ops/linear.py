"""Gemm and MatMul with a constant matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery import heads
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.mixing import Mixing, MixingWeights, Plan, Trim, per_filter, write_bias
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.quantization import Weight, is_stored, weight

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Channels, Facts, Step
    from polar_deploy.surgery.ir import Node

LEFT, RIGHT = 0, 1


class Gemm(Mixing):
    """`alpha * x @ weight + beta * bias`, weight: [outputs, inputs] with transB, else [inputs, outputs]."""

    bias_at = 2

    def read(self, step: Step) -> MixingWeights:
        attrs = step.node.attrs
        if attrs.get("transA", 0):
            raise Unsupported("its input is transposed")
        matrix, bias = self.matrix(step), self._bias(step)
        zero, scale = per_filter(matrix, 1)
        rows = matrix.values if attrs.get("transB", 0) else matrix.values.T
        plain = bias is None or bias.plain
        offset = None
        if bias is not None:
            offset = attrs.get("beta", 1.0) * np.broadcast_to(bias.numbers.ravel(), (1, len(rows)))
        return MixingWeights(
            weight=rows[None, :, :, None],
            bias=offset,
            zero=zero,
            scale=attrs.get("alpha", 1.0) * scale,
            always_inside=np.ones(1, bool),
            sometimes_padded=np.full(1, matrix.unsure is not None),
            padded_by=matrix.unsure or "",
            bias_locked_because=None if plain else "a quantised bias",
            plain=plain and matrix.plain,
        )

    def write(self, step: Step, trim: Trim) -> None:
        matrix, bias = self.matrix(step), self._bias(step)
        values = None if trim.weight is None else trim.weight[0, :, :, 0]
        if values is not None and not step.node.attrs.get("transB", 0):
            values = values.T
        matrix.write(step.graph, values, trim.kept)
        write_bias(step, self.bias_at, bias, trim, self.bias_type(step))
        if trim.bias is not None and (bias is None or bias.plain) and step.node.attrs.get("beta", 1.0) != 1:
            step.graph.set_attribute(step.node, "beta", 1.0)  # the new bias has taken it up

    def matrix(self, step: Step) -> Weight:
        """The weight as stored."""
        return weight(step, 1, "weight", axis=0 if step.node.attrs.get("transB", 0) else 1)

    def _bias(self, step: Step) -> Weight | None:
        bias = weight(step, self.bias_at, "bias", axis=-1) if step.has(self.bias_at) else None
        if bias is not None and bias.values.size not in (1, *bias.values.shape[-1:]):
            raise Unsupported("its bias differs from row to row")
        if bias is not None and bias.values.size == 1 and not bias.plain:
            raise Unsupported("its quantised bias is one number for all")
        return bias


class MatMul(Mixing):
    """`x @ weight`, weight: [inputs, outputs], or `weight @ x`, weight: [outputs, inputs], with or without more axes.

    What adds a bias to it is an Add with a constant, where nobody else reads the product.
    """

    bias_input = None
    factors = (0, 1)  # which inputs are multiplied, on the left and on the right
    sides: tuple[int, ...] = (RIGHT, LEFT)  # where weights may be
    pairs = True  # whether both factors may be computed
    across = True  # whether channels on an axis that is not multiplied are followed

    def is_transposed(self, step: Step) -> bool:
        """Whether the weight on the right is stored as [outputs, inputs]."""
        return False

    def alpha(self, step: Step) -> float:
        """A factor on the product."""
        return 1.0

    def is_turned(self, step: Step) -> tuple[bool, bool]:
        """Whether the last two axes of the factors are exchanged before they are multiplied."""
        return False, False

    def labels(self, step: Step) -> tuple[heads.Labels, heads.Labels, heads.Labels]:
        """Labels of the axes of both factors and of the result, see `heads`."""
        batch = tuple(range(len(step.result_shape()) - 2))
        left, right = (
            (*batch, *(reversed(pair) if turned else pair))
            for turned, pair in zip(self.is_turned(step), (("row", "sum"), ("sum", "column")), strict=True)
        )
        return left, right, (*batch, "row", "column")

    def _is_by_column(self, step: Step) -> bool:
        """Whether the outputs are the last axis of the weight."""
        return self.side(step) == RIGHT and not self.is_transposed(step)

    def side(self, step: Step) -> int:
        """Where the weight is."""
        for side in self.sides:
            if is_stored(step, self.factors[side]):
                return side
        raise Unsupported(heads.NOT_FOLLOWED)

    def matrix(self, step: Step) -> Weight:
        """The weight as stored."""
        return weight(step, self.factors[self.side(step)], "weight", axis=-1 if self._is_by_column(step) else -2)

    def data(self, step: Step) -> int:
        return self.factors[1 - self.side(step)]

    def input_axis(self, step: Step) -> int:
        return step.rank(self.data(step)) - (1 if self.side(step) == RIGHT else 2)

    def output_axis(self, step: Step) -> int:
        shape = step.graph.shape(step.made[0])
        return len(shape or ()) - (1 if self.side(step) == RIGHT else 2)

    def couple(self, step: Step[Plan]) -> None:
        if self.pairs and not any(is_stored(step, factor) for factor in self.factors):
            heads.follow(step, *self.labels(step))
            return
        source = step.inputs[self.data(step)]
        elsewhere = source is not None and self.input_axis(step) not in source.axes
        if self.across and source is not None and elsewhere and not _stuck(step.facts, source).all():
            step.handler = ACROSS
            ACROSS.couple(step)
        else:
            super().couple(step)

    def read(self, step: Step) -> MixingWeights:
        matrix = self.matrix(step)
        if matrix.values.ndim < 2 or step.rank(self.data(step)) < 2:
            raise Unsupported("one of its factors is a vector")
        stack = matrix.values.reshape(-1, *matrix.values.shape[-2:])
        inside = np.full(len(stack), len(stack) == 1 and matrix.unsure is None)
        zero, scale = per_filter(matrix, 1)
        return MixingWeights(
            weight=stack.transpose((2, 1, 0) if self._is_by_column(step) else (1, 2, 0))[None],
            bias=None,
            zero=zero,
            scale=self.alpha(step) * scale,
            always_inside=inside,
            sometimes_padded=~inside,
            padded_by=matrix.unsure or "several matrices",
            bias_locked_because=None if self.adder(step) else "an operator without a bias",
            plain=matrix.plain,
        )

    def write(self, step: Step, trim: Trim) -> None:
        matrix, values = self.matrix(step), None
        if trim.weight is not None:
            stack = trim.weight[0].transpose((2, 1, 0) if self._is_by_column(step) else (2, 0, 1))
            values = stack.reshape(*matrix.values.shape[:-2], *stack.shape[1:])
        matrix.write(step.graph, values, trim.kept)
        found = self.adder(step)
        if trim.bias is not None and found is not None:
            node, index, old = found
            moved = trim.bias if self.side(step) == RIGHT else trim.bias[:, None]
            step.graph.set_constant(node, index, (old.astype(np.float64) + moved).astype(old.dtype))

    def adder(self, step: Step) -> tuple[Node, int, Array] | None:
        """The Add behind the product, which of its inputs is a constant along the outputs alone, and that constant."""
        product = step.node.outputs[0]
        node = product.outputs[0] if len(product.outputs) == 1 and step.graph.is_private(product.name) else None
        if node is None or node.op != "Add" or node.domain not in ("", "ai.onnx"):
            return None
        index = 0 if node.inputs[1] is product else 1
        values, shape = step.graph.constant(node, index), step.graph.shape(product)
        if values is None or shape is None:
            return None
        axis = self.output_axis(step) - len(shape)
        along = values.shape[axis] if values.ndim >= -axis else 1
        return (node, index, values) if values.size == along in (1, shape[axis]) else None


class MatMulOtherAxis(Operator):
    """MatMul along another axis than the channels': each channel by itself, and zero stays zero."""

    def couple(self, step: Step) -> None:
        data, matrix = MATMUL.data(step), MATMUL.matrix(step)
        shift = MATMUL.output_axis(step) - MATMUL.input_axis(step)
        target = step.carry(tuple(axis + shift for axis in step.require(data).axes), data)
        if not matrix.plain and any(_own_axis(step, axis, matrix.values) is not None for axis in target.axes):
            raise Unsupported("every channel has a quantised matrix of its own")

    def constants(self, step: Step) -> None:
        super().constants(step)
        target = step.output
        target.constant &= target.value == 0
        target.nonnegative = target.constant.copy()

    def need(self, step: Step) -> None:
        super().need(step)
        source = step.require(MATMUL.data(step))
        if (constant := source.needed & source.constant & (source.value != 0)).any():
            reason = f"the constant {source.value[constant][0]:.6g} meets a product along another axis"
            source.notes.append(step.note(reason, constant))

    def slice(self, step: Step) -> None:
        """Where every channel has a matrix of its own, they go with the channels."""
        index, target = MATMUL.factors[MATMUL.side(step)], step.output
        for axis in target.axes if not target.kept.all() else ():
            values = step.constant(index)
            own = None if values is None else _own_axis(step, axis, values)
            if values is not None and own is not None:
                step.graph.set_constant(step.node, index, values.take(target.keep(axis), axis=own))


def _own_axis(step: Step, axis: int, values: Array) -> int | None:
    """The axis of a stack of matrices that runs along an axis of the output; None where it has no extent there."""
    own = axis - len(step.graph.shape(step.made[0]) or ()) + values.ndim
    return own if 0 <= own < values.ndim - 2 and values.shape[own] > 1 else None


MATMUL, ACROSS = MatMul(), MatMulOtherAxis()
HANDLERS: dict[str, Operator] = {"Gemm": Gemm(), "MatMul": MATMUL}


def _stuck(facts: Facts, channels: Channels) -> Bools:
    """Which channels stay whatever is closed, because of what is coupled with them so far."""
    stuck = {id(one): one.pinned.copy() for one in facts.everything()}
    for step in facts.steps:
        for link in step.links:
            if link.coupled:
                stuck[id(link.target)][link.into] |= stuck[id(link.source)][link.out_of]
    found: Bools = stuck[id(channels)]
    return found
