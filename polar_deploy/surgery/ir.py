"""Nodes and tensors in memory, and who makes and reads what. Only `Graph` changes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import onnx

    from polar_deploy.surgery.detached import Array

BODIES = frozenset((5, 10))  # the numbers of attribute types that hold nodes
PLAIN = frozenset((1, 2, 3, 6, 7, 8))  # those of numbers and text


@dataclass(eq=False, slots=True)
class Tensor:
    """A value of the graph. An optional input that is absent is a tensor without a name.

    values: of a constant; None: it is sparse, computed, or comes from outside.
    origin: for a report, of an input that has no values.
    inputs: the node that makes it, if one does.
    outputs: the nodes that read it, once for each time that they do.
    """

    name: str
    values: Array | None = None
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    origin: str = "computed"


@dataclass(eq=False, slots=True)
class Node:
    """One operation. attrs: numbers, text, lists of both; tensors as arrays, bodies as onnx's graphs.

    proto: the node of the model that it came from.
    label: what reports call it.
    """

    op: str
    domain: str
    attrs: dict[str, Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    proto: onnx.NodeProto
    label: str

    def origin(self, index: int) -> str:
        """Where an input comes from that has no values, for a report."""
        return self.inputs[index].origin if index < len(self.inputs) else "computed"

    def set_input(self, index: int, tensor: Tensor) -> None:
        """Makes the node read another tensor at an input that it has."""
        self.inputs[index].outputs.remove(self)
        self.inputs[index] = tensor
        tensor.outputs.append(self)

    def add_input(self, tensor: Tensor) -> None:
        """Adds an input behind the others."""
        self.inputs.append(tensor)
        tensor.outputs.append(self)

    def drop_input(self, index: int) -> None:
        """Takes an input away."""
        self.inputs.pop(index).outputs.remove(self)

    def drop_output(self, index: int) -> None:
        """Takes an output away; its tensor is left without a maker."""
        self.outputs.pop(index).inputs.remove(self)

    def clear_inputs(self) -> None:
        """Takes all inputs away."""
        while self.inputs:
            self.drop_input(-1)

    def clear_outputs(self) -> None:
        """Takes all outputs away."""
        while self.outputs:
            self.drop_output(-1)

    def restore(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Makes the node, which has neither, read and make tensors again."""
        for tensor in inputs:
            self.add_input(tensor)
        for tensor in outputs:
            self.outputs.append(tensor)
            tensor.inputs.append(self)

    def set_output(self, index: int, tensor: Tensor) -> None:
        """Makes the node write to another tensor, which no other one makes."""
        self.outputs[index].inputs.remove(self)
        self.outputs[index] = tensor
        tensor.inputs.append(self)


class Folded(NamedTuple):
    """A node whose results are held as constants instead, with what it read and made."""

    node: Node
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def labels_of(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """What reports call nodes: their names where these are unique, else their first outputs."""
    called = [node.name for node in nodes]
    names = Counter(called)
    return [
        name if name and names[name] == 1 else next(iter(node.output), node.op_type)
        for name, node in zip(called, nodes, strict=True)
    ]


def has_body(proto: onnx.NodeProto) -> bool:
    """Whether other nodes stand in an attribute: that of an If, Loop or Scan."""
    return not BODIES.isdisjoint([entry.type for entry in proto.attribute])


def attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node; those that refer to one of a local function are left out."""
    return {entry.name: _value(entry) for entry in proto.attribute if not entry.ref_attr_name}


def _value(entry: onnx.AttributeProto) -> Any:
    import onnx

    kind = entry.type
    if kind == 2:
        return entry.i
    if kind == 7:
        return list(entry.ints)
    if kind == 3:
        return entry.s.decode()
    if kind == 8:
        return [text.decode() for text in entry.strings]
    if kind == 4:
        return onnx.numpy_helper.to_array(entry.t)
    found = onnx.helper.get_attribute_value(entry)
    return list(found) if kind == 6 else found
