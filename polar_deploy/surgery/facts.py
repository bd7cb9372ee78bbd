"""Facts first: which channels are constant, which are needed, which can only go together.

A tensor's *channels* are the indices of one of its axes (of two, in the middle of a channel shuffle). Facts about them
are arrays with one entry a channel. Operators state them through their handler (`polar_deploy.surgery.ops`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Generic

import numpy as np
import numpy.typing as npt

from polar_deploy.surgery.arrays import all_of, any_of, every, yes
from polar_deploy.surgery.detached import Array
from polar_deploy.surgery.graph import Graph
from polar_deploy.surgery.ir import Node, Tensor
from polar_deploy.surgery.validation import NotUnderstoodError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import TypeVar

    from polar_deploy.surgery.operator import Operator
    from polar_deploy.surgery.sizes import Shape

    PlanT_co = TypeVar("PlanT_co", covariant=True, default=object)
else:
    from typing import TypeVar  # whose defaults need Python 3.13

    PlanT_co = TypeVar("PlanT_co", covariant=True)

MAX_CHANNELS = 1 << 22  # of one tensor; the largest networks have thousands, a flattened picture a million
LIKE = 1 << 12  # shapes that are kept in mind
OLDEST_OPSET = 7  # before, broadcasting had attributes of its own

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Unsupported(Exception):
    """A handler cannot follow channels through this node; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Note:
    """Why channels stay: at which node, and the reason in words."""

    node: str
    operator: str
    reason: str
    channels: Bools | None = None  # None: all of the tensor's


@dataclass(eq=False, slots=True)
class Channels:
    """What is known about the channels of one tensor.

    A needed channel holds the same values after the cut. One that is kept and not needed may hold any finite numbers:
    nothing that is needed depends on them.
    """

    tensor: str
    producer: str
    axes: tuple[int, ...]
    dims: tuple[int, ...]
    first: int  # number of the first channel among all channels of the graph
    size: int = field(init=False)  # how many there are
    constant: Bools = field(init=False)  # the channel holds one and the same number everywhere, for every input
    value: Floats = field(init=False)  # that number
    nonnegative: Bools = field(init=False)
    needed: Bools = field(init=False)
    pinned: Bools = field(init=False)  # must keep its place
    kept: Bools = field(init=False)  # what the cut leaves
    was_constant: bool = field(init=False)  # the whole tensor, as it was given
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = self.size = math.prod(self.dims)
        self.constant, self.nonnegative, self.needed, self.pinned = np.zeros((4, size), bool)
        self.kept = yes(size)  # until `Facts.keep`
        self.value = np.zeros(size)

    def __len__(self) -> int:
        return self.size

    @property
    def is_removed(self) -> bool:
        """Whether the cut leaves nothing of the tensor."""
        return not any_of(self.kept)

    def keep(self, axis: int) -> Ints:
        """Indices along `axis` (one of `axes`) that the cut leaves."""
        position = self.axes.index(axis)
        others = tuple(i for i in range(len(self.dims)) if i != position)
        return np.flatnonzero(self.kept.reshape(self.dims).any(axis=others))

    def block(self) -> Bools:
        """[channels] the smallest block, the same indices along every axis, that all kept channels are in."""
        inside = np.ones(self.dims, bool)
        for position, axis in enumerate(self.axes):
            along = np.zeros(self.dims[position], bool)
            along[self.keep(axis)] = True
            inside &= along.reshape([-1 if at == position else 1 for at in range(len(self.dims))])
        return np.asarray(inside.ravel())

    def pin(self, note: Note) -> None:
        """All channels stay and are needed."""
        self.pinned[:] = self.needed[:] = True
        self.notes.append(note)


@dataclass(eq=False, slots=True)
class Link:
    """Channel `into[i]` of `target` comes from channel `out_of[i]` of `source`.

    Coupled channels can only go together; others are broadcast (one source channel, many targets).
    """

    source: Channels
    target: Channels
    out_of: Ints
    into: Ints
    coupled: bool = True
    is_whole: bool = field(init=False)  # whether the channels of both tensors correspond one by one, see `every`

    def __post_init__(self) -> None:
        self.is_whole = self.out_of is self.into and self.source.size == self.out_of.size == self.target.size


