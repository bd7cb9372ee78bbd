"""Where a network can be masked: the modules whose input, or whose output, a hook can multiply.

A channel is closed at everything that reads it: a convolution or matrix product multiplies its input by a mask, and
whatever lies between writer and reader (norm, bias, activation) no longer matters. A residual branch is closed where
the module that ends it hands it out. Graph and modules are brought together by the exporter's notes on each node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from polar_deploy.export import Example, evaluating
from polar_deploy.module_names import module_of
from polar_deploy.surgery.choices import Mask
from polar_deploy.surgery.detached import DetachedModel
from polar_deploy.surgery.facts import Facts, Step
from polar_deploy.surgery.graph import Graph
from polar_deploy.surgery.ir import Node
from polar_deploy.surgery.survey import depending, is_writer


@dataclass
class Calls:
    """How a module was called.

    Attributes:
        inputs: in each call the shapes of its arguments by their positions or keywords; None of what is no tensor.
        outputs: in each call the shapes of the tensors that it gave back, by their positions in a tuple or list; None
            is the position of one that it gave back alone.
        others: what it was given last that is no tensor.
        empty: the tuple or list that it gave back last, of nothing but None; None: it gave one thing alone.
    """

    inputs: list[dict[int | str, tuple[int, ...] | None]] = field(default_factory=list)
    outputs: list[dict[int | None, tuple[int, ...]]] = field(default_factory=list)
    others: dict[int | str, Any] = field(default_factory=dict)
    empty: Any = None


def result_of(output: Any, position: int | None) -> Any:
    """What a module gave back at a position, or alone."""
    return output if position is None else output[position]


def with_result(output: Any, position: int | None, result: Tensor) -> Any:
    """What a module gave back, with something else at a position, or alone."""
    if position is None:
        return result
    return _filled(output, [*output[:position], result, *output[position + 1 :]])


def _filled(like: Any, values: list[Any]) -> Any:
    """Values in a tuple, named tuple or list as another one."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)


def argument_of(args: Sequence[Any], kwargs: Mapping[str, Any], key: int | str) -> Any:
    """What a module was given at a position, or by a keyword."""
    return kwargs[key] if isinstance(key, str) else args[key]


def aliases(network: nn.Module) -> dict[str, str]:
    """For modules that have several names in a network, the first one by each of the others."""
    first: dict[int, str] = {}
    every = [
        (name, first.setdefault(id(module), name)) for name, module in network.named_modules(remove_duplicate=False)
    ]
    return {name: known for name, known in every if name != known}


def layers(network: nn.Module, detached: DetachedModel) -> dict[str, list[int]]:
    """The layers with weights of a network, by their paths: the positions of the nodes that compute with these.

    A weight has two axes or more that are longer than one. One of the network itself goes by its own name.
    """
    users: dict[str, list[int]] = {}  # of each parameter, by its name in the graph
    made_of = {tensor.name: {tensor.name} for tensor in detached.model.graph.initializer}  # what constants are made of
    for position, node in enumerate(detached.model.graph.node):
        given = [name for name in node.input if name]
        weights = set[str]().union(*(made_of[name] for name in given if name in made_of))
        if all(name in made_of for name in given):
            made_of.update(dict.fromkeys(node.output, weights))
            continue
        for name in weights:
            users.setdefault(name, []).append(position)
    nodes, named = detached.model.graph.node, dict(network.named_parameters(remove_duplicate=False))
    by_id = {id(named[name]): positions for name, positions in users.items() if name in named}
    found: dict[str, list[int]] = {}
    for name, parameter in named.items():
        if sum(size > 1 for size in parameter.shape) > 1:
            path, used = name.rpartition(".")[0], by_id.get(id(parameter), [])
            own = [position for position in used if module_of(nodes[position]) == path]  # of a weight that is shared
            found.setdefault(path or name, []).extend(own or used)
    return found


def is_within(path: str, other: str) -> bool:
    """Whether a module, by its path, is another one, or lies in it."""
    return path == other or path.startswith(f"{other}.")


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module, or one that it lies in, fits one of the patterns."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[: n + 1]), each) for each in patterns for n in range(len(parts)))


@dataclass(frozen=True)
class Place:
    """A module that carries a mask.

    argument: which of its arguments is masked, by position or keyword; None: what it gives back.
    result: which of several things that it gives back; None: the only one.
    """

    module: str
    argument: int | str | None
    axis: int  # of the channels, from the front
    rank: int
    batch: int = 0  # axis of the samples: not the first one where tokens are in front, as PyTorch's attention has them
    result: int | None = None


