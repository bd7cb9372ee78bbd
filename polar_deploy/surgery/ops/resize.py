"""Operators that change height and width: Resize, Upsample, DepthToSpace, SpaceToDepth, CenterCropPad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.operator import Operator
from polar_deploy.surgery.ops.extent import ShapeDriven, ShapeInput
from polar_deploy.surgery.ops.shape import Moving
from polar_deploy.surgery.shape_origin import Size, is_fixed, trace, whole_numbers, write_numbers

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Channels, Ints, Step

ROI, SCALES, SIZES = 1, 2, 3  # inputs of Resize since opset 11; before, and of Upsample, input 1 are the scales


@dataclass
class ResizeInput(ShapeInput):
    """Of a Resize. axes: those that `written` is about, where it is not about all that the sizes were."""

    axes: tuple[int, ...] | None = None


class Resize(ShapeDriven[ResizeInput]):
    """Resize and Upsample of other axes than the channels'."""

    def shape_input_index(self, step: Step) -> int:
        return SIZES

    def couple(self, step: Step[ResizeInput]) -> None:
        source, axes = step.require(), _axes(step)
        step.carry()
        step.plan = ResizeInput()
        for axis in set(source.axes).intersection(axes):
            at = axes.index(axis)
            if _mode(step, "coordinate_transformation_mode") == "tf_crop_and_resize":
                corners = _numbers(step, ROI, 2 * len(axes))
                if (corners[at].value, corners[at + len(axes)].value) != (0, 1):
                    raise Unsupported("it crops the channels")
            if _is_given(step, SIZES):
                self._obey(step, axis, at, axes)
            elif self._scale(step, at, len(axes)) != 1:
                raise Unsupported("it resizes the channels")

    def _scale(self, step: Step, at: int, count: int) -> float | None:
        if "scales" in step.node.attrs:
            return float(step.node.attrs["scales"][at])
        before = step.node.op == "Upsample" or step.graph.opset < 11
        return _numbers(step, ROI if before else SCALES, count)[at].value

    def _obey(self, step: Step[ResizeInput], axis: int, at: int, axes: list[int]) -> None:
        """Sizes that say how many channels there are, too."""
        if _mode(step, "keep_aspect_ratio_policy", "stretch") != "stretch":
            raise Unsupported("it keeps a ratio of sizes that the channels are one of")
        if step.constant(SIZES) is not None:
            return
        sizes = _numbers(step, SIZES, len(axes))
        whole = whole_numbers(step, SIZES)
        if whole is not None:
            step.plan.written = np.array(whole, np.int64)
        elif sizes[at].extent is not None:
            self.follow(step, step.output, axis, sizes[at])
            step.plan.followed |= {at}
        else:
            self._spare(step, dict(zip(axes, sizes, strict=True)))

    def _spare(self, step: Step[ResizeInput], sizes: dict[int, Size]) -> None:
        """Tells the sizes of those axes only that change, by a constant."""
        before, after = step.graph.shape(step.original[0]) or (), step.graph.shape(step.made[0]) or ()
        changed = [axis for axis, dim in enumerate(after) if dim is None or dim != before[axis]]
        fixed = is_fixed(step.graph)
        wanted = [
            dim for axis in changed if isinstance(dim := after[axis], int) and (fixed or sizes[axis].value == dim)
        ]
        crops = _mode(step, "coordinate_transformation_mode") == "tf_crop_and_resize"
        if step.graph.opset < 18 or crops or not changed or len(wanted) < len(changed):
            raise Unsupported("its sizes are computed")
        step.plan.written, step.plan.axes = np.array(wanted, np.int64), tuple(changed)

    def constants(self, step: Step[ResizeInput]) -> None:
        super().constants(step)
        target, attrs = step.output, step.node.attrs
        if _mode(step, "coordinate_transformation_mode") == "tf_crop_and_resize":
            outside = attrs.get("extrapolation_value", 0.0)
            target.constant &= target.value == outside
            target.nonnegative &= outside >= 0
        if _mode(step, "mode") == "cubic":
            target.nonnegative &= target.constant

    def slice(self, step: Step[ResizeInput]) -> None:
        target, plan = step.output, step.plan
        if plan.axes is not None and plan.written is not None:
            step.graph.set_constant(step.node, SIZES, plan.written)
            step.graph.set_attribute(step.node, "axes", list(plan.axes))
            return
        asked = step.constant(SIZES) if plan.written is None else plan.written
        if asked is None or not asked.size or (plan.written is None and target.kept.all()):
            return
        new, axes = asked.copy(), _axes(step)
        for axis in set(target.axes).intersection(axes):
            new[axes.index(axis)] = len(target.keep(axis))
        step.graph.set_constant(step.node, SIZES, new)


