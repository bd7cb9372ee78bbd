"""Reading a model from a stranger: one clear error for whatever is wrong with it, and the shape of every tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from polar_deploy.errors import ContentError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx

# A dimension: its size; its sizes at both probes where it depends on the input; its symbol; or unknown.
Dim = int | tuple[int, int] | str | None
Shape = tuple[Dim, ...]


class Tensors(NamedTuple):
    """What shape inference knows of the tensors of a graph, by name: shapes, and ONNX element types."""

    shapes: dict[str, Shape]
    types: dict[str, int]


BATCH_PROBES = (2, 3)
# Sizes that other dynamic dimensions (height, width) are tried at. The odd second probe tells floor from ceil; networks
# that demand multiples of 32 get the second pair.
SIZE_PROBES = ((224, 251), (224, 256))
DEFAULT_SIZE = 224
SMALL = 1024  # elements; larger constants are no shape arithmetic and stay out of shape inference

PACKED = ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")  # several elements a byte
EXPORT_AGAIN = "export the model again and check it with onnx.checker"


def read_model(path: Path) -> onnx.ModelProto:
    """The model in `path`, external data included, checked.

    Raises:
        UsageError: the path is missing or a folder.
        ContentError: the file is not a valid ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise UsageError(f"{path} is not a file", "give the path of an ONNX file")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ContentError(f"{path} is not an ONNX file: {_line(error)}", "give a complete ONNX file") from error
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ContentError(
            f"external data of {path} cannot be read: {_line(error)}",
            "keep the data files beside the model, inside its folder",
        ) from error
    check_model(model, str(path))
    return model


def check_model(model: onnx.ModelProto, name: str = "the model") -> None:
    """Raises ContentError where `model` is no valid ONNX graph (empty, cyclic, duplicate names, damaged weights)."""
    import onnx

    if not model.graph.node or not model.graph.output:
        raise ContentError(f"{name} holds an empty graph", "give an ONNX file with nodes and outputs")
    for text in _texts(model):
        if not _is_utf8(text):
            raise ContentError(f"{name} holds text that is not UTF-8: {text!r}", EXPORT_AGAIN)
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > newest:
            raise ContentError(
                f"{name} wants opset {opset.version}, the installed onnx knows {newest}", "install a newer onnx"
            )
    try:
        onnx.checker.check_model(_skeleton(model))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ContentError(f"{name} is not valid ONNX: {_line(error)}", EXPORT_AGAIN) from error
    for tensor in model.graph.initializer:
        _check_tensor(tensor, name)


def _texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """All text that surgery and graphsurgeon look at; protobuf hands out what is not UTF-8 as bytes."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string)
    for graph in _graphs(model.graph):
        yield from (graph.name, graph.doc_string)
        yield from (item.name for field in (graph.initializer, graph.input, graph.output) for item in field)
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            for attribute in node.attribute:
                yield from (attribute.name, attribute.s, *attribute.strings)


def _is_utf8(text: str | bytes) -> bool:
    try:
        str(text, "utf-8") if isinstance(text, bytes) else text.encode()
    except UnicodeError:
        return False
    return True


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and the bodies inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _line(error: Exception) -> str:
    """The first line of a message that may run over pages."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _check_tensor(tensor: onnx.TensorProto, name: str) -> None:
    """Raises ContentError where an initializer's data is not as long as its shape says: onnx.checker does not look."""
    import onnx

    where = f"initializer {tensor.name} of {name}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ContentError(f"{where} lies in another file", "load the model with its external data")
    if any(dim < 0 for dim in tensor.dims):
        raise ContentError(f"{where} has the shape {list(tensor.dims)}", EXPORT_AGAIN)
    try:
        if tensor.HasField("raw_data"):
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            wanted = math.prod(tensor.dims) * itemsize
            packed = onnx.TensorProto.DataType.Name(tensor.data_type) in PACKED
            if len(tensor.raw_data) != wanted and not packed:
                raise ValueError(f"{len(tensor.raw_data)} bytes of data, the shape {list(tensor.dims)} wants {wanted}")
        else:
            onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ContentError(f"{where} is damaged: {_line(error)}", EXPORT_AGAIN) from error


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large initializers are inputs without data: quick to check and to infer shapes on."""
    import onnx

    graph = onnx.GraphProto(name=model.graph.name or "graph")
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    listed = {value.name for value in model.graph.input}
    graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL:
            graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    known = {opset.domain for opset in model.opset_import if opset.domain not in ("", "ai.onnx")}
    custom = {name for node in model.graph.node if node.domain in known for name in node.output}  # not inferred
    graph.value_info.extend(value for value in model.graph.value_info if value.name in custom)
    version = max(model.ir_version, 4) if model.ir_version else 0  # from 4 on, initializers need not be inputs
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
    for sizes in SIZE_PROBES:
        try:
            first, second = (
                _infer(_with_inputs(skeleton, concrete_inputs(model, batch, size)))
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


def concrete_inputs(model: onnx.ModelProto, batch: int, size: int = DEFAULT_SIZE) -> dict[str, tuple[int, ...]]:
    """Input shapes with the dynamic dimensions filled in: `batch` for a first one, `size` for others."""
    shapes = input_shapes(model)
    batches = {shape[0] for shape in shapes.values() if shape}
    return {
        name: tuple(dim if isinstance(dim, int) else batch if dim in batches else size for dim in shape)
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

    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, strict_mode=True, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ContentError(f"the model's shapes contradict each other: {_line(error)}", EXPORT_AGAIN) from error
    values = [*graph.value_info, *graph.input, *graph.output]
    shapes = dict(_shapes(values))
    shapes.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    return Tensors(shapes, {value.name: value.type.tensor_type.elem_type for value in values})


def _shapes(values: list[onnx.ValueInfoProto]) -> Iterator[tuple[str, Shape]]:
    for value in values:
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            yield (
                value.name,
                tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims),
            )