@torch.no_grad()
def watch(network: nn.Module, example: Example) -> dict[str, Calls]:
    """Run a network once in evaluation mode, and note how each of its modules is called."""
    seen: dict[str, Calls] = {}
    handles = []
    for name, module in network.named_modules():
        calls = seen[name] = Calls()

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, calls: Calls = calls) -> None:
            given = (*enumerate(args), *kwargs.items())
            calls.inputs.append({key: tuple(x.shape) if isinstance(x, Tensor) else None for key, x in given})
            calls.others = {key: x for key, x in given if not isinstance(x, Tensor)}
            several = isinstance(output, (tuple, list))
            calls.empty = _filled(output, [None] * len(output)) if several else None
            made = dict(enumerate(output)) if several else {None: output}
            calls.outputs.append({key: tuple(x.shape) for key, x in made.items() if isinstance(x, Tensor)})

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        with evaluating(network):
            network(*example.args, **example.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Places:
    """The masks of a network and the modules that carry them.

    Args:
        detached: the network's structure as exported.
        calls: how its modules are called (`watch`).
        aliases: for modules that have several names in the network, the first one by each of the others.
        ignore: patterns of module paths that carry no mask.
        blocks: whether residual branches are masked.

    Attributes:
        masks, places: in step; several masks may have one place, where a module is called several times.
        unmasked: layers that nothing can mask, by name, with the reason.
    """

    def __init__(
        self,
        detached: DetachedModel,
        calls: dict[str, Calls],
        aliases: dict[str, str],
        ignore: Sequence[str] = (),
        *,
        blocks: bool = True,
    ) -> None:
        self._calls, self._ignore = calls, ignore
        self.graph = Graph(detached)
        self._facts = Facts(self.graph)
        self._facts.update_after_cut()
        self._depending = depending(self.graph)
        self._position = {id(node): position for position, node in enumerate(self.graph.original_nodes)}
        self._module = {
            id(node): aliases.get(path, path) if (path := module_of(proto)) else path
            for node, proto in zip(self.graph.original_nodes, detached.model.graph.node, strict=True)
        }
        self.masks: list[Mask] = []
        self.places: list[Place] = []
        self.unmasked: dict[str, str] = {}
        for step in self._facts.alive:
            if is_writer(step):  # a depthwise convolution passes its channels on: they are closed behind it
                self._mask_reader(step)
        if blocks:
            for step in self._facts.alive:
                if step.node.op == "Add":
                    self._mask_branches(step)

    def name_of(self, position: int) -> str | None:
        """The path of the module that the node at a position belongs to."""
        return self._module[id(self.graph.original_nodes[position])] or None

    def _mask_reader(self, step: Step) -> None:
        source = step.handler.source(step)  # type: ignore[attr-defined]
        path = self._module[id(step.node)]
        if source is None or len(source.axes) != 1:
            return
        if not path:
            weights = [self.graph.origin(tensor.name) for tensor in step.original if self.graph.is_constant(tensor)]
            name = weights[0].rpartition(".")[0] or weights[0]
            self.unmasked[name] = "it is computed under torch.no_grad, or outside of any module that could carry a mask"
            return
        if is_ignored(path, self._ignore):
            self.unmasked[path] = "it is to be ignored"
            return
        tensor = step.original[step.handler.data(step)]  # type: ignore[attr-defined]
        if tensor.name not in self._depending:
            self.unmasked[path] = "what it reads is the same for all inputs"
            return
        boundary = self._entry(tensor, path)
        known = self._facts.of(boundary) if boundary is not None else None
        if boundary is None or known is None or len(known) != len(source) or len(known.axes) != 1:
            self.unmasked[path] = "its input is computed inside of the module that it belongs to"
            return
        shape = self.graph.shape(boundary) or ()
        axis, width = known.axes[0], len(known)
        argument = self._argument(path, len(shape), axis, width)
        if argument is None:
            self.unmasked[path] = "it is not clear which argument of its module it reads"
            return
        readers = tuple(self._position[id(node)] for node in boundary.outputs if self._is_inside(node, path))
        if any(mask.tensor == boundary.name and mask.readers == readers for mask in self.masks):
            return  # two layers of one module read the same
        mask = Mask(self._name(path), boundary.name, readers, len(shape), axis, width)
        self._add(mask, Place(path, argument, axis, len(shape), _batch(shape)))

    def _mask_branches(self, step: Step) -> None:
        """Masks on the sides of a sum that end in a module and feed nothing else."""
        sides = [tensor for tensor in step.original if not self.graph.is_constant(tensor)]
        if len(sides) != 2 or sides[0] is sides[1] or self.graph.shape(sides[0]) != self.graph.shape(sides[1]):
            return
        for side in sides:
            for tensor in self._upwards(side):
                end = self._ending(tensor)
                channels = self._facts.of(tensor)
                if end is None or channels is None or len(channels.axes) != 1:
                    continue
                path, result = end
                shape = self.graph.shape(tensor) or ()
                (reader,), axis = tensor.outputs, channels.axes[0]
                readers = (self._position[id(reader)],)
                name = self._name(f"{path}:out")
                self._add(
                    Mask(name, tensor.name, readers, len(shape), axis, len(channels), block=True),
                    Place(path, None, axis, len(shape), _batch(shape), result),
                )
                break

    def _add(self, mask: Mask, place: Place) -> None:
        self.masks.append(mask)
        self.places.append(place)

    def _name(self, path: str) -> str:
        taken = {mask.name for mask in self.masks}
        return next(name for name in _numbered(path) if name not in taken)

    def _entry(self, tensor: Any, path: str) -> Any | None:
        """The tensor that comes into a module from outside and reaches `tensor` with its channels in order."""
        while tensor.inputs:
            maker = tensor.inputs[0]
            if not self._is_inside(maker, path):
                return tensor
            computed = [given for given in maker.inputs if given.name and not self.graph.is_constant(given)]
            before, after = self._facts.of(computed[0]) if computed else None, self._facts.of(tensor)
            if len(computed) != 1 or before is None or after is None or len(before) != len(after):
                return None
            tensor = computed[0]
        return tensor

    def _is_inside(self, node: Node, path: str) -> bool:
        own = self._module[id(node)]
        return own is not None and is_within(own, path)

    def _argument(self, path: str, rank: int, axis: int, width: int) -> int | str | None:
        """The only argument of a module that has `width` channels on `axis`, in every call."""
        calls = self._calls[path].inputs if path in self._calls else []
        fitting = []
        for key in dict.fromkeys(key for given in calls for key in given):
            shapes = [given.get(key) for given in calls]
            if all(shape is not None and len(shape) == rank and shape[axis] == width for shape in shapes):
                fitting.append(key)
        return fitting[0] if len(fitting) == 1 else None

    def _upwards(self, tensor: Any) -> Iterator[Any]:
        """`tensor` and what it is made of by steps that turn zero into zero, while nobody else reads it."""
        while len(tensor.outputs) == 1 and self.graph.is_private(tensor.name) and tensor.inputs:
            yield tensor
            maker = tensor.inputs[0]
            computed = [given for given in maker.inputs if given.name and not self.graph.is_constant(given)]
            if maker.op not in _KEEPING_ZERO or len(computed) != 1:
                return
            tensor = computed[0]

    def _ending(self, tensor: Any) -> tuple[str, int | None] | None:
        """The innermost module that hands out `tensor`, and is called once; and where in what it gives back that is."""
        path = self._module[id(tensor.inputs[0])]
        while path:
            outside = not any(self._is_inside(node, path) for node in tensor.outputs)
            fitting = self._fitting(path, tensor) if outside and not is_ignored(path, self._ignore) else []
            if len(fitting) == 1:
                return path, fitting[0]
            path = path.rpartition(".")[0]
        return None

    def _fitting(self, path: str, tensor: Any) -> list[int | None]:
        """The positions, in what a module gave back when it was called once, of what has the shape of `tensor`."""
        calls, shape = self._calls.get(path), self.graph.shape(tensor) or ()
        made = calls.outputs[0] if calls is not None and len(calls.outputs) == 1 else {}
        return [
            position
            for position, given in made.items()
            if len(given) == len(shape)
            and all(known == size for known, size in zip(shape, given, strict=True) if isinstance(known, int))
        ]


_KEEPING_ZERO = ("Mul", "Div", "Neg", "Transpose", "Reshape", "Identity", "Dropout", "Squeeze", "Unsqueeze", "Flatten")


def _batch(shape: Sequence[object]) -> int:
    """The first axis of open length: the batch's alone is open. 0 where the exporter could not leave it so."""
    return next((axis for axis, size in enumerate(shape) if not isinstance(size, int)), 0)


def _numbered(path: str) -> Iterator[str]:
    yield path
    number = 2
    while True:
        yield f"{path}#{number}"
        number += 1
