"""Split: each output takes a part of the channels along an axis; along another one, every output has all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.ops.slicing import along
from polar_deploy.surgery.shape_origin import whole_numbers, write_numbers

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Step


class Split(Operator[list[int] | None]):
    """Split with sizes (an attribute before opset 13, an input since) or into equal parts (num_outputs since 18).

    The plan is a list of sizes, an entry an output; None where it splits along another axis than that of the channels.
    """

    def couple(self, step: Step[list[int] | None]) -> None:
        source = step.require()
        axis, numbers = self._axis(step), every(len(source))
        if axis not in source.axes:
            for index, tensor in enumerate(step.made):
                if tensor.name:
                    step.link(source, step.create(source.axes, index), numbers, numbers)
            return
        width = source.dims[source.axes.index(axis)]
        step.plan = sizes = self._sizes(step, width)
        if len(sizes) != len(step.made) or sum(sizes) != width:
            raise ValueError(f"it splits {width} channels into {sizes}")
        ends = np.cumsum(sizes)
        for index, (tensor, size, end) in enumerate(zip(step.made, sizes, ends, strict=True)):
            if tensor.name and size:
                target = step.create(source.axes, index)
                step.link(source, target, along(source, axis, np.arange(end - size, end)), every(len(target)))

    def _axis(self, step: Step) -> int:
        axis: int = step.node.attrs.get("axis", 0) % step.rank()
        return axis

    def _sizes(self, step: Step, width: int) -> list[int]:
        if step.has(1):
            sizes = whole_numbers(step, 1)
            if sizes is None:
                raise Unsupported("its sizes are computed")
            return sizes
        return list(step.node.attrs["split"]) if "split" in step.node.attrs else _equal(width, len(step.made))

    def need(self, step: Step[list[int] | None]) -> None:
        super().need(step)
        if step.plan is not None and step.has(1) and step.constant(1) is None:
            step.replaced[1] = np.array(step.plan, np.float64)

    def slice(self, step: Step[list[int] | None]) -> None:
        """A part that is gone as a whole is read by nobody: its output goes. So does a Split of one part."""
        source, node = step.require(), step.node
        if step.plan is None or (source.kept.all() and not step.replaced):
            return
        parts = np.arange(len(step.plan)).repeat(step.plan)[source.keep(self._axis(step))]
        sizes = np.bincount(parts, minlength=len(step.plan)).tolist()
        for index in reversed(range(len(sizes))):
            if step.plan[index] and not sizes[index]:
                step.graph.drop_output(node, index)
                del sizes[index]
        if len(sizes) == 1 and step.graph.bypass(node):
            return
        self._write(step, sizes)

    def _write(self, step: Step, sizes: list[int]) -> None:
        graph, node = step.graph, step.node
        told = step.has(1) or "split" in node.attrs
        if not told and sizes == _equal(sum(sizes), len(sizes)):
            if "num_outputs" in node.attrs:
                graph.set_attribute(node, "num_outputs", len(sizes))
        elif graph.opset < 13:
            graph.set_attribute(node, "split", sizes)
        else:
            graph.drop_attribute(node, "num_outputs")
            write_numbers(step, 1, sizes)


def _equal(width: int, parts: int) -> list[int]:
    """Sizes of that many parts: as equal as can be, the last one may be smaller."""
    size = -(-width // parts)
    return [*[size] * (parts - 1), width - size * (parts - 1)]


HANDLERS: dict[str, Operator] = {"Split": Split()}
