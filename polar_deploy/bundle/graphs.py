"""Whether an ONNX file from a stranger is a plain classifier: what it may contain before a runtime gets to see it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.errors import ContentError, one_line

if TYPE_CHECKING:
    import onnx

    from polar_deploy.bundle.manifest import ElementType, Manifest

_DOMAINS = {"", "ai.onnx"}
_TODO = "do not use it; ask for the bundle again"


def require_harmless(path: Path, manifest: Manifest, *, typed: bool) -> None:
    """Raise ContentError unless the graph in `path` has the input and output of the manifest, and no more than weights.

    No external data (it names other files), no functions, no operators of other makers, no branches and loops.

    Args:
        path: the ONNX file.
        manifest: of its bundle.
        typed: whether its edges have the types of the manifest; else FP32.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ContentError(f"{path} is no ONNX file: {one_line(error)}", _TODO) from error
    if problem := _problem(model):
        raise ContentError(f"{path} {problem}", _TODO)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ContentError(f"{path} is not valid ONNX: {one_line(error)}", _TODO) from error
    inner, outer = manifest.input, manifest.output
    kinds = (inner.dtype, outer.dtype) if typed else ("fp32", "fp32")
    expected = [(inner.name, kinds[0], inner.shape), (outer.name, kinds[1], (outer.classes,))]
    found = edges(model)
    if found != expected:
        raise ContentError(f"{path} has the edges {found}, the manifest says {expected}", _TODO)


def edges(model: onnx.ModelProto) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, element type and shape behind the batch of every input and output; an unknown size is 0."""
    initial = {tensor.name for tensor in model.graph.initializer}
    values = [*(value for value in model.graph.input if value.name not in initial), *model.graph.output]
    return [_edge(value) for value in values]


def element_type(name: str) -> ElementType:
    """The manifest's word for an element type of `edges`, one of three."""
    known: dict[str, ElementType] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
    if name not in known:
        raise ContentError(f"an edge of type {name} cannot be bundled", "export the network with floating-point edges")
    return known[name]


def _edge(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int, ...]]:
    import onnx

    tensor = value.type.tensor_type
    written = onnx.TensorProto.DataType.Name(tensor.elem_type)
    kind = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}.get(written, written.lower())
    return value.name, kind, tuple(size.dim_value for size in tensor.shape.dim[1:])


def _problem(model: onnx.ModelProto) -> str | None:
    """What the file contains that a plain classifier does not need, or None."""
    import onnx

    if model.functions:
        return f"defines a function, {model.functions[0].name!r}"
    if model.graph.sparse_initializer:
        return "has sparse weights"
    if foreign := next((each.domain for each in model.opset_import if each.domain not in _DOMAINS), None):
        return f"asks for operators of {foreign!r}"
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        place = f"node {node.name!r} ({node.op_type})"
        if node.domain not in _DOMAINS:
            return f"has {place}, an operator of {node.domain!r}"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"has {place} with a graph of its own"
            tensors += [attribute.t, *attribute.tensors]
    if outside := next((each for each in tensors if each.data_location == onnx.TensorProto.EXTERNAL), None):
        return f"keeps the tensor {outside.name!r} in another file"
    return None
