"""The graph that surgery works on, from a model and back to one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.onnx_files import Array, copy_field, copy_fields, metadata
from polar_deploy.surgery.arrays import same_bits
from polar_deploy.surgery.defaults import SEPARATE
from polar_deploy.surgery.detached import (
    ANNOTATIONS,
    DetachedModel,
    annotated,
    copy_annotations,
    names_in_bodies,
)
from polar_deploy.surgery.folding import fold
from polar_deploy.surgery.ir import Folded, Node, Tensor, attributes, has_body, labels_of
from polar_deploy.surgery.sizes import Shape
from polar_deploy.surgery.tensor_data import PACKED
from polar_deploy.surgery.transposes import join_transposes
from polar_deploy.surgery.unfolding import unfold
from polar_deploy.surgery.validation import SMALL, array_of, dtype_of, not_inferred, opset_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

FLOAT = 1  # the number of an element type in ONNX


class Graph:
    """One model under the knife. What it came from is left as it is."""

    def __init__(self, detached: DetachedModel, labels: list[str] | None = None) -> None:
        """Takes a checked model; `labels`: what reports call its nodes, where they were called something before."""
        self._detached = detached
        self.model = model = detached.model
        self._types = detached.skeleton.tensors
        self.opset = opset_of(model)
        self.is_changed = False  # whether the model differs from the one given
        self._tensors = {
            tensor.name: Tensor(tensor.name, _given(tensor, detached)) for tensor in model.graph.initializer
        }
        self._given = dict(self._tensors)  # constants as they were
        self._tensors |= {name: Tensor(name, origin="a sparse tensor") for name in detached.sparse}
        self._held = set(self._tensors)
        self.inputs = [self._tensor(value.name) for value in model.graph.input if value.name not in self._held]
        self.outputs = [self._tensor(value.name) for value in model.graph.output]
        named = labels if labels is not None else labels_of(model.graph.node)
        self._nodes = [self._node(proto, label) for proto, label in zip(model.graph.node, named, strict=True)]
        self.original_nodes = list(self._nodes)  # holds on to removed nodes: they are told apart by id
        self._alive = {id(node) for node in self._nodes}
        self._outputs = {tensor.name for tensor in self.outputs}
        holders = self._nodes if detached.has_bodies else []
        self._bodies = {id(node): set(names_in_bodies([node.proto])) for node in holders if has_body(node.proto)}
        self.used_inside = frozenset[str]().union(*self._bodies.values())  # names that bodies refer to
        self._names = self.used_inside | self._tensors.keys()
        self._edited: dict[str, list[tuple[Node, int]]] = {}  # a constant's name -> inputs that got a new value
        self._originals: dict[str, Tensor] = {}
        self._touched: dict[int, set[str]] = {}
        self._sizes: dict[str, dict[int, int]] = {}  # by tensor and axis, of what was cut and no inference tells
        self.folded: list[Folded] = []  # in topological order
        self._origins = fold(self)
        if self.follows_heads:
            join_transposes(self)

    def _tensor(self, name: str) -> Tensor:
        """The tensor of that name; absent ones are all different."""
        if not name:
            return Tensor("")
        if name not in self._tensors:
            self._tensors[name] = Tensor(name)
        return self._tensors[name]

    def _node(self, proto: onnx.NodeProto, label: str) -> Node:
        inputs = [self._tensor(name) for name in proto.input]
        outputs = [self._tensor(name) for name in proto.output]
        node = Node(proto.op_type, proto.domain, attributes(proto), inputs, outputs, proto, label)
        for tensor in inputs:
            tensor.outputs.append(node)
        for tensor in outputs:
            tensor.inputs.append(node)
        return node

    @property
    def follows_heads(self) -> bool:
        """Whether channels are followed through attention heads."""
        return self._detached.heads

    @property
    def nodes(self) -> list[Node]:
        """The nodes that are left, in topological order."""
        return list(self._nodes)

    def label(self, node: Node) -> str:
        """What reports call `node`: its name where that is unique, else its first output."""
        return node.label

    def metadata(self, node: Node) -> dict[str, str]:
        """The node's `metadata_props`."""
        return metadata(node.proto)

    def shape(self, tensor: Tensor) -> Shape | None:
        """The shape of `tensor` before any cut; None where it is unknown."""
        return self._types.shape(tensor.name) if tensor.values is None else tensor.values.shape

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the value of `tensor` is part of the model. Those of sparse tensors are left alone."""
        return tensor.values is not None

    def origin(self, name: str) -> str:
        """The name of the constant in the model that the constant `name` is a rearrangement of, or its own."""
        return self._origins.get(name, name)

    def is_output(self, name: str) -> bool:
        """Whether the tensor of that name is an output of the graph."""
        return name in self._outputs

    def constant(self, node: Node, index: int) -> Array | None:
        """The value of an input as it stands; None where it is absent or computed."""
        return node.inputs[index].values if index < len(node.inputs) else None

    def set_constant(self, node: Node, index: int, values: Array) -> None:
        """Gives `node` alone a (new) value for an input; whoever shared the old one keeps it."""
        while len(node.inputs) <= index:
            node.add_input(Tensor(""))
        old = node.inputs[index]
        if old.values is not None:
            name = old.name
            self._originals.setdefault(name, old)
        else:
            name = f"{self.label(node)}.{'bias' if index == 2 else 'constant'}"
        node.set_input(index, Tensor(name, np.asarray(values, order="C")))
        self._edited.setdefault(name, []).append((node, index))
        self.is_changed = True

    def resize(self, tensor: Tensor, axis: int, size: int) -> None:
        """Says how long an axis of a tensor is now: of those whose shapes are declared because none can be inferred."""
        self._sizes.setdefault(tensor.name, {})[axis] = size

    def drop_input(self, node: Node, index: int) -> None:
        """Takes an input away from an operator that has any number of them."""
        node.drop_input(index)
        self.is_changed = True
        for name, users in self._edited.items():
            self._edited[name] = [
                (user, at - (user is node and at > index)) for user, at in users if user is not node or at != index
            ]

    def leave_out(self, node: Node, index: int) -> None:
        """Makes an optional input absent."""
        node.set_input(index, Tensor(""))
        self.is_changed = True

    def drop_output(self, node: Node, index: int) -> None:
        """Takes an output that nobody reads away from an operator that has any number of them."""
        node.drop_output(index)
        self.is_changed = True

    def set_attribute(self, node: Node, name: str, value: object) -> None:
        """Sets an attribute."""
        node.attrs[name] = value
        self._touch(node, name)

    def _touch(self, node: Node, name: str) -> None:
        self._touched.setdefault(id(node), set()).add(name)
        self.is_changed = True

    def drop_attribute(self, node: Node, name: str) -> None:
        """Takes an attribute away, if it is there."""
        if node.attrs.pop(name, None) is not None:
            self._touch(node, name)

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The element type of a computed tensor; float32 where nothing says otherwise."""
        return dtype_of(self._types.kind(tensor.name) or FLOAT)

    def is_private(self, name: str) -> bool:
        """Whether only nodes of the main graph read the tensor of that name."""
        return not self.is_output(name) and name not in self.used_inside

    def contains(self, node: Node) -> bool:
        """Whether `node` has not been removed."""
        return id(node) in self._alive

    def can_bypass(self, node: Node, index: int = 0) -> bool:
        """Whether `bypass` is possible: the name of a graph output can only move to a node's own result."""
        source, target = node.inputs[index], node.outputs[0]
        if self.is_output(target.name):
            return bool(source.inputs) and self.is_private(source.name)
        return self.is_private(target.name)

    def bypass(self, node: Node, index: int = 0) -> bool:
        """Makes all that reads `node`'s output read its input `index` instead; the node then feeds nothing.

        Returns:
            False, and nothing is done, where that is not possible.
        """
        if not self.can_bypass(node, index):
            return False
        source, target = node.inputs[index], node.outputs[0]
        if self.is_output(target.name):
            producer = source.inputs[0]
            node.clear_outputs()
            producer.set_output([t is source for t in producer.outputs].index(True), target)
            source, target = target, source
        for reader in list(target.outputs):
            for position, tensor in enumerate(reader.inputs):
                if tensor is target and reader is not node:
                    reader.set_input(position, source)
        node.clear_inputs()
        self.is_changed = True
        return True

    def drop_unused(self) -> list[Node]:
        """Removes the nodes whose outputs nobody reads. Returns them."""
        alive: set[int] = set()
        names: set[str] = set(self._outputs)
        for node in reversed(self._nodes):
            if any(tensor.name in names for tensor in node.outputs):
                alive.add(id(node))
                names.update([tensor.name for tensor in node.inputs if tensor.name])
                names.update(self._bodies.get(id(node), ()))
        dropped = [node for node in self._nodes if id(node) not in alive]
        self._nodes = [node for node in self._nodes if id(node) in alive]
        self._alive = alive
        for node in dropped:
            node.clear_inputs()
        held = {id(folded.node) for folded in self.folded}  # of which `to_detached` decides
        self.is_changed |= any(id(node) not in held for node in dropped)
        return dropped

    def to_detached(self) -> DetachedModel:
        """The graph as a model; the one that it came from where nothing was changed.

        Names, types and shapes of inputs and outputs, attributes and metadata of nodes and constants stay; value_info
        goes, but for what onnx cannot infer. The graph itself has served then.
        """
        import onnx

        unfold(self)
        self._nodes = [node for node in self.original_nodes if id(node) in self._alive]
        stay_folded = (each.node for each in self.folded if not self.contains(each.node))
        self.is_changed |= any(node.op != "Constant" for node in stay_folded)
        if not self.is_changed:
            return self._detached
        self._name_constants()
        source, model = self.model, onnx.ModelProto()
        copy_fields(source, model, ("graph",))
        graph = model.graph
        copy_fields(
            source.graph, graph, ("node", "initializer", "sparse_initializer", "input", "value_info", ANNOTATIONS)
        )
        graph.node.extend([node.proto for node in self._nodes])
        for node, proto in zip(self._nodes, graph.node, strict=True):
            self._write_node(node, proto)
        arrays = self._write_constants(graph)
        self._write_inputs(graph)
        opaque = set(not_inferred(model))
        graph.value_info.extend(value for value in source.graph.value_info if value.name in opaque)
        for value in graph.value_info:
            for axis, size in self._sizes.get(value.name, {}).items():
                value.type.tensor_type.shape.dim[axis].dim_value = size
        copy_annotations(source.graph, graph)
        return replace(self._detached, model=model, arrays=arrays)

    def release(self) -> None:
        """Takes nodes and tensors apart, which hold on to each other."""
        for node in self.original_nodes:
            node.inputs.clear()
            node.outputs.clear()

    def _write_node(self, node: Node, proto: onnx.NodeProto) -> None:
        import onnx

        for names, tensors in ((proto.input, node.inputs), (proto.output, node.outputs)):
            if names != (now := [tensor.name for tensor in tensors]):
                names[:] = now
        changed = self._touched.get(id(node), set())
        if changed:
            left = [attribute for attribute in proto.attribute if attribute.name not in changed]
            new = [onnx.helper.make_attribute(name, node.attrs[name]) for name in changed if name in node.attrs]
            del proto.attribute[:]
            proto.attribute.extend(sorted([*left, *new], key=lambda attribute: str(attribute.name)))

    def _write_constants(self, graph: onnx.GraphProto) -> dict[str, Array]:
        """Writes the constants that are read, in the order that they had. Returns the values of large ones."""
        source = self.model.graph
        used = {tensor.name: tensor for node in self._nodes for tensor in node.inputs if tensor.name}
        named = self.used_inside | self._outputs | annotated(source)  # not by nodes of the main graph
        arrays: dict[str, Array] = {}
        left = dict.fromkeys(used)
        for given in source.initializer:
            left.pop(given.name, None)
            tensor = used.get(given.name)
            if tensor is not None and tensor is not self._given.get(given.name):
                self._write_constant(graph.initializer.add(), tensor, arrays)
                for field in ("doc_string", "metadata_props"):
                    copy_field(given, graph.initializer[-1], field)
            elif tensor is not None or given.name in named:
                graph.initializer.add().CopyFrom(given)
                if given.name in self._detached.arrays:
                    arrays[given.name] = self._detached.arrays[given.name]
        graph.sparse_initializer.extend(
            sparse for sparse in source.sparse_initializer if sparse.values.name in used.keys() | named
        )
        for name in left:
            if used[name].values is not None:
                self._write_constant(graph.initializer.add(), used[name], arrays)
        return arrays

    def _write_constant(self, proto: onnx.TensorProto, tensor: Tensor, arrays: dict[str, Array]) -> None:
        import onnx

        values = np.asarray(tensor.values)
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        if values.size <= SMALL or onnx.TensorProto.DataType.Name(kind) in PACKED:
            proto.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        else:
            proto.name, proto.data_type = tensor.name, kind
            proto.dims.extend(values.shape)
            arrays[tensor.name] = values

    def _write_inputs(self, graph: onnx.GraphProto) -> None:
        """Inputs as they were; where weights were among them, all that are left are: one alone would be optional."""
        import onnx

        constants = self._given.keys()
        are_listed = any(value.name in constants for value in self.model.graph.input)
        graph.input.extend(value for value in self.model.graph.input if value.name not in constants)
        graph.input.extend(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in (graph.initializer if are_listed or self.model.ir_version < SEPARATE else ())
        )

    def _name_constants(self) -> None:
        """One initializer a value: equal cuts of a shared constant stay shared, differing ones get their own names."""
        taken = set(self._names)
        alive = {id(node) for node in self._nodes}
        for name, users in self._edited.items():
            variants: list[Tensor] = []
            for node, index in users:
                if id(node) in alive:
                    own = node.inputs[index]
                    variant = next((v for v in variants if same_bits(v.values, own.values)), None)
                    if variant is None:
                        variants.append(own)
                    elif variant is not own:
                        node.set_input(index, variant)
            original = self._originals.get(name)
            free = name not in taken if original is None else not original.outputs and self.is_private(name)
            for constant in variants:
                constant.name = name if free else _free_name(name, taken)
                free = False

    def hold(self, node: Node, values: Sequence[Array]) -> None:
        """Makes constants of a node's results; the node then makes nothing."""
        self.folded.append(Folded(node, tuple(node.inputs), tuple(node.outputs)))
        for tensor, each in zip([tensor for tensor in node.outputs if tensor.name], values, strict=True):
            tensor.values = each
        node.clear_outputs()

    def unfold(self, folded: Folded, readers: Sequence[tuple[Node, int]]) -> None:
        """Takes `hold` back, when unused nodes are dropped; `readers`, at these inputs, read what the node makes."""
        folded.node.restore(folded.inputs, folded.outputs)
        made = {tensor.name: tensor for tensor in folded.outputs}
        for reader, index in readers:
            reader.set_input(index, made[reader.inputs[index].name])
        for name, tensor in made.items():
            tensor.values = None
            self._edited.pop(name, None)
        self._alive.add(id(folded.node))

    def stand_for(self, node: Node, before: Node, after: Node, name: str, value: object) -> None:
        """Makes `node`, with another attribute, do what `before`, it and `after` did one behind the other."""
        node.set_input(0, before.inputs[0])
        result = after.outputs[0]
        after.clear_outputs()
        node.set_output(0, result)
        self.set_attribute(node, name, value)


def _given(tensor: onnx.TensorProto, detached: DetachedModel) -> Array:
    """The values of an initializer."""
    values = detached.arrays.get(tensor.name)
    return array_of(tensor) if values is None else values


def _free_name(name: str, taken: set[str]) -> str:
    number = 1
    while f"{name}.{number}" in taken:
        number += 1
    taken.add(f"{name}.{number}")
    return f"{name}.{number}"
