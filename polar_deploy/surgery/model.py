"""Is a stranger's graph valid, and which shape has each of its tensors? One clear error for whatever is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from polar_deploy.errors import ContentError
from polar_deploy.surgery.arithmetic import complete
from polar_deploy.surgery.sizes import (
    USUAL,
    Dim,
    Shape,
    Sizes,
    assign,
    candidates,
    fill,
    first_that,
    input_shapes,
    two_probes,
)
from polar_deploy.surgery.standins import STANDARD, stand_ins

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    from google.protobuf.message import Message


class Tensors(NamedTuple):
    """What shape inference knows of the tensors of a graph, by name: shapes, and ONNX element types."""

    shapes: dict[str, Shape]
    types: dict[str, int]


SMALL = 1024  # elements; larger constants are no shape arithmetic and stay out of shape inference
EXPORT_AGAIN = "export the model again and check it with onnx.checker"


class NotUnderstoodError(ContentError):
    """What onnx's own checks find wrong with a graph; ONNX Runtime may run it all the same."""


def check_text(model: onnx.ModelProto, name: str) -> None:
    """Raises ContentError where `model` holds no graph, or text that is not UTF-8."""
    if not model.graph.node or not model.graph.output:
        raise ContentError(f"{name} holds an empty graph", "give an ONNX file with nodes and outputs")
    for text in _texts(model):
        if not _is_utf8(text):
            raise ContentError(f"{name} holds text that is not UTF-8: {text!r}", EXPORT_AGAIN)


def check_graph(model: onnx.ModelProto, name: str) -> None:
    """Raises ContentError where `model` is no valid graph (cyclic, duplicate names, wrong attributes).

    What it declares of shapes, be it missing, negative or wrong, is not looked at.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in STANDARD and opset.version > newest:
            raise NotUnderstoodError(
                f"{name} wants opset {opset.version}, the installed onnx knows {newest}", "install a newer onnx"
            )
    skeleton = _skeleton(model)
    for value in (*skeleton.graph.input, *skeleton.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()  # the checker insists on one
    try:
        for tensor in model.graph.sparse_initializer:
            onnx.checker.check_sparse_tensor(tensor)
        onnx.checker.check_model(skeleton)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise NotUnderstoodError(f"{name} is not valid ONNX: {first_line(error)}", EXPORT_AGAIN) from error


def _texts(message: Message) -> Iterator[str | bytes]:
    """All text in a model, attributes included; protobuf hands out what is not UTF-8 as bytes."""
    if message.DESCRIPTOR.name == "TensorProto":  # touching the data would copy it
        yield from (message.name, message.doc_string)
        return
    for field, value in message.ListFields():
        values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)
        if field.type == field.TYPE_MESSAGE:
            for item in values:
                yield from _texts(item)
        elif field.type in (field.TYPE_STRING, field.TYPE_BYTES):
            yield from values


def _is_utf8(text: str | bytes) -> bool:
    try:
        str(text, "utf-8") if isinstance(text, bytes) else text.encode()
    except UnicodeError:
        return False
    return True


def first_line(error: Exception) -> str:
    """The first line of a message that may run over pages."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large initializers are inputs without data: quick to check and to infer shapes on.

    `model` may be one whose weights were taken out, see `stored`.
    """
    import onnx

    custom = set(not_inferred(model))
    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    for value in graph.output:  # what is declared may be wrong
        if value.type.HasField("tensor_type") and value.name not in custom:
            value.type.tensor_type.ClearField("shape")
    listed = {value.name for value in model.graph.input}
    graph.input.extend(model.graph.input)
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if dim.dim_value < 0:
                dim.ClearField("dim_value")
    for sparse in model.graph.sparse_initializer:
        name, kind = sparse.values.name, sparse.values.data_type
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, sparse.dims))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph.value_info.extend(value for value in model.graph.value_info if value.name in custom)
    version = model.ir_version  # from 4 on, initializers need not be inputs
    version = max(version, 4) if version > 0 else version
    skeleton = onnx.ModelProto(ir_version=version, graph=graph)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    return skeleton


def not_inferred(model: onnx.ModelProto) -> list[str]:
    """Names of what is made by operators that onnx infers no shapes for: those of other domains."""
    functions = {(function.domain, function.name) for function in model.functions}
    nodes = [
        node
        for node in model.graph.node
        if node.domain not in STANDARD and (node.domain, node.op_type) not in functions and stand_ins(node) is None
    ]
    return [name for node in nodes for name in node.output if name]


def infer_shapes(model: onnx.ModelProto, *, strict: bool = True) -> Tensors:
    """The shape and type of every tensor that has one.

    Dynamic dimensions are found out by inference at two input sizes: two tensors share a dimension where both sizes
    agree, which symbols alone do not tell behind a strided convolution.

    Args:
        strict: whether shapes that contradict each other are an error; else they are not known.

    Raises:
        NotUnderstoodError: the graph's shapes contradict each other.
    """
    skeleton = _skeleton(model)
    if any(isinstance(dim, str) for shape in input_shapes(model).values() for dim in shape):
        found = two_probes(model, lambda sizes: _infer_with(skeleton, sizes, strict))
        if found is not None:
            first, second = found
            shapes = ((name, _merge(shape, second.shapes.get(name, ()))) for name, shape in first.shapes.items())
            return Tensors({name: shape for name, shape in shapes if shape is not None}, first.types)
    return _infer(skeleton, strict)


def infer_at(
    model: onnx.ModelProto, batch: int, *, strict: bool = True
) -> tuple[dict[str, tuple[int, ...]], dict[str, Shape]]:
    """The input shapes at one batch size, and the shape of every tensor; sizes are 224 where the graph takes that.

    Raises:
        ContentError: no size was found that the graph takes.
    """
    skeleton = _skeleton(model)
    shapes = input_shapes(model)
    usual = assign(shapes, batch, USUAL)
    try:
        return fill(shapes, usual), _infer_with(skeleton, usual, strict).shapes
    except ContentError:
        found = first_that(lambda sizes: _infer_with(skeleton, sizes, strict), candidates(model, (batch,)))
        if found is None:
            raise
        return fill(shapes, found[0]), found[1].shapes


def _merge(first: Shape, second: Shape) -> Shape | None:
    """What is known of a shape that was found at two input sizes; None: not even its rank."""

    def dim(a: Dim, b: Dim) -> Dim:
        if isinstance(a, int) and isinstance(b, int):
            return a if a == b else (a, b)
        return a if a == b else None

    if len(first) != len(second):
        return None
    return tuple(dim(a, b) for a, b in zip(first, second, strict=True))


def _infer_with(skeleton: onnx.ModelProto, sizes: Sizes, strict: bool) -> Tensors:
    """Inference with numbers in place of the symbols of the inputs."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    shapes = fill(input_shapes(model), sizes)
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    for value in model.graph.value_info:
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    return _infer(model, strict)


