"""Checks of a model that may be damaged or hostile, before anything else is done with it; and reading its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy import onnx_files
from polar_deploy.errors import ContentError
from polar_deploy.surgery.standins import STANDARD, stand_ins

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

Array = npt.NDArray[Any]
SMALL = onnx_files.SMALL  # elements; larger constants are no shape arithmetic and stay out of shape inference
NUMBERS = (1, 2, 6, 7)  # attribute types: FLOAT, INT, FLOATS, INTS
UNNAMED_OPSET = 11
EXPORT_AGAIN = "export the model again and check it with onnx.checker"


class NotUnderstoodError(ContentError):
    """What onnx's own checks find wrong with a graph; ONNX Runtime may run it all the same."""


def check_text(model: onnx.ModelProto, name: str) -> None:
    """Raises ContentError where `model` holds no graph, or text that is not UTF-8."""
    if not model.graph.node or not model.graph.output:
        raise ContentError(f"{name} holds an empty graph", "give an ONNX file with nodes and outputs")
    try:
        "".join(_texts(model, []))
    except (TypeError, UnicodeError):
        text = next(text for text in _texts(model, [], decoded=False) if not _is_utf8(text))
        raise ContentError(f"{name} holds text that is not UTF-8: {text!r}", EXPORT_AGAIN) from None


def _texts(message: Message, found: list[Any], *, decoded: bool = True) -> list[Any]:
    """Adds all text in a model to `found`, attributes included; protobuf hands out what is not UTF-8 as bytes.

    decoded: whether text in fields for bytes is decoded, which raises UnicodeError.
    """
    kind: Any = message
    name = type(message).__name__
    if name == "TensorProto":  # touching the data would copy it
        found += (kind.name, kind.doc_string)
    elif name == "NodeProto":  # there are many
        found += (kind.name, kind.op_type, kind.domain, kind.doc_string, *kind.input, *kind.output)
        for entry in kind.metadata_props:
            found += (entry.key, entry.value)
        for attribute in kind.attribute:
            if attribute.type in NUMBERS:
                found += (attribute.name, attribute.doc_string)
            else:
                _texts(attribute, found, decoded=decoded)
    else:
        for field, value in message.ListFields():
            values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
            if field.type == field.TYPE_MESSAGE:
                for item in values:
                    _texts(item, found, decoded=decoded)
            elif field.type == field.TYPE_STRING:
                found += values
            elif field.type == field.TYPE_BYTES:
                found += [value.decode() for value in values] if decoded else values
    return found


def _is_utf8(text: str | bytes) -> bool:
    return isinstance(text, str) or _decodes(text)


def _decodes(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeError:
        return False
    return True


def not_inferred(model: onnx.ModelProto) -> list[str]:
    """Names of what is made by operators that onnx infers no shapes for: those of other domains."""
    functions = {(function.domain, function.name) for function in model.functions}
    nodes = [
        node
        for node in model.graph.node
        if node.domain not in STANDARD and (node.domain, node.op_type) not in functions and stand_ins(node) is None
    ]
    return [name for node in nodes for name in node.output if name]


def opset_of(model: onnx.ModelProto) -> int:
    """The opset of the standard operators; of a model that names none, the one that onnx took for granted once."""
    return next((entry.version for entry in model.opset_import if entry.domain in STANDARD), UNNAMED_OPSET)


@cache
def dtype_of(kind: int) -> np.dtype[Any]:
    """The numpy type for an element type of ONNX."""
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(kind)


def array_of(tensor: onnx.TensorProto) -> Array:
    """The values of a tensor that has its data inside."""
    import onnx

    values: Array = onnx.numpy_helper.to_array(tensor)
    return values
