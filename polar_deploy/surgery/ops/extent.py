"""Shape and Size, and what those operators have in common that are told a shape by an input.

A tensor whose shape is read keeps its channels where its number of channels is used: unless an operator that is told a
shape puts a constant in place of it, or follows the size of that tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.facts import Link, Unsupported
from polar_deploy.surgery.operator import Operator, Retained
from polar_deploy.surgery.shape_origin import taken, trace

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Channels, Facts, Ints, Step
    from polar_deploy.surgery.ir import Node, Tensor
    from polar_deploy.surgery.shape_origin import Size

READ = "its shape is read"


@dataclass
class ShapeInput:
    """How an operator gets along with the input that tells it a shape.

    written: the constant that takes the place of shape arithmetic, before the cut; None: the input stays.
    followed: positions of the input that give the size of a tensor whose channels go with the output's.
    """

    written: Ints | None = None
    followed: frozenset[int] = frozenset()


ShapeInputT = TypeVar("ShapeInputT", bound=ShapeInput)


class ShapeDriven(Operator[ShapeInputT]):
    """Handler of an operator that is told a shape."""

    def shape_input_index(self, step: Step) -> int:
        """The input that tells the shape."""
        return 1

    def need(self, step: Step[ShapeInputT]) -> None:
        super().need(step)
        if step.plan.written is not None:
            step.replaced[self.shape_input_index(step)] = step.plan.written.astype(np.float64)

    def follow(self, step: Step, target: Channels, axis: int, size: Size) -> None:
        """The output's channels on `axis` go with those of the tensor whose size that axis has. Raises Unsupported."""
        other = None if size.extent is None else step.facts.of(size.extent.tensor)
        if other is None or size.extent is None or other.axes != (size.extent.axis,) or len(other) != len(target):
            raise Unsupported("its shape is computed")
        if target.axes != (axis,):
            raise Unsupported("its shape is computed, and its channels lie on several axes")
        numbers = every(len(target))
        step.ties.append(Link(other, target, numbers, numbers))


class Shape(Operator[tuple[int, ...]]):
    """Shape and Size: whoever uses the number of channels keeps the channels.

    The plan is the axes of the channels whose sizes are used: of heads by dimensions, heads may go if only the number
    of dimensions is.
    """

    def couple(self, step: Step[tuple[int, ...]]) -> None:
        """What comes out has no channels."""
        step.plan = ()

    def need(self, step: Step[tuple[int, ...]]) -> None:
        source = step.inputs[0]
        if source is None:
            return
        step.plan = tuple(axis for axis in source.axes if self._is_told(step, axis))
        if step.plan == source.axes:
            source.pinned[:] = True
        if step.plan:
            source.notes.append(step.note(READ))

    def _is_told(self, step: Step, axis: int) -> bool:
        """Whether the size of an axis reaches somebody who cannot do without it."""
        if step.node.op == "Size":
            return True
        rank = len(step.graph.shape(step.original[0]) or ())
        first, last, _ = slice(step.node.attrs.get("start", 0), step.node.attrs.get("end", rank)).indices(rank)
        return first <= axis < last and _is_used(step.facts, step.made[0], axis - first)

    def retain(self, step: Step[tuple[int, ...]]) -> list[Retained]:
        """The tensor must be there, with at least one channel, and as large as it was along what is used."""
        source = step.inputs[0]
        if source is None:
            return []
        wanted = source.kept.reshape(source.dims)
        if source.is_removed:
            wanted = np.arange(len(source)).reshape(source.dims) == 0
        along = tuple(source.axes.index(axis) for axis in step.plan)
        missing = wanted.any(axis=along, keepdims=True) & ~source.kept.reshape(source.dims)
        return [Retained(source, np.flatnonzero(missing), READ)] if missing.any() else []


def _is_used(facts: Facts, tensor: Tensor, position: int) -> bool:
    """Whether anybody needs the number at a position of a vector as it is before the cut."""
    pending, seen = [(tensor, position)], set()
    while pending:
        tensor, position = pending.pop()
        if (tensor.name, position) in seen:
            continue
        seen.add((tensor.name, position))
        if not facts.graph.is_private(tensor.name):
            return True
        for reader in tensor.outputs:
            for index in (index for index, given in enumerate(reader.inputs) if given is tensor):
                moved = _read(facts, reader, index, position)
                if moved is None:
                    return True
                pending.extend((reader.outputs[0], place) for place in moved)
    return False


def _read(facts: Facts, reader: Node, index: int, position: int) -> list[int] | None:
    """Where a number lies in what `reader` makes of it; None: it is needed as it is before the cut."""
    step = next((step for step in facts.steps if step.node is reader), None)
    if step is None or index in step.replaced or isinstance(step.handler, Shape):
        return []
    if isinstance(step.handler, ShapeDriven):
        assert isinstance(step.plan, ShapeInput)
        return [] if index == step.handler.shape_input_index(step) and position in step.plan.followed else None
    return _moved(facts, reader, index, position) if reader.domain in ("", "ai.onnx") else None


def _moved(facts: Facts, reader: Node, index: int, position: int) -> list[int] | None:
    """Where a number lies after an operator of shape arithmetic; None: it is computed with."""
    if reader.op == "Concat":
        lengths = [trace(facts, tensor) for tensor in reader.inputs[:index]]
        return None if None in lengths else [position + sum(len(length or ()) for length in lengths)]
    if reader.op in ("Gather", "Slice") and index == 0:
        sources = taken(facts, reader)
        return None if sources is None else [place for place, source in enumerate(sources) if source == position]
    shapes = [facts.graph.shape(tensor) for tensor in (reader.inputs[index], reader.outputs[0])]
    if any(shape is None or len(shape) > 1 for shape in shapes):
        return None
    if reader.op in ("Unsqueeze", "Squeeze", "Identity", "Cast", "Reshape") and index == 0:
        return [position]
    if reader.op == "Where" and index > 0 and shapes[0] == shapes[1]:
        return [position]
    if reader.op == "Equal":  # whether a size is -1: it is not, cut or not
        other = trace(facts, reader.inputs[1 - index]) or ()
        return [] if other and all(size.value is not None and size.value < 0 for size in other) else None
    return None


HANDLERS: dict[str, Operator] = {"Shape": Shape(), "Size": Shape()}
