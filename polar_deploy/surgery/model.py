"""Is a stranger's graph valid, and which shape has each of its tensors? One clear error for whatever is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from polar_deploy.errors import ContentError
from polar_deploy.surgery.arithmetic import complete

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    from google.protobuf.message import Message

# A dimension: its size; its sizes at both probes where it depends on the input; its symbol; or unknown.
Dim = int | tuple[int, int] | str | None
Shape = tuple[Dim, ...]


class Tensors(NamedTuple):
    """What shape inference knows of the tensors of a graph, by name: shapes, and ONNX element types."""

    shapes: dict[str, Shape]
    types: dict[str, int]


BATCH_PROBES = (2, 3)
# Sizes that other dynamic dimensions (height, width) are tried at, and how far apart two of them are: five halvings
# make none of them equal, and the odd one tells floor from ceil. Networks that demand multiples of 32 get the second
# pair, those that demand squares the third.
SIZE_PROBES = ((224, 379, 32), (224, 384, 32), (224, 384, 0))
DEFAULT_SIZE = 224
SMALL = 1024  # elements; larger constants are no shape arithmetic and stay out of shape inference
SAME_SHAPE = ("GroupNormalization", "MeanVarianceNormalization")  # as the first input; onnx infers none, or fails

EXPORT_AGAIN = "export the model again and check it with onnx.checker"


def check_text(model: onnx.ModelProto, name: str) -> None:
    """Raises ContentError where `model` holds no graph, or text that is not UTF-8."""
    if not model.graph.node or not model.graph.output:
        raise ContentError(f"{name} holds an empty graph", "give an ONNX file with nodes and outputs")
    for text in _texts(model):
        if not _is_utf8(text):
            raise ContentError(f"{name} holds text that is not UTF-8: {text!r}", EXPORT_AGAIN)


def check_graph(model: onnx.ModelProto, name: str) -> None:
    """Raises ContentError where `model` is no valid graph (cyclic, duplicate names, wrong attributes or shapes)."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ContentError(
                f"{name} wants opset {opset.version}, the installed onnx knows {newest}", "install a newer onnx"
            )
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value < 0:
                raise ContentError(f"dimension {axis} of input {value.name} of {name} is {dim.dim_value}", EXPORT_AGAIN)
    skeleton = _skeleton(model)
    skeleton.graph.value_info.extend(model.graph.value_info)
    try:
        for tensor in model.graph.sparse_initializer:
            onnx.checker.check_sparse_tensor(tensor)
        onnx.checker.check_model(skeleton, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ContentError(f"{name} is not valid ONNX: {first_line(error)}", EXPORT_AGAIN) from error


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

    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    listed = {value.name for value in model.graph.input}
    graph.input.extend(model.graph.input)
    for sparse in model.graph.sparse_initializer:
        name, kind = sparse.values.name, sparse.values.data_type
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, sparse.dims))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    known = {opset.domain for opset in model.opset_import if opset.domain not in ("", "ai.onnx")}
    custom = {name for node in model.graph.node if node.domain in known for name in node.output}  # not inferred
    graph.value_info.extend(value for value in model.graph.value_info if value.name in custom)
    version = (
        max(model.ir_version, 4) if model.ir_version > 0 else model.ir_version
    )  # from 4 on, initializers need not be inputs
    skeleton = onnx.ModelProto(ir_version=version, graph=graph)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    return skeleton


def infer_shapes(model: onnx.ModelProto) -> Tensors:
    """The shape and type of every tensor that has one.

    Dynamic dimensions are found out by inference at two input sizes: two tensors share a dimension where both sizes
    agree, which symbols alone do not tell behind a strided convolution.

    Raises:
        ContentError: the graph's shapes contradict each other.
    """
    skeleton = _skeleton(model)
    if not any(isinstance(dim, str) for shape in input_shapes(model).values() for dim in shape):
        return _infer(skeleton)
    for *sizes, apart in SIZE_PROBES:
        try:
            first, second = (
                _infer(_with_inputs(skeleton, concrete_inputs(model, batch, size, apart)))
                for batch, size in zip(BATCH_PROBES, sizes, strict=True)
            )
        except ContentError:
            continue  # the graph demands other sizes
        shapes = ((name, _merge(shape, second.shapes.get(name, ()))) for name, shape in first.shapes.items())
        return Tensors({name: shape for name, shape in shapes if shape is not None}, first.types)
    return _infer(skeleton)


def infer_at(model: onnx.ModelProto, batch: int) -> dict[str, Shape]:
    """The shape of every tensor at one batch size; other dynamic dimensions of an input are taken as 224.

    Raises:
        ContentError: the graph cannot run at this size.
    """
    return _infer(_with_inputs(_skeleton(model), concrete_inputs(model, batch))).shapes


def input_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Declared shapes of the tensors that a user feeds; a dynamic dimension is a symbol, unnamed ones `input:axis`."""
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes: dict[str, Shape] = {}
    for value in model.graph.input:
        if value.name not in constants and value.type.HasField("tensor_type"):
            shapes[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}:{axis}"
                for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            )
    return shapes


def concrete_inputs(
    model: onnx.ModelProto, batch: int, size: int = DEFAULT_SIZE, apart: int = 0
) -> dict[str, tuple[int, ...]]:
    """Input shapes with the dynamic dimensions filled in: `batch` for a first one, `size` for others.

    apart: how much larger each further one is.
    """
    shapes = input_shapes(model)
    sizes: dict[str, int] = {shape[0]: batch for shape in shapes.values() if shape and isinstance(shape[0], str)}
    others = dict.fromkeys(
        dim for shape in shapes.values() for dim in shape if isinstance(dim, str) and dim not in sizes
    )
    sizes.update((dim, size + apart * number) for number, dim in enumerate(others))
    return {
        name: tuple(dim if isinstance(dim, int) else sizes[dim] if isinstance(dim, str) else size for dim in shape)
        for name, shape in shapes.items()
    }


def _merge(first: Shape, second: Shape) -> Shape | None:
    """What is known of a shape that was found at two input sizes; None: not even its rank."""

    def dim(a: Dim, b: Dim) -> Dim:
        if isinstance(a, int) and isinstance(b, int):
            return a if a == b else (a, b)
        return a if a == b else None

    if len(first) != len(second):
        return None
    return tuple(dim(a, b) for a, b in zip(first, second, strict=True))


def _with_inputs(skeleton: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            dim.dim_value = size
    for value in model.graph.output:  # a declared output may be wrong about a size that it calls dynamic
        value.type.tensor_type.ClearField("shape")
    return model


def _infer(skeleton: onnx.ModelProto) -> Tensors:
    import onnx

    for node in skeleton.graph.node:
        if node.op_type in SAME_SHAPE and node.domain in ("", "ai.onnx"):
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output[:1]))
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, check_type=True, strict_mode=True, data_prop=True).graph
        types = {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output)}
        types.update((x.name, onnx.helper.make_tensor_type_proto(x.data_type, x.dims)) for x in graph.initializer)
        complete(skeleton, types)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ContentError(f"the model's shapes contradict each other: {first_line(error)}", EXPORT_AGAIN) from error
    return Tensors(dict(_shapes(types)), {name: kind.tensor_type.elem_type for name, kind in types.items()})


def _shapes(types: dict[str, onnx.TypeProto]) -> Iterator[tuple[str, Shape]]:
    for name, kind in types.items():
        if kind.HasField("tensor_type") and kind.tensor_type.HasField("shape"):
            dims = kind.tensor_type.shape.dim
            yield name, tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)
