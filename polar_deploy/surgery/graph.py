"""The graph that surgery works on: onnx-graphsurgeon's, with what that library would lose on the way out."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.surgery.arithmetic import evaluate
from polar_deploy.surgery.model import SMALL, Shape, infer_shapes
from polar_deploy.surgery.stored import PACKED, Array, Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx
    from google.protobuf.message import Message

Node = Any  # onnx_graphsurgeon.Node; the library has no type annotations
Tensor = Any  # onnx_graphsurgeon.Tensor

MAX_FOLDED = 1 << 24  # elements of constants that are looked at
FOLDED_ANYWAY = 1 << 12  # elements; what becomes larger than it was stays computed: the file would grow


class Graph:
    """One model under the knife. What it came from is left as it is."""

    def __init__(self, stored: Stored, labels: list[str] | None = None) -> None:
        """Takes a checked model; `labels`: what reports call its nodes, where they were called something before."""
        import onnx_graphsurgeon as gs
        from onnx_graphsurgeon.logger import G_LOGGER

        G_LOGGER.severity = G_LOGGER.ERROR
        self._gs = gs
        self._stored = stored
        self.model = model = stored.model
        self._tensors = infer_shapes(model)
        self.body = gs.import_onnx(model)
        for name, tensor in self.body.tensors().items():
            if name in stored.arrays:
                tensor.values = stored.arrays[name]
        self.original_nodes = list(self.body.nodes)  # holds on to removed nodes: they are told apart by id
        self._alive = {id(node) for node in self.original_nodes}
        self._proto = {id(node): proto for node, proto in zip(self.body.nodes, model.graph.node, strict=True)}
        named = labels if labels is not None else _labels(self.body.nodes)
        self._labels = {id(node): label for node, label in zip(self.body.nodes, named, strict=True)}
        self._outputs = {tensor.name for tensor in self.body.outputs}
        self._inner = set(_names_in_bodies(model.graph.node))
        self._names = self._inner | set(self.body.tensors())
        self._edited: dict[str, list[tuple[Node, int]]] = {}  # a constant's name -> inputs that got a new value
        self._originals: dict[str, Tensor] = {}
        self._touched: set[int] = set()
        self._origins: dict[str, str] = {}
        self._fold_constants()

    @property
    def nodes(self) -> list[Node]:
        """The nodes that are left, in topological order."""
        return list(self.body.nodes)

    def label(self, node: Node) -> str:
        """What reports call `node`: its name where that is unique, else its first output."""
        return self._labels[id(node)]

    def metadata(self, node: Node) -> dict[str, str]:
        """The node's `metadata_props`."""
        return {entry.key: entry.value for entry in self._proto[id(node)].metadata_props}

    def shape(self, tensor: Tensor) -> Shape | None:
        """The shape of `tensor` before any cut; None where it is unknown."""
        return tuple(tensor.shape) if self.is_constant(tensor) else self._tensors.shapes.get(tensor.name)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the value of `tensor` is part of the model. Those of sparse tensors are left alone."""
        return isinstance(tensor, self._gs.Constant) and not isinstance(tensor._values, self._gs.ir.tensor.SparseValues)

    def origin(self, name: str) -> str:
        """The name of the constant in the model that the constant `name` is a rearrangement of, or its own."""
        return self._origins.get(name, name)

    def is_output(self, name: str) -> bool:
        """Whether the tensor of that name is an output of the graph."""
        return name in self._outputs

    def is_used_inside(self, name: str) -> bool:
        """Whether the body of an If, Loop or Scan refers to the tensor of that name."""
        return name in self._inner

    def constant(self, node: Node, index: int) -> Array | None:
        """The value of an input as it stands; None where it is absent or computed."""
        if index >= len(node.inputs) or not self.is_constant(node.inputs[index]):
            return None
        values: Array = node.inputs[index].values
        return values

    def set_constant(self, node: Node, index: int, values: Array) -> None:
        """Gives `node` alone a (new) value for an input; whoever shared the old one keeps it."""
        while len(node.inputs) <= index:
            node.inputs.append(self._gs.Variable.empty())
        old = node.inputs[index]
        if self.is_constant(old):
            name = old.name
            self._originals.setdefault(name, old)
        else:
            name = f"{self.label(node)}.{'bias' if index == 2 else 'constant'}"
        node.inputs[index] = self._gs.Constant(name, np.asarray(values, order="C"))
        self._edited.setdefault(name, []).append((node, index))

    def drop_input(self, node: Node, index: int) -> None:
        """Takes an input away from an operator that has any number of them."""
        del node.inputs[index]
        for name, users in self._edited.items():
            self._edited[name] = [
                (user, at - (user is node and at > index)) for user, at in users if user is not node or at != index
            ]

    def drop_output(self, node: Node, index: int) -> None:
        """Takes an output that nobody reads away from an operator that has any number of them."""
        del node.outputs[index]

    def set_attribute(self, node: Node, name: str, value: object) -> None:
        """Sets an attribute."""
        node.attrs[name] = value
        self._touched.add(id(node))

    def drop_attribute(self, node: Node, name: str) -> None:
        """Takes an attribute away, if it is there."""
        if node.attrs.pop(name, None) is not None:
            self._touched.add(id(node))

    def dtype(self, tensor: Tensor) -> np.dtype[Any]:
        """The element type of a computed tensor; float32 where nothing says otherwise."""
        import onnx

        return onnx.helper.tensor_dtype_to_np_dtype(self._tensors.types.get(tensor.name) or onnx.TensorProto.FLOAT)

    def is_private(self, name: str) -> bool:
        """Whether only nodes of the main graph read the tensor of that name."""
        return not self.is_output(name) and not self.is_used_inside(name)

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
            node.outputs.clear()
            producer.outputs[[t is source for t in producer.outputs].index(True)] = target
            source, target = target, source
        for reader in list(target.outputs):
            for position, tensor in enumerate(reader.inputs):
                if tensor is target and reader is not node:
                    reader.inputs[position] = source
        node.inputs.clear()
        return True

    def drop_unused(self) -> list[Node]:
        """Removes the nodes whose outputs nobody reads. Returns them."""
        alive: set[int] = set()
        names: set[str] = set(self._outputs)
        for node in reversed(self.body.nodes):
            if any(tensor.name in names for tensor in node.outputs):
                alive.add(id(node))
                names.update(tensor.name for tensor in node.inputs if tensor.name)
                names.update(_names_in_bodies([self._proto[id(node)]]))
        dropped = [node for node in self.body.nodes if id(node) not in alive]
        self.body.nodes = [node for node in self.body.nodes if id(node) in alive]
        self._alive = alive
        for node in dropped:
            node.inputs.clear()
        return dropped

    def to_stored(self) -> Stored:
        """The graph as a model: what graphsurgeon does not carry over is taken from the original.

        Names, types and shapes of inputs and outputs, attributes and metadata of nodes stay; value_info goes. The
        graph itself has served then.
        """
        self._name_constants()
        arrays = self._take_arrays()
        model: onnx.ModelProto = self._gs.export_onnx(self.body, do_type_check=False)
        source = self.model
        for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string", "ir_version"):
            if source.HasField(field):
                setattr(model, field, getattr(source, field))
            else:
                model.ClearField(field)
        for field in ("metadata_props", "functions", "opset_import", "training_info", "configuration"):
            _copy_repeated(source, model, field)
        graph = model.graph
        graph.name, graph.doc_string = source.graph.name, source.graph.doc_string
        for field in ("metadata_props", "output"):
            _copy_repeated(source.graph, graph, field)
        present = {tensor.name for tensor in graph.initializer}
        graph.initializer.extend(
            tensor for tensor in source.graph.initializer if tensor.name in self._inner - present
        )  # graphsurgeon leaves out what only the bodies of If, Loop and Scan read
        self._restore_inputs(graph)
        del graph.value_info[:]
        for node, proto in zip(self.body.nodes, graph.node, strict=True):
            self._restore_node(node, proto)
        arrays.update((name, self._stored.arrays[name]) for name in self._inner & self._stored.arrays.keys())
        return Stored(model, arrays, self._stored.external)

    def _take_arrays(self) -> dict[str, Array]:
        """Takes large constants out of the graph: graphsurgeon would write their data into the message."""
        import onnx

        arrays: dict[str, Array] = {}
        for name, tensor in self.body.tensors().items():
            if not self.is_constant(tensor) or isinstance(tensor._values, self._gs.ir.tensor.LazyValues):
                continue  # the latter are small, and nobody has looked at them
            kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
            if onnx.TensorProto.DataType.Name(kind) in PACKED:  # it would write a byte a number
                tensor.values = self._gs.ir.tensor.LazyValues(onnx.numpy_helper.from_array(tensor.values, name))
            elif math.prod(tensor.shape) > SMALL:
                values = tensor.values
                header = onnx.TensorProto(name=name, data_type=kind, dims=values.shape)
                arrays[name], tensor.values = values, self._gs.ir.tensor.LazyValues(header)
        return arrays

    def _restore_inputs(self, graph: onnx.GraphProto) -> None:
        """Inputs as they were; old models list their initializers among them, those that are left are listed again."""
        import onnx

        constants = {tensor.name for tensor in self.model.graph.initializer}
        listed = {value.name for value in self.model.graph.input}
        del graph.input[:]
        graph.input.extend(value for value in self.model.graph.input if value.name not in constants)
        graph.input.extend(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in graph.initializer
            if tensor.name in listed or self.model.ir_version < 4
        )

    def _restore_node(self, node: Node, proto: onnx.NodeProto) -> None:
        source = self._proto[id(node)]
        changed = list(proto.attribute) if id(node) in self._touched else None
        inputs, outputs = list(proto.input), list(proto.output)
        proto.CopyFrom(source)
        proto.input[:], proto.output[:] = inputs, outputs
        if changed is not None:
            del proto.attribute[:]
            proto.attribute.extend(changed)

    def _name_constants(self) -> None:
        """One initializer a value: equal cuts of a shared constant stay shared, differing ones get their own names."""
        taken = set(self._names)
        alive = {id(node) for node in self.body.nodes}
        for name, users in self._edited.items():
            variants: list[Tensor] = []
            for node, index in users:
                if id(node) in alive:
                    own = node.inputs[index]
                    variant = next((v for v in variants if v is own or _is_same(v.values, own.values)), None)
                    if variant is None:
                        variants.append(own)
                    elif variant is not own:
                        node.inputs[index] = variant
            original = self._originals.get(name)
            free = not original.outputs if original is not None else name not in taken
            for constant in variants:
                constant.name = name if free else _free_name(name, taken)
                free = False

    def _fold_constants(self) -> None:
        """Turns what is computed from constants alone into constants: gates come as Cast, Not, Greater, Where …"""
        for node in self.body.nodes:
            if len(node.outputs) == 1 and self.is_private(node.outputs[0].name) and self._is_foldable(node):
                values = self._evaluate(node)
                if values is not None and values.size <= MAX_FOLDED and values.dtype.kind not in "OSU":
                    self._note_origin(node)
                    node.outputs[0].to_constant(values)
                    node.outputs.clear()

    def _note_origin(self, node: Node) -> None:
        if node.op in REARRANGING:
            self._origins[node.outputs[0].name] = self.origin(node.inputs[0].name)

    def _is_foldable(self, node: Node) -> bool:
        if node.domain not in (None, "", "ai.onnx") or node.op in UNFOLDED:
            return False
        if node.op in FLATTENING and self.body.opset < 13:
            return False
        if not all(self.is_constant(tensor) or not tensor.name for tensor in node.inputs):
            return False
        if any(isinstance(value, self._gs.Graph) for value in node.attrs.values()):
            return False
        given: int = sum(math.prod(tensor.shape) for tensor in node.inputs if tensor.name)
        shape = self._tensors.shapes.get(node.outputs[0].name, (None,))
        result: int = math.prod(dim if isinstance(dim, int) else MAX_FOLDED + 1 for dim in shape)
        return given <= MAX_FOLDED and result <= max(given, FOLDED_ANYWAY)

    def _evaluate(self, node: Node) -> Array | None:
        """The value of a node of constants; None where onnx's reference cannot compute it, and it stays a node."""
        inputs = {tensor.name: np.asarray(tensor.values) for tensor in node.inputs if tensor.name}
        return evaluate(self._proto[id(node)], inputs, self.body.opset)