@dataclass(eq=False)
class Step(Generic[PlanT_co]):
    """One node with the facts about its inputs and outputs: what handlers work on.

    plan: what the handler found out when it coupled channels, for the phases after that; None: nothing.
    output: channels of the first output, where it has any.
    outputs: of all outputs that have any.
    """

    node: Node
    facts: Facts
    handler: Operator
    links: list[Link] = field(default_factory=list)
    ties: list[Link] = field(default_factory=list)  # channels that go together, none made of the other
    plan: PlanT_co = None  # type: ignore[assignment]
    replaced: dict[int, Floats] = field(default_factory=dict)  # inputs that become constants: values a channel
    output: Channels = field(init=False, repr=False)
    outputs: list[Channels] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.original = list(self.node.inputs)  # the tensors read before any cut
        self.made = list(self.node.outputs)
        self.inputs = [self.facts.of(tensor) for tensor in self.node.inputs]
        self.graph: Graph = self.facts.graph

    @property
    def label(self) -> str:
        return self.graph.label(self.node)

    def require(self, index: int = 0) -> Channels:
        """Channels of an input that the handler cannot do without."""
        channels = self.inputs[index]
        if channels is None:
            raise Unsupported("the channels of its input are not known")
        return channels

    def along(self, index: int, axis: int) -> Channels | None:
        """Channels of an input that lie on `axis` alone; None where nothing is known about those."""
        channels = self.inputs[index]
        return channels if channels is not None and channels.axes == (axis,) else None

    def rank(self, index: int = 0) -> int:
        """The rank of an input. Raises Unsupported."""
        shape = self.graph.shape(self.original[index])
        if shape is None:
            raise Unsupported("the rank of its input is not known")
        return len(shape)

    def result_shape(self) -> Shape:
        """The shape of the first output. Raises Unsupported."""
        shape = self.graph.shape(self.made[0])
        if shape is None:
            raise Unsupported("its shape is not known")
        return shape

    def constant(self, index: int) -> Array | None:
        """Value of an input as it stands; None where it is absent or computed."""
        return self.graph.constant(self.node, index)

    def parameter(self, index: int, what: str) -> Array:
        """Value of an input that has to be constant."""
        values = self.constant(index)
        if values is None:
            raise Unsupported(f"its {what} is {self.node.origin(index)}")
        return values

    def has(self, index: int) -> bool:
        """Whether the optional input `index` is there."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def create(self, axes: tuple[int, ...], output: int = 0) -> Channels:
        """Opens the facts about an output whose channels lie on `axes`."""
        return self.facts.create(self, self.node.outputs[output], axes)

    def link(self, source: Channels, target: Channels, out_of: Ints, into: Ints, *, coupled: bool = True) -> None:
        """Says that channels of an output come from channels of an input, see `Link`."""
        self.links.append(Link(source, target, out_of, into, coupled))

    def tie(self, channels: Channels, one: Ints, other: Ints) -> None:
        """Channel `one[i]` of a tensor can only go together with its channel `other[i]`."""
        self.ties.append(Link(channels, channels, one, other))

    def carry(self, axes: tuple[int, ...] | None = None, index: int = 0) -> Channels:
        """The output's channels are the input's, one by one, on `axes` (default: the same)."""
        source = self.require(index)
        target = self.create(source.axes if axes is None else axes)
        if len(source) != len(target):
            raise Unsupported(f"{len(source)} channels come in and {len(target)} go out")
        numbers = every(len(source))
        self.link(source, target, numbers, numbers)
        return target

    def note(self, reason: str, channels: Bools | None = None) -> Note:
        return Note(self.label, self.node.op, reason, channels)


@lru_cache(LIKE)
def _sizes_along(shape: Shape | None, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The sizes of some axes; None where one is not known, or nothing."""
    if shape is None or max(axes) >= len(shape):
        return None
    sizes = [shape[axis] for axis in axes]
    known = tuple(size for size in sizes if isinstance(size, int) and size)
    return known if len(known) == len(sizes) else None


