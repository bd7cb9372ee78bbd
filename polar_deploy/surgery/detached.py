"""A model with its large constants beside the graph: nothing is held twice, and more than 2 GB fit.

Protobuf ends at 2 GB, copies data whenever it hands it out, and frees nothing before the whole message goes. So the
graph is a small ModelProto, and its weights are arrays: taken out of the message once, or mapped from the file of
external data and read where they are touched.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError, UsageError
from polar_deploy.surgery import wire
from polar_deploy.surgery.inference import Skeleton
from polar_deploy.surgery.validation import EXPORT_AGAIN, SMALL, check_text, dtype_of, first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    import onnx
    from google.protobuf.message import Message

Array = npt.NDArray[Any]
ANNOTATIONS = "quantization_annotation"
PACKED = ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")  # several elements a byte
FIELDS = ("float_data", "int32_data", "int64_data", "uint64_data", "double_data", "string_data")
DATA = ("raw_data", *FIELDS, "external_data", "data_location")  # what may hold the values of a tensor
MAX_MESSAGE = 2**31 - 2**20  # bytes: what protobuf can write, less room for the graph itself
DATA_ALIGNMENT = 4096  # bytes: where tensors start in a file of external data, so that readers can map them


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

    @property
    def needs_data_file(self) -> bool:
        """Whether the weights go into a file beside the model: they came from one, or a message cannot hold them."""
        return self.external or sum(array.nbytes for array in self.arrays.values()) > MAX_MESSAGE


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

    model = onnx.ModelProto()
    model.CopyFrom(detached.model)
    at = 0
    with open(data, "wb") as file:
        for tensor in model.graph.initializer:
            if tensor.name in detached.arrays:
                at = -(-at // DATA_ALIGNMENT) * DATA_ALIGNMENT
                file.seek(at)
                np.ascontiguousarray(detached.arrays[tensor.name]).tofile(file)
                _refer(tensor, name or data.name, at, file.tell() - at)
                at = file.tell()
    path.write_bytes(model.SerializeToString(deterministic=True))


def refer_to(path: Path, name: str) -> None:
    """Makes the model in `path` look for its external data in the file `name`."""
    import onnx

    model = onnx.load_model(path, format="protobuf", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    path.write_bytes(model.SerializeToString(deterministic=True))


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    import onnx

    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _detach(
    model: onnx.ModelProto, name: str, folder: Path | None, check: bool, weights: dict[int, Array] | None
) -> DetachedModel:
    """`weights`: of a message that may be changed, the data of initializers that was left out, by their positions.

    None: the message is somebody else's, and whole.
    """
    import onnx

    check_text(model, name)
    shell = _copy_without_weights(model) if weights is None else model
    weights = weights or {}
    sort_nodes(shell.graph)
    detached = DetachedModel(shell)
    files: dict[str, Array] = {}
    for index, (tensor, own) in enumerate(zip(model.graph.initializer, shell.graph.initializer, strict=True)):
        where = f"initializer {tensor.name} of {name}"
        external = tensor.data_location == onnx.TensorProto.EXTERNAL
        detached.external |= external
        if index in weights and (external or _is_packed(tensor) or math.prod(tensor.dims) <= SMALL):
            tensor.raw_data = weights.pop(index).tobytes()
        values = _mapped(tensor, where, folder, files) if external else _values(tensor, where, weights.get(index))
        if values is None or values.size <= SMALL:
            if external or shell is not model:
                own.CopyFrom(tensor if values is None else _inline(tensor, values))
        else:
            detached.arrays[tensor.name] = values
            for part in DATA:
                own.ClearField(part)
    for tensor in _other_tensors(shell.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(_inline(tensor, _mapped(tensor, f"constant {tensor.name} of {name}", folder, files)))
    if check:
        detached.skeleton.check(name)
    return detached


def _copy_without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    shell = onnx.ModelProto()
    copy_fields(model, shell, ("graph",))
    copy_fields(model.graph, shell.graph, ("initializer",))
    for tensor in model.graph.initializer:
        header = shell.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        for part in ("doc_string", "metadata_props"):
            copy_field(tensor, header, part)
    return shell


def _inline(tensor: onnx.TensorProto, values: Array) -> onnx.TensorProto:
    """The same tensor with its data inside."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=values.tobytes())


def _values(tensor: onnx.TensorProto, where: str, weights: Array | None) -> Array | None:
    """The values of a tensor with its data inside; None where they are best left there (packed, text).

    weights: its data, where that was left out.

    Raises:
        ContentError: its data is not as long as its shape says; onnx.checker does not look.
    """
    import onnx

    if any(dim < 0 for dim in tensor.dims):
        raise ContentError(f"{where} has the shape {list(tensor.dims)}", EXPORT_AGAIN)
    is_raw = weights is not None or tensor.HasField("raw_data")
    filled = [name for name in FIELDS if len(getattr(tensor, name))] if is_raw else []
    if filled:
        raise ContentError(f"{where} has its values twice, as raw_data and as {filled[0]}", EXPORT_AGAIN)
    try:
        if not is_raw or _is_packed(tensor):
            values: Array = onnx.numpy_helper.to_array(tensor)
            return None if _is_packed(tensor) or values.dtype == object else values
        data = tensor.raw_data if weights is None else weights
        dtype = dtype_of(tensor.data_type)
        wanted = math.prod(tensor.dims) * dtype.itemsize
        if len(data) != wanted:
            raise ValueError(f"{len(data)} bytes of data, the shape {list(tensor.dims)} wants {wanted}")
        return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))
    except (ValueError, TypeError, KeyError) as error:
        raise ContentError(f"{where} is damaged: {first_line(error)}", EXPORT_AGAIN) from error