REARRANGING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"}  # the same elements

# Weights stay quantised, and what is drawn at random is no constant.
UNFOLDED = {"DequantizeLinear", "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"}
UNFOLDED |= {"RandomNormalLike", "RandomUniformLike", "Dropout"}
# Before opset 13 these took several axes together, which onnx's reference does not know.
FLATTENING = {"Softmax", "LogSoftmax", "Hardmax"}


def _labels(nodes: list[Node]) -> list[str]:
    names = Counter(node.name for node in nodes)
    return [
        node.name if node.name and names[node.name] == 1 else next((t.name for t in node.outputs), node.op)
        for node in nodes
    ]


def _names_in_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of the tensors that the bodies of If, Loop and Scan among `nodes` read."""
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                for inner in graph.node:
                    yield from inner.input
                    yield from _names_in_bodies([inner])
                yield from (value.name for value in graph.output)


def _is_same(one: Array, other: Array) -> bool:
    """Whether two arrays hold the same bits."""
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and one.tobytes() == other.tobytes()


def _free_name(name: str, taken: set[str]) -> str:
    number = 1
    while f"{name}.{number}" in taken:
        number += 1
    taken.add(f"{name}.{number}")
    return f"{name}.{number}"


def _copy_repeated(source: Message, target: Message, field: str) -> None:
    if field in source.DESCRIPTOR.fields_by_name:  # newer onnx versions know more fields
        target.ClearField(field)
        getattr(target, field).extend(getattr(source, field))
