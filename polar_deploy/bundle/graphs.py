"""Whether an ONNX file from a stranger is a plain network: what it may contain before a runtime gets to see it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from polar_deploy import onnx_files
from polar_deploy.bundle.refusal import refused
from polar_deploy.errors import ContentError, one_line

if TYPE_CHECKING:
    import onnx

    from polar_deploy.bundle.manifest import ElementType, Manifest, Network

_DOMAINS = {"", "ai.onnx"}
_RANDOM = re.compile("Random|Multinomial|Bernoulli")  # operators that give something else each time


def require_as_described(folder: Path, manifest: Manifest, network: Network) -> None:
    """Raise ContentError unless both graphs of a network are plain networks, and what the manifest says of them.

    Args:
        folder: of the bundle.
        manifest: the bundle's.
        network: a part of it.
    """
    from polar_deploy.surgery.count import count

    fp32, typed = folder / network.fp32, folder / network.typed
    model = _read(fp32, network.fp32_data)
    _require_edges(model, fp32, manifest, typed=fp32 == typed)
    try:
        counted = count(model)
    except Exception as error:  # shapes that make no sense
        raise refused(fp32, f"has no cost: {one_line(error)}") from error
    if (counted.macs, counted.params) != (network.macs, network.params):
        found = f"{counted.macs:,} MACs and {counted.params:,} parameters"
        raise refused(fp32, f"has {found}, the manifest says {network.macs:,} and {network.params:,}")
    if fp32 != typed:
        model = _read(typed, network.typed_data)
        _require_edges(model, typed, manifest, typed=True)
    if not _has_types(model, network.precision.asked):
        raise refused(typed, f"has no weights or Q/DQ in {network.precision.asked}")


def _read(path: Path, data: str | None) -> onnx.ModelProto:
    """Read a graph without functions, operators of others, branches, loops; of a large one not its weights.

    Args:
        path: of the graph.
        data: the only other file that it may name, beside it, by its path in the bundle.
    """
    import onnx

    from polar_deploy.surgery import detached

    try:
        model = onnx_files.read(path, external=False, check=False)
        problem = _problem(model, data)
        if problem is None and data is None:
            onnx.checker.check_model(model)
        elif problem is None:
            model = detached.read(path).model  # which looks at the place and the length of each weight
    except ContentError as error:
        raise refused(path, f"is not valid ONNX: {error.what}") from error
    except Exception as error:  # on random bytes, onnx fails in many ways
        raise refused(path, f"is not valid ONNX: {one_line(error)}") from error
    if problem is not None:
        raise refused(path, problem)
    return model


def _has_types(model: onnx.ModelProto, precision: str) -> bool:
    """Whether a graph holds what a precision needs: weights of that type, or values that are dequantised."""
    import onnx

    if precision == "int8":
        return any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    types = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    return any(tensor.data_type == types[precision] and len(tensor.dims) > 1 for tensor in model.graph.initializer)


def _require_edges(model: onnx.ModelProto, path: Path, manifest: Manifest, *, typed: bool) -> None:
    tensors = (*manifest.inputs, *manifest.outputs)
    kinds = [each.dtype if typed or not each.is_float else "fp32" for each in tensors]
    expected = [
        (each.name, kind, tuple(size or 0 for size in each.shape)) for each, kind in zip(tensors, kinds, strict=True)
    ]
    try:
        found = io_tensors(model)
    except ValueError as error:
        raise refused(path, f"is not valid ONNX: {error}") from error
    if found != expected:
        raise refused(path, f"has the inputs and outputs {found}, the manifest says {expected}")


def io_tensors(model: onnx.ModelProto) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, element type and shape behind the batch of every input and output; an unknown size is 0."""
    initial = {tensor.name for tensor in model.graph.initializer}
    values = [*(value for value in model.graph.input if value.name not in initial), *model.graph.output]
    return [_edge(value) for value in values]


def element_type(name: str) -> ElementType:
    """The manifest's word for an element type of `io_tensors`."""
    from polar_deploy.bundle.manifest import ElementType

    if name not in get_args(ElementType):
        raise ContentError(f"an input or output of type {name} cannot be bundled", "export the network with another")
    return cast("ElementType", name)


def _edge(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int, ...]]:
    import onnx

    tensor = value.type.tensor_type
    written = onnx.TensorProto.DataType.Name(tensor.elem_type)
    kind = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}.get(written, written.lower())
    if any(isinstance(text, bytes) for text in (value.name, *(size.dim_param for size in tensor.shape.dim))):
        raise ValueError(
            f"the name of an input or output, {value.name!r}, is not UTF-8"
        )  # ONNX Runtime stumbles over these
    return value.name, kind, tuple(size.dim_value for size in tensor.shape.dim[1:])


def _problem(model: onnx.ModelProto, data: str | None) -> str | None:
    """What the file contains that a plain network does not need, or None."""
    if model.functions:
        return f"defines a function, {model.functions[0].name!r}"
    if model.training_info:
        return "has a training graph"
    if model.graph.sparse_initializer:
        return "has sparse weights"
    if foreign := next((each.domain for each in model.opset_import if each.domain not in _DOMAINS), None):
        return f"asks for operators of {foreign!r}"
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        place = f"node {node.name!r} ({node.op_type})"
        if node.domain not in _DOMAINS:
            return f"has {place}, an operator of {node.domain!r}"
        if _RANDOM.match(node.op_type):
            return f"has {place}, which is random"
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                return f"has {place} with a graph of its own"
            tensors += [attribute.t, *attribute.tensors]
    allowed = [] if data is None else [data.rpartition("/")[2]]
    external = [each for each in tensors if onnx_files.is_external(each)]
    for each in external:
        if [entry.value for entry in each.external_data if entry.key == "location"] != allowed:
            return f"keeps the tensor {each.name!r} in another file"
    return f"has no weights in {data}" if data is not None and not external else None
