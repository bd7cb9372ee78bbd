"""A model with its large constants beside the graph: nothing is held twice, and more than 2 GB fit.

Protobuf ends at 2 GB, copies data whenever it hands it out, and frees nothing before the whole message goes. So the
graph is a small ModelProto, and its weights are arrays: taken out of the message once, or mapped from the file of
external data and read where they are touched.
"""

from __future__ import annotations

import heapq
import math
import mmap
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy import onnx_files
from polar_deploy.errors import ContentError, UsageError, first_line
from polar_deploy.surgery import tensor_data, wire
from polar_deploy.surgery.inference import Skeleton
from polar_deploy.surgery.ir import BODIES, PLAIN, has_body
from polar_deploy.surgery.standins import STANDARD
from polar_deploy.surgery.validation import SMALL, check_text
from polar_deploy.workspace import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx

Array = npt.NDArray[Any]
ANNOTATIONS = "quantization_annotation"


@dataclass
class DetachedModel:
    """A checked model. `model`: its graph, in which large initializers have a name, type and shape, and no data.

    arrays: their values, by name.
    external: whether the values lay in a file of their own, and so belong into one again.
    strict: whether what onnx's inference finds wrong with its shapes is an error.
    heads: whether channels are followed through attention heads.
    """

    model: onnx.ModelProto
    arrays: dict[str, Array] = field(default_factory=dict)
    external: bool = False
    strict: bool = True
    heads: bool = True

    @cached_property
    def skeleton(self) -> Skeleton:
        """What onnx says about it. The graph must not change any more."""
        return Skeleton(self.model, strict=self.strict)

    @cached_property
    def attribute_types(self) -> frozenset[int]:
        """The types of all attributes: in most graphs those of numbers and text alone."""
        return frozenset(entry.type for node in self.model.graph.node for entry in node.attribute)

    @property
    def has_bodies(self) -> bool:
        """Whether a node holds others, as an If, Loop or Scan does."""
        return not BODIES.isdisjoint(self.attribute_types)

    @property
    def sparse(self) -> set[str]:
        """The names of the constants that are held as sparse tensors."""
        return {tensor.values.name for tensor in self.model.graph.sparse_initializer}

    @property
    def needs_data_file(self) -> bool:
        """Whether the weights go into a file beside the model: they came from one, or a message cannot hold them."""
        return self.external or sum(array.nbytes for array in self.arrays.values()) > onnx_files.MAX_MESSAGE


def detach_weights(model: onnx.ModelProto, *, check: bool = True) -> DetachedModel:
    """Takes the weights out of `model`, which is left as it is. `check`: whether it is valid ONNX.

    Raises:
        ContentError: the model is invalid.
    """
    return _detach(model, "the model", None, check, None)


def read(path: Path, *, check: bool = True) -> DetachedModel:
    """Reads the model in `path`; external data is mapped, not read. `check`: whether it is valid ONNX.

    Raises:
        UsageError: the path is missing or a folder.
        ContentError: the file is not a valid ONNX model, or its external data is missing, damaged or elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise UsageError(f"{path} is not a file", "give the path of an ONNX file")
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b"")
        found = wire.split(data)
        places = {} if found is None else found.weights
        weights = {index: np.frombuffer(data[at : at + size], np.uint8) for index, (at, size) in places.items()}
        try:
            model = onnx.ModelProto.FromString(data.tobytes() if found is None else found.model)
        except (DecodeError, ValueError) as error:
            raise ContentError(
                f"{path} is not an ONNX file: {first_line(error)}", "give a complete ONNX file"
            ) from error
    return _detach(model, str(path), path.parent, check, weights)


def are_same(one: DetachedModel, other: DetachedModel) -> bool:
    """Whether two models would be written as the same bytes."""
    if one is other:
        return True
    graphs = [each.model.SerializeToString(deterministic=True) for each in (one, other)]
    return graphs[0] == graphs[1] and all(
        values.tobytes() == other.arrays[name].tobytes()
        for name, values in one.arrays.items()
        if values is not other.arrays[name]
    )


def to_model(detached: DetachedModel) -> onnx.ModelProto:
    """The model as one message."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(detached.model)
    for tensor in model.graph.initializer:
        if tensor.name in detached.arrays:
            tensor.raw_data = detached.arrays[tensor.name].tobytes()
    return model


def write(detached: DetachedModel, path: Path, data: Path | None = None, name: str | None = None) -> None:
    """Writes a model to `path`: in one file, or with the weights in the file `data` (referred to as `name`)."""
    if data is None:
        weights = {
            index: np.ascontiguousarray(detached.arrays[tensor.name]).reshape(-1).view(np.uint8).data
            for index, tensor in enumerate(detached.model.graph.initializer)
            if tensor.name in detached.arrays
        }
        with open(path, "wb") as file:
            file.writelines(wire.join(detached.model.SerializeToString(deterministic=True), weights))
        return
    import onnx

    graph = onnx.ModelProto()
    graph.CopyFrom(detached.model)
    onnx_files.write_beside(graph, detached.arrays.get, path, data, name or data.name)


def write_files(detached: DetachedModel, path: Path) -> None:
    """Writes a model to `path`, and its weights to PATH.data if that is where they belong."""
    write(detached, path, onnx_files.data_path(path) if detached.needs_data_file else None)


def save(model: DetachedModel | onnx.ModelProto, path: Path) -> None:
    """Writes a model to `path`, atomically; what one file cannot hold, with its weights in PATH.data beside it."""
    data = onnx_files.data_path(path)
    beside = model.needs_data_file if isinstance(model, DetachedModel) else onnx_files.is_large(model)
    with ExitStack() as files:  # they are moved into place at the end, the last one entered first
        graph = files.enter_context(atomic_path(path))
        weights = files.enter_context(atomic_path(data)) if beside else None
        if isinstance(model, DetachedModel):
            write(model, graph, weights, data.name)
        else:
            onnx_files.write(model, graph, weights, data.name)
    if not beside:
        data.unlink(missing_ok=True)  # of a larger model that was there before