def _axes(step: Step) -> list[int]:
    """The axes that sizes, scales and corners are told for."""
    rank = step.rank()
    return [axis % rank for axis in step.node.attrs.get("axes", range(rank))]


def _mode(step: Step, name: str, default: str = "") -> str:
    mode: str = step.node.attrs.get(name, default)
    return mode


def _is_given(step: Step, index: int) -> bool:
    """Whether an optional input is there; in opset 11, an empty constant may stand for one that is not."""
    return step.has(index) and step.graph.shape(step.original[index]) != (0,)


def _numbers(step: Step, index: int, count: int) -> list[Size]:
    """As many numbers as an input has to hold."""
    sizes = trace(step.facts, step.original[index]) if step.has(index) else None
    return [Size()] * count if sizes is None or len(sizes) != count else sizes


class DepthToSpace(Moving):
    """DepthToSpace: the blocksize² channels behind one go together."""

    def couple(self, step: Step) -> None:
        source, target = _opened(step)
        step.link(source, target, every(len(source)), _owners(step, len(source), len(target)))


class SpaceToDepth(Operator):
    """SpaceToDepth: all blocksize² copies of a channel go with it."""

    def couple(self, step: Step) -> None:
        source, target = _opened(step)
        step.link(source, target, _owners(step, len(target), len(source)), every(len(target)))


def _opened(step: Step) -> tuple[Channels, Channels]:
    """Channels of input and output, both on axis 1."""
    source = step.require()
    if source.axes != (1,):
        raise Unsupported("the channels of its input are not on axis 1")
    return source, step.create((1,))


def _owners(step: Step, many: int, few: int) -> Ints:
    """Which of the `few` channels each of the `many` belongs to."""
    depth_first = step.node.attrs.get("mode", "DCR") == "DCR"
    return every(many) % few if depth_first else every(many) // step.node.attrs["blocksize"] ** 2


class CenterCropPad(Operator[dict[int, int]]):
    """CenterCropPad of other axes than the channels'; what it adds is zero."""

    def couple(self, step: Step[dict[int, int]]) -> None:
        source, axes = step.require(), _axes(step)
        step.carry()
        step.plan = {axis: axes.index(axis) for axis in source.axes if axis in axes}
        if step.plan and step.constant(1) is None:
            raise Unsupported("its sizes are computed")

    def constants(self, step: Step[dict[int, int]]) -> None:
        super().constants(step)
        before, after = step.graph.shape(step.original[0]) or (), step.graph.shape(step.made[0]) or ()
        crops = all(
            isinstance(a, int) and isinstance(b, int) and b <= a for a, b in zip(before[1:], after[1:], strict=True)
        )
        if not (crops and before[0] == after[0]):
            step.output.constant &= step.output.value == 0

    def slice(self, step: Step[dict[int, int]]) -> None:
        target = step.output
        sizes = whole_numbers(step, 1) if step.plan and not target.kept.all() else None
        if sizes is not None:
            for axis, at in step.plan.items():
                sizes[at] = len(target.keep(axis))
            write_numbers(step, 1, sizes)


HANDLERS: dict[str, Operator] = {
    **dict.fromkeys(("Resize", "Upsample"), Resize()),
    "DepthToSpace": DepthToSpace(),
    "SpaceToDepth": SpaceToDepth(),
    "CenterCropPad": CenterCropPad(),
}
