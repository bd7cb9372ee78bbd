"""Reading an ONNX file before a backend sees it: whole and valid. And which node a backend complains about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.errors import ContentError, UsageError, one_line

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


def blame(model: onnx.ModelProto, message: str) -> str:
    """Say which node of the network a backend's error message is about: "node 'x' (operator Conv): "; "" if unknown."""
    from polar_deploy.precision.graph import described

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