def copy(source: Path, target: Path) -> None:
    """Copies a model, atomically. Weights beside `source` are beside `target` only if one file cannot hold them.

    Raises:
        As `read`.
    """
    model = read(source, check=False)
    if model.external:
        save(replace(model, external=False), target)
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
    onnx_files.data_path(target).unlink(missing_ok=True)


def refer_to(path: Path, name: str) -> None:
    """Makes the model in `path` look for its external data in the file `name`."""
    model = onnx_files.read(path, external=False, check=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString(deterministic=True))


def _detach(
    model: onnx.ModelProto, name: str, folder: Path | None, check: bool, weights: dict[int, Array] | None
) -> DetachedModel:
    """`weights`: of a message that may be changed, the data of initializers that was left out, by their positions.

    None: the message is somebody else's, and whole.
    """
    import onnx

    check_text(model, name)
    shell = onnx_files.without_weights(model) if weights is None else model
    weights = weights or {}
    detached = DetachedModel(shell)
    _name_standard(shell, nested=detached.has_bodies or bool(shell.functions))
    sort_nodes(shell.graph, nested=detached.has_bodies)
    files: dict[str, Array] = {}
    for index, (tensor, own) in enumerate(zip(model.graph.initializer, shell.graph.initializer, strict=True)):
        where = f"initializer {tensor.name} of {name}"
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        detached.external |= external
        if index in weights and (external or tensor_data.is_packed(tensor) or math.prod(tensor.dims) <= SMALL):
            tensor.raw_data = weights.pop(index).tobytes()
        values = (
            tensor_data.mapped(tensor, where, folder, files)
            if external
            else tensor_data.inside(tensor, where, weights.get(index))
        )
        if values is None or values.size <= SMALL:
            if external or shell is not model:
                own.CopyFrom(tensor if values is None else tensor_data.inline(tensor, values))
        else:
            detached.arrays[tensor.name] = values
            for part in tensor_data.DATA:
                own.ClearField(part)
    for tensor in () if detached.attribute_types <= PLAIN else _other_tensors(shell.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(
                tensor_data.inline(
                    tensor, tensor_data.mapped(tensor, f"constant {tensor.name} of {name}", folder, files)
                )
            )
    if check:
        detached.skeleton.check(name)
    return detached


def _name_standard(model: onnx.ModelProto, *, nested: bool) -> None:
    """Calls the domain of ONNX's own operators "", which is how onnx knows "ai.onnx", at every node.

    nested: whether any node holds others.
    """
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        if node.domain and node.domain in STANDARD:
            node.ClearField("domain")
        if nested and has_body(node):
            pending += [inner for body in bodies(node) for inner in body.node]


def _other_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes and in the bodies of If, Loop and Scan."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for body in bodies(node):
            yield from body.initializer
            yield from _other_tensors(body)


def sort_nodes(graph: onnx.GraphProto, *, nested: bool = True) -> None:
    """Puts nodes behind those that they read from, and otherwise leaves their order; cycles stay, the checker tells.

    nested: whether any node may hold others.
    """
    read = [reads(node) if nested else node.input for node in graph.node]
    makers = {name: position for position, node in enumerate(graph.node) for name in node.output if name}
    if all(makers.get(name, -1) < position for position, names in enumerate(read) for name in names):
        return  # as in nearly every graph
    needs = [{makers[name] for name in names if name in makers} for names in read]
    readers: list[list[int]] = [[] for _ in needs]
    for position, before in enumerate(needs):
        for maker in before:
            readers[maker].append(position)
    order: list[int] = []
    ready = [position for position, before in enumerate(needs) if not before]  # sorted, so a heap
    while ready:
        order.append(heapq.heappop(ready))
        for reader in readers[order[-1]]:
            needs[reader].remove(order[-1])
            if not needs[reader]:
                heapq.heappush(ready, reader)
    if len(order) == len(needs):
        put_nodes(graph, [graph.node[position] for position in order])


def put_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Puts nodes, some of which may be the graph's own, in place of those that it has."""
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def reads(node: onnx.NodeProto) -> list[str]:
    """Names of the tensors that a node reads, and that are read in its bodies."""
    return [*node.input, *names_in_bodies([node])] if has_body(node) else list(node.input)


def names_in_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of the tensors that the bodies of If, Loop and Scan among `nodes` read."""
    for node in nodes:
        for body in bodies(node):
            for inner in body.node:
                yield from inner.input
                yield from names_in_bodies([inner])
            yield from (value.name for value in body.output)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds."""
    for attribute in node.attribute:
        if attribute.type in BODIES:
            yield from (attribute.g, *attribute.graphs)


def annotated(graph: onnx.GraphProto) -> set[str]:
    """Names of the constants that `quantization_annotation` refers to."""
    return {entry.value for note in graph.quantization_annotation for entry in note.quant_parameter_tensor_names}


def copy_annotations(source: onnx.GraphProto, target: onnx.GraphProto) -> None:
    """Copies the `quantization_annotation` of tensors that are left, but for scales with an entry a channel."""
    names = {name for node in target.node for name in (*node.input, *node.output)}
    scalars = {tensor.name for tensor in target.initializer if math.prod(tensor.dims) == 1}
    for note in source.quantization_annotation:
        whole = all(entry.value in scalars for entry in note.quant_parameter_tensor_names)
        if note.tensor_name in names and whole:
            target.quantization_annotation.add().CopyFrom(note)
