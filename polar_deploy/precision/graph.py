"""What all precisions need of a graph: made plain, raised to an opset, its layers listed by type."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
from onnx import TensorProto, helper, inliner, numpy_helper

from polar_deploy.errors import ContentError, one_line

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})  # what carries nearly all MACs, and decides the type
NAMES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
}


def load(path: Path) -> onnx.ModelProto:
    """Read a valid FP32 network, made plain: no local functions, constants as initializers, every node with a name.

    Raises:
        ContentError: a tensor has another float type, or one that ONNX cannot tell; the message names it, its node
            and operator.
    """
    model = onnx.load(path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    _store_constants(model.graph)
    model = inferred(named(model))
    require_fp32(model.graph, path)
    _require_known(model.graph, path)
    return model


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes of all tensors worked out anew."""
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name for each node that had none, or one that another has already."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}_{node.output[0]}"
        taken.add(node.name)
    return model


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove the nodes and the constants that nothing depends on."""
    outputs = {value.name for value in model.graph.output}
    while True:
        used = outputs | {name for node in model.graph.node for name in _reads(node)}
        idle = [node for node in model.graph.node if not used.intersection(node.output)]
        if not idle:
            break
        for node in idle:
            model.graph.node.remove(node)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


def at_least(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model in `opset`, or as it is where it has that or a later one. Names stay."""
    if opset_of(model) >= opset:
        return model
    return inferred(onnx.version_converter.convert_version(model, opset))


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return int(next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")))


def checked(model: onnx.ModelProto, path: Path, precision: str) -> dict[str, int]:
    """Check a graph that this package wrote, and count its layers by the type that they compute in.

    Raises:
        ContentError: it is not valid, types and shapes included, or a layer has another type than it should.
    """
    if precision == "fp32":  # nothing was written
        return {"fp32": sum(node.op_type in LAYERS for node in model.graph.node)}
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContentError(
            f"{path}: the graph with its new types is not valid: {one_line(error)}",
            "use an FP32 target for this network, and report it",
        ) from error
    made, known = makers(model), dict(_tensor_types(model.graph))
    found = {node.name: _type(node, made, known) for node in model.graph.node if node.op_type in LAYERS}
    for node in model.graph.node:
        if precision != "int8" and found.get(node.name, precision) != precision:
            raise ContentError(
                f"{path}: {described(node)} would stay {found[node.name]}, the target is {precision}",
                "choose another target for this network, and report it",
            )
    return dict(Counter(found.values()).most_common())


def _type(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], known: Mapping[str, int]) -> str:
    """The type that a layer computes in: the widest of what it reads. INT8 where that comes out of Q/DQ pairs."""

    def kind(name: str) -> str:
        maker = made.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            name = maker.input[0]
        return NAMES[known[name]]

    return max((kind(name) for name in node.input[:2]), key=_WIDTHS.__getitem__)


_WIDTHS = {"int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}


def weights(model: onnx.ModelProto) -> dict[str, npt.NDArray[np.float32]]:
    """The float constants of the network by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each tensor."""
    return {name: node for node in model.graph.node for name in node.output}


def users(model: onnx.ModelProto, tensor: str) -> list[onnx.NodeProto]:
    """The nodes that read a tensor."""
    return [node for node in model.graph.node if tensor in node.input]


def described(node: onnx.NodeProto) -> str:
    """A node in an error message: node 'x' (operator Conv)."""
    operator = f"{node.domain}:{node.op_type}" if node.domain else node.op_type
    return f"node {node.name or node.output[0]!r} (operator {operator})"


def sort(graph: onnx.GraphProto) -> None:
    """Put each node behind those that make what it reads, and otherwise leave it where it is, as far as that goes."""
    nodes = list(graph.node)
    maker = {name: index for index, node in enumerate(nodes) for name in node.output}
    needs = [{maker[name] for name in _reads(node) if name in maker} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, makers in enumerate(needs):
        for each in makers:
            readers[each].append(index)
    ready = [index for index, makers in enumerate(needs) if not makers]  # sorted, so a heap
    del graph.node[:]
    while ready:
        index = heapq.heappop(ready)
        graph.node.append(nodes[index])
        for reader in readers[index]:
            needs[reader].remove(index)
            if not needs[reader]:
                heapq.heappush(ready, reader)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, the bodies of If and Loop included (less what those make themselves)."""
    yield from node.input
    for body in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
        own = {value.name for value in (*body.initializer, *body.input)}
        own |= {name for inner in body.node for name in inner.output}
        yield from (name for inner in body.node for name in _reads(inner) if name not in own)


def _store_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become initializers: the one place where the precisions look for constants."""
    constants = [node for node in graph.node if node.op_type == "Constant" and node.domain in ("", "ai.onnx")]
    for node in constants:
        value = helper.get_attribute_value(node.attribute[0])
        if node.attribute[0].name == "value":
            tensor = value
        elif node.attribute[0].name.startswith("value_float"):
            tensor = numpy_helper.from_array(np.array(value, np.float32))
        elif node.attribute[0].name.startswith("value_int"):
            tensor = numpy_helper.from_array(np.array(value, np.int64))
        else:
            continue  # strings, sparse tensors
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)


def require_fp32(graph: onnx.GraphProto, path: Path) -> None:
    """Raise ContentError, naming tensor, node and operator, if a float tensor is not FP32.

    Args:
        graph: with the types of its tensors worked out.
        path: its file.
    """
    for name, code in _tensor_types(graph):
        kind = TensorProto.DataType.Name(code)
        if kind != "FLOAT" and ("FLOAT" in kind or kind.startswith(("DOUBLE", "COMPLEX"))):
            near = [node for node in graph.node if name in (*node.output, *node.input)]
            place = f" of {described(near[0])}" if near else ""
            raise ContentError(
                f"{path}: tensor {name!r}{place} is {kind}, but every float tensor has to be FLOAT",
                "export the network in FP32; lower precision is the target's job",
            )


def _require_known(graph: onnx.GraphProto, path: Path) -> None:
    known = {value.name for value in (*graph.value_info, *graph.output) if value.type.WhichOneof("value")}
    for node in graph.node:
        for name in node.output:
            if name and name not in known:
                raise ContentError(
                    f"{path}: ONNX does not know the type of {name!r}, which {described(node)} makes, so that none can "
                    "be written behind it",
                    "export the network with ONNX's own operators, or choose an FP32 target",
                )


def _tensor_types(graph: onnx.GraphProto) -> Iterable[tuple[str, int]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, value.type.tensor_type.elem_type
    for body in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from _tensor_types(body)