def _mapped(tensor: onnx.TensorProto, where: str, folder: Path | None, files: dict[str, Array]) -> Array:
    """The values of a tensor in a file of external data, as a view of that file.

    Raises:
        ContentError: the file is missing, lies outside the model's folder, or is too short.
    """

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ContentError(f"{where} lies in another file, {location!r}", "load the model with its external data")
    if _is_packed(tensor):
        raise ContentError(f"{where}: external data of type {_kind(tensor)} is not supported", "store it inside")
    if location not in files:
        files[location] = _map(folder, location, where)
    try:
        dtype = dtype_of(tensor.data_type)
        wanted = math.prod(tensor.dims) * dtype.itemsize
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", wanted))
        if offset < 0 or length != wanted or any(dim < 0 for dim in tensor.dims):
            raise ValueError(f"offset {offset}, length {length}; the shape {list(tensor.dims)} wants {wanted} bytes")
        if offset + length > files[location].size:
            raise ValueError(f"{location} has {files[location].size} bytes, it wants those up to {offset + length}")
    except (ValueError, TypeError, KeyError) as error:
        raise ContentError(f"external data of {where} is damaged: {first_line(error)}", EXPORT_AGAIN) from error
    return files[location][offset : offset + length].view(dtype).reshape(tuple(tensor.dims))


def _map(folder: Path, location: str, where: str) -> Array:
    """A file of external data as bytes. What is not below the model's folder is not opened, links included."""
    keep = "keep the data files beside the model, inside its folder"
    pure = PurePosixPath(location)
    if not location or "\0" in location or pure.is_absolute() or ".." in pure.parts or "\\" in location:
        raise ContentError(f"external data of {where} points outside the model's folder: {location!r}", keep)
    path = folder / location
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ContentError(f"external data of {where} leads outside the model's folder: {location!r}", keep)
        if not path.is_file():
            raise ContentError(f"external data of {where} is missing: {path}", keep)
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise ContentError(f"external data of {where} cannot be read: {first_line(error)}", keep) from error


def _kind(tensor: onnx.TensorProto) -> str:
    """Name of the element type."""
    import onnx

    name: str = onnx.TensorProto.DataType.Name(tensor.data_type)
    return name


def _is_packed(tensor: onnx.TensorProto) -> bool:
    """Whether several elements are in a byte."""
    return tensor.data_type in _packed_types()


@cache
def _packed_types() -> frozenset[int]:
    import onnx

    known = onnx.TensorProto.DataType
    return frozenset(known.Value(name) for name in PACKED if name in known.keys())  # noqa: SIM118


def _other_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes and in the bodies of If, Loop and Scan."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                yield from body.initializer
                yield from _other_tensors(body)


def copy_fields(source: Message, target: Message, without: Collection[str]) -> None:
    """Copies all fields of a message but for some."""
    for descriptor, _ in source.ListFields():
        if descriptor.name not in without:
            copy_field(source, target, descriptor.name)


def copy_field(source: Message, target: Message, name: str) -> None:
    """Copies one field of a message, where there is such a one."""
    if name not in source.DESCRIPTOR.fields_by_name:
        return  # newer onnx versions know more fields
    value = getattr(source, name)
    if isinstance(value, (str, bytes, int, float)):
        if source.HasField(name):
            setattr(target, name, value)
    elif hasattr(value, "extend"):
        getattr(target, name).extend(value)
    else:
        getattr(target, name).CopyFrom(value)


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Puts nodes behind those that they read from; where that is so already, or cannot be, nothing changes."""
    makers = {name: position for position, node in enumerate(graph.node) for name in node.output if name}
    reads = [_read_by(node) for node in graph.node]
    if all(makers.get(name, -1) < position for position, names in enumerate(reads) for name in names):
        return
    try:
        before = [{makers[name] for name in names if name in makers} for names in reads]
        order = list(TopologicalSorter(dict(enumerate(before))).static_order())
    except CycleError:
        return  # the checker says so
    nodes = [graph.node[position] for position in order]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _read_by(node: onnx.NodeProto) -> list[str]:
    """Names of the tensors that a node reads, its bodies included."""
    return [*node.input, *names_in_bodies([node])]


def names_in_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of the tensors that the bodies of If, Loop and Scan among `nodes` read."""
    for node in nodes:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                for inner in body.node:
                    yield from inner.input
                    yield from names_in_bodies([inner])
                yield from (value.name for value in body.output)


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