class Facts:
    """All facts about a graph. Building it runs both analyses, forward and backward; `update_after_cut` comes later."""

    @np.errstate(all="ignore")
    def __init__(self, graph: Graph, demands: Mapping[str, Bools] | None = None) -> None:
        """`demands`: channels of tensors, by name, that are needed whoever reads them."""
        from polar_deploy.surgery import ops

        self.graph = graph
        self._unsupported: Operator = ops.UNSUPPORTED
        self._handler: Callable[[Node], Operator] = (
            partial(ops.handler, opset=graph.opset) if graph.opset >= OLDEST_OPSET else lambda _: ops.UNSUPPORTED
        )
        self.steps: list[Step] = []  # one a node, in topological order
        self.alive: list[Step] = []  # those whose result is read once constants have replaced whole branches
        self.after_cut = False
        self.total = 0
        self._channels: dict[str, Channels] = {}
        self._open_inputs()
        for node in graph.nodes:
            if node.outputs:
                self.steps.append(self._forward(node))
        self._pin_ends()
        for name, needed in (demands or {}).items():
            self._channels[name].needed |= needed
        self._backward()
        self.kept = np.ones(self.total, bool)  # [channels of the graph] what the cut leaves, see `keep`

    def of(self, tensor: Tensor) -> Channels | None:
        """Facts about `tensor`; None for constants and where no channel axis is known."""
        return self.named(tensor.name)

    def named(self, name: str) -> Channels | None:
        """Facts about the tensor of that name."""
        return self._channels.get(name)

    def everything(self) -> list[Channels]:
        """The channels of all tensors, in topological order."""
        return list(self._channels.values())

    @cached_property
    def needed(self) -> Bools:
        """[channels of the graph] those that hold the same values after the cut; asked once facts are complete."""
        return self.gathered("needed")

    def keep(self, kept: Bools) -> None:
        """Plans what the cut leaves, [channels of the graph]; what is known of each tensor is a view of it."""
        self.kept = kept
        for channels in self._channels.values():
            channels.kept = kept[channels.first : channels.first + channels.size]

    def gathered(self, fact: str) -> Array:
        """[channels of the graph] an attribute of `Channels`."""
        return np.concatenate([getattr(channels, fact) for channels in self._channels.values()])

    def by_tensor(self, combine: np.ufunc, which: Bools) -> Bools:
        """[tensors] `which` [channels of the graph], combined within each tensor: `np.logical_or` for any of them."""
        return np.asarray(combine.reduceat(which, [channels.first for channels in self._channels.values()]))

    def create(self, step: Step | None, tensor: Tensor, axes: tuple[int, ...]) -> Channels:
        """Opens the facts about `tensor`. Raises Unsupported where the size of an axis is not known."""
        name, sizes = tensor.name, _sizes_along(self.graph.shape(tensor), axes)
        if sizes is None:
            raise Unsupported(f"the number of channels of {name} is not known")
        if math.prod(sizes) > MAX_CHANNELS:
            raise Unsupported(f"{name} has {math.prod(sizes)} channels, more than surgery looks at")
        channels = Channels(name, step.label if step is not None else name, axes, sizes, self.total)
        self._channels[name] = channels
        self.total += channels.size
        if step is not None:
            step.outputs.append(channels)
            if tensor is step.made[0]:
                step.output = channels
        return channels

    def inner(self, step: Step, name: str, width: int) -> Channels:
        """Opens the facts about something inside of a node that has channels of its own, as if it were an output."""
        tensor = Tensor(f"{step.label}/{name}", np.broadcast_to(np.zeros(1, bool), (width,)))
        step.made.append(tensor)
        return self.create(step, tensor, (0,))

    def _open_inputs(self) -> None:
        for tensor in self.graph.inputs:
            self.open_opaque(None, tensor, Note(tensor.name, "input", "it is a graph input"), needed=False)

    def open_opaque(self, step: Step | None, tensor: Tensor, note: Note, *, needed: bool = True) -> None:
        """Channels of a tensor that comes from the unknown: on axis 1, and none of them goes."""
        shape = self.graph.shape(tensor)
        if shape is not None and len(shape) > 1 and isinstance(shape[1], int) and 0 < shape[1] <= MAX_CHANNELS:
            channels = self.create(step, tensor, (1,))
            channels.pin(note)
            channels.needed[:] = needed

    def _forward(self, node: Node) -> Step:
        step, total = Step(node, self, self._handler(node)), self.total
        try:
            step.handler.couple(step)
            step.handler.constants(step)
        except Unsupported as reason:
            for tensor in step.made:
                self._channels.pop(tensor.name, None)
            self.total = total
            step = Step(node, self, self._unsupported)
            step.plan = step.note(str(reason))
            for tensor in node.outputs:
                if tensor.name:
                    self.open_opaque(step, tensor, step.plan)
        except (ValueError, IndexError, TypeError, KeyError) as error:  # numbers that do not fit together
            raise NotUnderstoodError(
                f"node {step.label} ({node.op}) contradicts its inputs: {error}", "export the model again"
            ) from error
        return step

    def _pin_ends(self) -> None:
        for name, channels in self._channels.items():
            if self.graph.is_output(name):
                channels.pin(Note(name, "output", "it reaches a graph output"))
            if name in self.graph.used_inside:
                channels.pin(Note(name, "body", "the body of a control-flow operator reads it"))

    def _backward(self) -> None:
        """Asks what is needed, from the outputs on. Steps that nothing reads have no say."""
        read = {tensor.name for tensor in self.graph.outputs} | self.graph.used_inside
        for step in reversed(self.steps):
            if not read.isdisjoint([tensor.name for tensor in step.made]):
                step.handler.need(step)
                self.alive.append(step)
                read.update([tensor.name for index, tensor in enumerate(step.original) if index not in step.replaced])
        self.alive.reverse()

    @np.errstate(all="ignore")
    def update_after_cut(self) -> None:
        """Facts about the graph as it will be after the cut as planned: filters that nobody needs become zero, so more
        constants come out.

        What a needed channel holds does not change, and what goes holds nothing: where that is all, nothing is done.
        """
        self.after_cut = True
        if not self._channels:
            return
        throughout = self.by_tensor(np.logical_and, self.gathered("constant")).tolist()
        for channels, was_constant in zip(self._channels.values(), throughout, strict=True):
            channels.was_constant = was_constant
        if not any_of(self.kept & ~self.needed):
            return
        for step in self.alive:
            if all(all_of(channels.needed) for channels in step.outputs):
                continue
            before = [(y, y.constant.copy(), y.value.copy(), y.nonnegative.copy()) for y in step.outputs]
            step.handler.constants(step)
            for channels, constant, value, nonnegative in before:
                np.copyto(channels.constant, constant, where=channels.needed)
                np.copyto(channels.value, value, where=channels.needed)
                np.copyto(channels.nonnegative, nonnegative, where=channels.needed)
