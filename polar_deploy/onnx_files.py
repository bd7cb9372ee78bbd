"""The one door to ONNX files: reading and writing them, and saying which node a runtime complains about.

Protobuf ends at 2 GB. A larger network is two files: NAME.onnx, its graph, and NAME.onnx.data, its weights, as ONNX's
external data; `data_path` says where.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError, UsageError, one_line

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

Array = npt.NDArray[Any]
MAX_MESSAGE = 2**31 - 2**20  # bytes: what protobuf can write, less room for the graph itself
DATA_ALIGNMENT = 4096  # bytes: where tensors start in a file of external data, so that readers can map them
SMALL = 1024  # elements: such constants stay in the graph, which needs them to know its shapes
# Metadata of a mask's Mul: the sites whose gates it closes, their kinds, and which channel belongs to which gate.
SITE, KIND, GATES = "polar_deploy.site", "polar_deploy.kind", "polar_deploy.gates"
_EXPORT_AGAIN = "export the network again; `onnx.checker.check_model` shows what is wrong with this file"


def read(path: Path, *, external: bool = True, check: bool = True) -> onnx.ModelProto:
    """Read an ONNX file.

    Surgery reads by `surgery.detached` what may not fit into memory twice.

    Args:
        path: the file.
        external: whether weights that lie in files beside it are read too.
        check: whether it has to be valid; files that this package wrote are.

    Raises:
        UsageError: no such file.
        ContentError: empty, not ONNX, cut short, without its external data, or invalid; the message names node and
            operator where there is one.
    """
    import onnx

    if not path.is_file():
        raise UsageError(f"there is no file {path}", "run the stage that writes it, or correct the path")
    if path.stat().st_size == 0:
        raise ContentError(f"{path} is empty", _EXPORT_AGAIN)
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=external)
    except (OSError, MemoryError):
        raise
    except onnx.checker.ValidationError as error:
        raise ContentError(f"{path}: {one_line(error)}", "keep the external data beside the ONNX file") from error
    except Exception as error:  # on strange bytes, protobuf fails in many ways
        raise ContentError(f"{path} is not an ONNX file, or is cut short: {one_line(error)}", _EXPORT_AGAIN) from error
    if check:
        try:
            onnx.checker.check_model(str(path) if is_large(model) else model)
        except onnx.checker.ValidationError as error:
            raise ContentError(f"{path} is not valid ONNX: {one_line(error)}", _EXPORT_AGAIN) from error
    return model


def data_path(path: Path) -> Path:
    """Where the weights of an ONNX file lie, if they lie beside it."""
    return path.with_name(f"{path.name}.data")


def with_data(paths: Iterable[Path]) -> list[Path]:
    """Files, each ONNX file with that of its weights if there is one."""
    return [each for path in paths for each in (path, data_path(path)) if each == path or each.is_file()]


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the values of a tensor lie in another file."""
    return bool(tensor.data_location == 1)  # onnx.TensorProto.EXTERNAL


def is_large(model: onnx.ModelProto) -> bool:
    """Whether protobuf cannot write a model in one piece."""
    return sum(_bytes(tensor) for tensor in model.graph.initializer) > MAX_MESSAGE


def _bytes(tensor: onnx.TensorProto) -> int:
    import onnx

    return int(math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


@contextmanager
def loadable(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """What a runtime loads a model from: its bytes; of a large one the path of a file, which is gone afterwards."""
    if not is_large(model):
        yield model.SerializeToString()
        return
    import tempfile

    with tempfile.TemporaryDirectory(prefix="polar_deploy-") as folder:
        path = Path(folder, "model.onnx")
        write(model, path, data_path(path))
        yield str(path)


def write(model: onnx.ModelProto, path: Path, data: Path | None = None, name: str | None = None) -> None:
    """Write a model to `path`: in one piece, or with its weights in the file `data` (referred to as `name`)."""

    if data is None:
        path.write_bytes(model.SerializeToString())
        return
    graph, weights = without_weights(model), {}
    for tensor, header in zip(model.graph.initializer, graph.graph.initializer, strict=True):
        if math.prod(tensor.dims) > SMALL and tensor.HasField("raw_data"):
            weights[tensor.name] = tensor
        else:
            header.CopyFrom(tensor)

    def values(name: str) -> Array | None:
        return np.frombuffer(weights[name].raw_data, np.uint8) if name in weights else None

    write_beside(graph, values, path, data, name or data.name)


def write_beside(
    graph: onnx.ModelProto, values: Callable[[str], Array | None], path: Path, data: Path, name: str
) -> None:
    """Write a graph to `path`, which will refer to its weights as `name`, and these to `data`.

    Args:
        graph: its initializers, which have no data here; it is changed.
        values: of an initializer, by its name; None: it stays in the graph as it is.
    """
    import onnx

    at = 0
    with data.open("wb") as file:
        for tensor in graph.graph.initializer:
            if (array := values(tensor.name)) is None:
                continue
            at = -(-at // DATA_ALIGNMENT) * DATA_ALIGNMENT
            file.seek(at)
            np.ascontiguousarray(array).tofile(file)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", at), ("length", file.tell() - at)):
                tensor.external_data.add(key=key, value=str(value))
            at = file.tell()
    path.write_bytes(graph.SerializeToString(deterministic=True))


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model whose initializers have names, types and shapes, but no data."""
    import onnx

    shell = onnx.ModelProto()
    copy_fields(model, shell, ("graph",))
    copy_fields(model.graph, shell.graph, ("initializer",))
    for tensor in model.graph.initializer:
        header = shell.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        for part in ("doc_string", "metadata_props"):
            copy_field(tensor, header, part)
    return shell


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


def metadata(node: onnx.NodeProto) -> dict[str, str]:
    """What was written beside a node for tools that know the key."""
    return {entry.key: entry.value for entry in node.metadata_props}


def attribute_value(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of one attribute, text as bytes; `default` where the node does not have it."""
    import onnx

    for entry in node.attribute:
        if entry.name == name and not entry.ref_attr_name:
            return onnx.helper.get_attribute_value(entry)
    return default


def described(node: onnx.NodeProto) -> str:
    """A node in an error message: node 'x' (operator Conv)."""
    operator = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
    return f"node {node.name or node.output[0]!r} (operator {operator})"


def blame(model: onnx.ModelProto, message: str) -> str:
    """Say which node of the network a runtime's error message is about: "node 'x' (operator Conv): "; "" if unknown."""
    nodes = list(_nodes(model.graph))
    quoted = [n for n in nodes if n.name and any(f"{a}{n.name}{b}" in message for a, b in ("''", '""', "()"))]
    by_operator = [n for n in nodes if re.search(rf"\b{re.escape(n.op_type)}\(", message)]
    for node in (*quoted, *by_operator):
        return f"{described(node)}: "
    return ""


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
