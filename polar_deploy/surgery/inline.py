"""Nodes that hold other nodes, and always compute these: local functions, and If with a condition that is constant."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.detached import Array, DetachedModel, bodies, names_in_bodies, put_nodes, sort_nodes
from polar_deploy.surgery.shape_folding import evaluate
from polar_deploy.surgery.standins import STANDARD
from polar_deploy.surgery.validation import opset_of

if TYPE_CHECKING:
    import onnx

DEEPEST = 20  # nodes of constants behind a condition; Ifs in one another


def inlined(detached: DetachedModel) -> DetachedModel:
    """The model with the nodes of its local functions, and of the branches that are always taken, in their places."""
    import onnx
    import onnx.inliner

    model = detached.model
    if model.functions:
        model = onnx.inliner.inline_local_functions(_in_one_opset(model))
        sort_nodes(model.graph)
    for _ in range(DEEPEST):
        decided = _decided(model.graph, opset_of(model))
        if not decided:
            break
        if model is detached.model:
            model = onnx.ModelProto()
            model.CopyFrom(detached.model)
        _put(model.graph, decided)
    return detached if model is detached.model else replace(detached, model=model)


def _in_one_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with functions that import its own opset, where their operators mean the same in it as in theirs."""
    import onnx

    opset, copy = opset_of(model), onnx.ModelProto()
    copy.CopyFrom(model)
    for function in copy.functions:
        for entry in function.opset_import:
            if entry.domain in STANDARD and all(_is_same(node, entry.version, opset) for node in function.node):
                entry.version = opset
    return copy


def _is_same(node: onnx.NodeProto, one: int, other: int) -> bool:
    """Whether the standard operators of a node and of its bodies have one definition in two opsets."""
    import onnx

    if node.domain in STANDARD:
        known = all(onnx.defs.has(node.op_type, opset) for opset in (one, other))
        versions = {onnx.defs.get_schema(node.op_type, opset).since_version for opset in (one, other)} if known else ()
        if one != other and len(versions) != 1:
            return False
    return all(_is_same(inner, one, other) for body in bodies(node) for inner in body.node)


def _decided(graph: onnx.GraphProto, opset: int) -> dict[int, onnx.GraphProto]:
    """The branch that each If takes whose condition is constant, by the position of the If."""
    ifs = [position for position, node in enumerate(graph.node) if node.op_type == "If" and node.domain in STANDARD]
    if not ifs:
        return {}
    values = _Constants(graph, opset)
    found: dict[int, onnx.GraphProto] = {}
    for position in ifs:
        condition = values.of(graph.node[position].input[0])
        if condition is not None and condition.size == 1:
            name = "then_branch" if condition.all() else "else_branch"
            found[position] = next(entry.g for entry in graph.node[position].attribute if entry.name == name)
    return found


class _Constants:
    """What is computed from small constants alone."""

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        import onnx

        listed = {value.name for value in graph.input}
        self.opset = opset
        self.makers = {name: node for node in graph.node for name in node.output}
        self.values: dict[str, Array | None] = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in graph.initializer
            if tensor.name not in listed and np.prod(tensor.dims) == 1
        }

    def of(self, name: str, depth: int = 0) -> Array | None:
        """The value of a tensor; None where it is not constant, or not worth the way."""
        if name not in self.values and depth < DEEPEST:
            self.values[name] = self._computed(self.makers.get(name), name, depth)
        return self.values.get(name)

    def _computed(self, node: onnx.NodeProto | None, name: str, depth: int) -> Array | None:
        if node is None or node.domain not in STANDARD or len(node.output) > 1 or list(names_in_bodies([node])):
            return None
        given = {each: self.of(each, depth + 1) for each in node.input if each}
        known = {each: value for each, value in given.items() if value is not None}
        found = evaluate(node, known, self.opset) if len(known) == len(given) else None
        return None if found is None else found[0]


def _put(graph: onnx.GraphProto, decided: dict[int, onnx.GraphProto]) -> None:
    """Puts branches in place of their Ifs."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*graph.input, *graph.initializer)} | set(names_in_bodies(graph.node))
    called = {node.name for node in graph.node}
    nodes: list[onnx.NodeProto] = []
    for position, node in enumerate(graph.node):
        nodes += _branch(graph, node, decided[position], taken, called) if position in decided else [node]
    put_nodes(graph, nodes)


def _branch(
    graph: onnx.GraphProto, node: onnx.NodeProto, branch: onnx.GraphProto, taken: set[str], called: set[str]
) -> list[onnx.NodeProto]:
    """The nodes of a branch, under names that are free in the graph; its constants move there.

    taken, called: names of tensors and of nodes that are not free.
    """
    import onnx

    own = [name for inner in branch.node for name in inner.output if name]
    own += [tensor.name for tensor in branch.initializer]
    made = {name for inner in branch.node for name in inner.output}
    ends = {value.name: result for value, result in zip(branch.output, node.output, strict=True) if result}
    names = {name: ends[name] if name in made and name in ends else _free(name, taken) for name in own}
    body = onnx.GraphProto()
    body.CopyFrom(branch)
    for inner in body.node:
        _rename(inner, names)
        inner.name = _free(inner.name, called) if inner.name else ""
    for tensor in body.initializer:
        tensor.name = names[tensor.name]
    graph.initializer.extend(body.initializer)
    copies = [
        onnx.helper.make_node("Identity", [names.get(value.name, value.name)], [result])
        for value, result in zip(branch.output, node.output, strict=True)
        if result and names.get(value.name) != result
    ]
    return [*body.node, *copies]


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    """Gives tensors their new names, in the bodies of nodes too."""
    for tensors in (node.input, node.output):
        tensors[:] = [names.get(name, name) for name in tensors]
    for body in bodies(node):
        for inner in body.node:
            _rename(inner, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)


def _free(name: str, taken: set[str]) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    taken.add(free)
    return free
