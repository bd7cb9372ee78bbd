"""The one door to ONNX files: reading them, and saying which node a runtime complains about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.errors import ContentError, UsageError, one_line

if TYPE_CHECKING:
    import onnx

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
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ContentError(f"{path} is not valid ONNX: {one_line(error)}", _EXPORT_AGAIN) from error
    return model


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
