"""Which part of each parameter a cut leaves: for whoever wants to cut the same network in another form than ONNX.

The graph is trimmed with index numbers in place of its parameters, one axis after the other: what is left of them tells
which indices stay, whatever transposes and reshapes lie between a parameter and the node that reads it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.errors import ContentError
from polar_deploy.surgery import cut, sets
from polar_deploy.surgery.choices import with_values
from polar_deploy.surgery.detached import Array, DetachedModel
from polar_deploy.surgery.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

    from polar_deploy.surgery.facts import Ints

FIRST = 3  # what index 0 is numbered; a factor of 1 would be dropped, and zero closes


def slices(detached: DetachedModel, parameters: set[str]) -> dict[str, tuple[Ints, ...]]:
    """What cutting `detached` leaves of its `parameters` (names of initializers): one array of indices an axis.

    Those that go altogether are not there.

    Raises:
        ContentError: a parameter is cut in two ways, or is not used as it stands and cannot be cut.
    """
    shapes = {t.name: tuple(t.dims) for t in detached.model.graph.initializer if t.name in parameters}
    kept: dict[str, list[Ints]] = {name: [np.arange(size) for size in shape] for name, shape in shapes.items()}
    direct = _direct(detached)  # what is computed with keeps its values: numbers might make a weight of zeros of it
    for axis in range(max(map(len, shapes.values()), default=0)):
        trimmed = _Trimmed(_numbered(detached, {name: shape for name, shape in shapes.items() if name in direct}, axis))
        if axis == 0:
            for name in shapes:
                if name not in trimmed.left and not trimmed.is_read(name):
                    del kept[name]
                elif name not in direct and trimmed.sizes.get(name, math.prod(shapes[name])) != math.prod(shapes[name]):
                    raise _computed_with(name)
        for name in kept:
            if len(shapes[name]) > axis and name in trimmed.left and name in direct:
                kept[name][axis] = _indices(name, trimmed.left[name], axis, shapes[name][axis])
        if all(math.prod(map(len, kept[name])) == size for name, size in trimmed.sizes.items() if name in kept):
            break
    return {name: tuple(axes) for name, axes in kept.items()}


def paddings(detached: DetachedModel) -> dict[int, tuple[Ints, Ints]]:
    """What each Pad adds once `detached` is cut, by the position of its node: int [rank], before and after."""
    graph = Graph(detached)
    facts, _ = sets.plan(graph)
    ranks = {id(step.node): len(graph.shape(step.made[0]) or ()) for step in facts.alive}
    cut.trim(facts)
    found = {}
    for position, node in enumerate(graph.original_nodes):
        if node.op == "Pad" and id(node) in ranks:
            both = np.zeros((2, ranks[id(node)]), np.int64)
            if graph.contains(node):
                axes = graph.constant(node, 3)
                pads = graph.constant(node, 1) if len(node.inputs) > 1 else np.array(node.attrs["pads"])
                assert pads is not None  # `Pad` has no facts otherwise
                both[:, slice(None) if axes is None else axes.ravel()] = pads.reshape(2, -1)
            found[position] = (both[0], both[1])
    return found


def _direct(detached: DetachedModel) -> set[str]:
    """Names of the constants that are read, as they stand or rearranged, together with something that is computed."""
    graph, found, known = Graph(detached), set[str](), {""}  # known: what comes of constants alone
    for node in graph.nodes:
        constants = [tensor.name for tensor in node.inputs if graph.is_constant(tensor)]
        if {tensor.name for tensor in node.inputs} <= {*constants, *known}:
            known.update(tensor.name for tensor in node.outputs)
        else:
            found.update(map(graph.origin, constants))
    return found


class _Trimmed:
    """A graph after the cut. left: for each parameter that is read as it stands, what the nodes read of it."""

    def __init__(self, detached: DetachedModel) -> None:
        graph = Graph(detached)
        read = [tensor for node in graph.nodes for tensor in node.inputs]
        before = {tensor.name: tensor.values.shape for tensor in read if tensor.values is not None}
        facts, _ = sets.plan(graph)
        cut.trim(facts)
        self._before = before
        self.left: dict[str, list[Array]] = {}
        self._changed: set[str] = set()
        self._held: set[str] = set()
        for node in graph.nodes:
            for index, tensor in enumerate(node.inputs):
                values = graph.constant(node, index)
                if values is not None:
                    self._held.add(tensor.name)
                    self.left.setdefault(graph.origin(tensor.name), []).append(values)
                    if before.get(tensor.name) != values.shape:
                        self._changed.add(tensor.name)
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for proto in detached.model.graph.node:
            for name in proto.input:
                self._readers.setdefault(name, []).append(proto)

    @property
    def sizes(self) -> dict[str, int]:
        """How many elements the nodes read of each parameter."""
        return {name: values[0].size for name, values in self.left.items()}

    def is_read(self, name: str) -> bool:
        """Whether something that is computed from a parameter alone is read.

        Raises:
            ContentError: that was cut, so that the parameter itself cannot be.
        """
        for constant in self._computed(name):
            if constant in self._changed:
                raise _computed_with(name)
            if constant in self._held:
                return True
        return False

    def _computed(self, name: str) -> Iterator[str]:
        pending, seen = [name], {name}
        while pending:
            for proto in self._readers.get(pending.pop(), ()):
                for output in proto.output:
                    if output not in seen:
                        seen.add(output)
                        yield output
                        if output in self._before or output not in self._held:
                            pending.append(output)


def _indices(name: str, left: list[Array], axis: int, size: int) -> Ints:
    """The indices that are left along the axis that is numbered, which had `size` of them."""
    found = [_along(values, axis) for values in left]
    if any(len(found[0]) != len(other) for other in found):
        raise _cut_differently(name)
    indices = np.max(found, axis=0) - FIRST
    if not np.array_equal(indices, np.round(indices)) or indices.max(initial=0) >= size:
        raise _computed_with(name)
    known = indices >= 0
    if any(not np.array_equal((other - FIRST)[other > 0], indices[other > 0]) for other in found):
        raise _cut_differently(name)
    # What reads a channel that is zero at that place has zeros for weights: any index between its neighbours will do.
    for at in np.flatnonzero(~known):
        indices[at] = indices[at - 1] + 1 if at else 0
    if (np.diff(indices) <= 0).any() or indices.max(initial=0) >= size:
        raise _computed_with(name)
    return np.asarray(indices, np.int64)


def _along(values: Array, axis: int) -> Array:
    """The numbers along the axis that they run along, 0 where surgery made all of it zero.

    That is `axis`, or another one of what was transposed; of what was reshaped, the different numbers.
    """
    for own in sorted(range(values.ndim), key=lambda each: each != axis):
        spread = values.max(axis=tuple(other for other in range(values.ndim) if other != own), keepdims=True)
        known = spread[spread != 0]
        if len(np.unique(known)) == len(known) and ((values == spread) | (values == 0)).all():
            return np.asarray(spread.ravel())
    return np.unique(values)


def _cut_differently(name: str) -> ContentError:
    return ContentError(
        f"{name} is used in several places that are cut differently", "leave one of them out with ignore"
    )


def _computed_with(name: str) -> ContentError:
    return ContentError(
        f"{name} is computed with before it is used, so that it cannot be cut like what comes of it",
        "deploy the ONNX graph, where the result is cut, or leave that layer out with ignore",
    )


def _numbered(detached: DetachedModel, shapes: dict[str, tuple[int, ...]], axis: int) -> DetachedModel:
    """The graph with ascending numbers along an axis of its parameters, the same along the others."""

    def numbers(shape: tuple[int, ...]) -> Array:
        values = np.full(shape, float(FIRST))
        if len(shape) > axis:
            values += np.arange(shape[axis]).reshape([-1 if at == axis else 1 for at in range(len(shape))])
        return values

    return with_values(detached, {name: numbers(shape) for name, shape in shapes.items()})