def _infer(skeleton: onnx.ModelProto, strict: bool) -> Tensors:
    import onnx

    _replace_nodes(skeleton.graph)
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, check_type=strict, strict_mode=strict, data_prop=True).graph
        types = {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}
        types.update((x.name, onnx.helper.make_tensor_type_proto(x.data_type, x.dims)) for x in graph.initializer)
        complete(skeleton, types)
        shapes = dict(_shapes(types))
        _check_reshapes(skeleton, shapes)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise NotUnderstoodError(
            f"the model's shapes contradict each other: {first_line(error)}", EXPORT_AGAIN
        ) from error
    return Tensors(shapes, {name: kind.tensor_type.elem_type for name, kind in types.items()})


def _replace_nodes(graph: onnx.GraphProto) -> None:
    """Puts stand-ins where there are any."""
    found = [stand_ins(node) for node in graph.node]
    if all(nodes is None for nodes in found):
        return
    new = [copy for node, nodes in zip(graph.node, found, strict=True) for copy in (nodes or [node])]
    copies = [type(node).FromString(node.SerializeToString()) for node in new]
    del graph.node[:]
    graph.node.extend(copies)


def _check_reshapes(skeleton: onnx.ModelProto, shapes: dict[str, Shape]) -> None:
    """Raises ValueError where a Reshape gets another number of elements than it makes, which inference lets pass."""
    for node in skeleton.graph.node:
        if node.op_type == "Reshape" and node.domain in STANDARD:
            sizes = [shapes.get(name, (None,)) for name in (node.input[0], node.output[0])]
            counts = [math.prod(dim for dim in shape if isinstance(dim, int)) for shape in sizes]
            if all(isinstance(dim, int) for shape in sizes for dim in shape) and counts[0] != counts[1]:
                raise ValueError(f"Reshape {node.name} makes {list(sizes[1])} of {list(sizes[0])}")


def _shapes(types: dict[str, onnx.TypeProto]) -> Iterator[tuple[str, Shape]]:
    for name, kind in types.items():
        if kind.HasField("tensor_type") and kind.tensor_type.HasField("shape"):
            dims = kind.tensor_type.shape.dim
            yield name, tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)
