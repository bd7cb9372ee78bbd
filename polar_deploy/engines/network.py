"""Reading an ONNX file before a backend sees it: whole, valid, and of the float type that the target promises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.errors import ContentError, UsageError

if TYPE_CHECKING:
    import onnx

_EXPORT_AGAIN = "export the network again; `onnx.checker.check_model` shows what is wrong with this file"


def read(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, external data included, and check it.

    Raises:
        UsageError: no such file.
        ContentError: empty, not ONNX, cut short, or invalid; the message names node and operator where there is one.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise UsageError(f"there is no file {path}", "run the stage that writes it, or correct the path")
    if path.stat().st_size == 0:
        raise ContentError(f"{path} is empty", _EXPORT_AGAIN)
    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise ContentError(f"{path} is not an ONNX file, or is cut short: {error}", _EXPORT_AGAIN) from error
    except onnx.checker.ValidationError as error:
        raise ContentError(f"{path}: {one_line(error)}", "keep the external data beside the ONNX file") from error
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ContentError(f"{path} is not valid ONNX: {one_line(error)}", _EXPORT_AGAIN) from error
    return model


def require_fp32(model: onnx.ModelProto, path: Path) -> None:
    """Raise ContentError, naming the tensor, if any float tensor of the network is not FP32."""
    import onnx

    for name, code in _element_types(onnx.shape_inference.infer_shapes(model).graph):
        kind = onnx.TensorProto.DataType.Name(code)
        if kind != "FLOAT" and ("FLOAT" in kind or kind.startswith(("DOUBLE", "COMPLEX"))):
            raise ContentError(
                f"{path}: tensor {name!r} is {kind}, but an FP32 engine needs every float tensor to be FLOAT",
                "export the network in FP32; lower precision is the target's job",
            )


def blame(model: onnx.ModelProto, message: str) -> str:
    """Say which node of the network a backend's error message is about: "node 'x' (operator Conv): "; "" if unknown."""
    nodes = list(_nodes(model.graph))
    quoted = [n for n in nodes if n.name and any(f"{a}{n.name}{b}" in message for a, b in ("''", '""', "()"))]
    by_operator = [n for n in nodes if re.search(rf"\b{re.escape(n.op_type)}\(", message)]
    for node in (*quoted, *by_operator):
        operator = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
        return f"node {node.name or node.output[0]!r} (operator {operator}): "
    return ""


def one_line(error: object) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def _element_types(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, value.type.tensor_type.elem_type
    for inner in _subgraphs(graph):
        yield from _element_types(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    yield from graph.node
    for inner in _subgraphs(graph):
        yield from _nodes(inner)


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
