"""What all precisions need of a graph: made plain, raised to an opset, its layers listed by type."""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
from onnx import TensorProto, helper, inliner, numpy_helper

from polar_deploy import onnx_files
from polar_deploy.errors import ContentError, one_line
from polar_deploy.ort_session import session_options
from polar_deploy.surgery.detached import reads
from polar_deploy.surgery.standins import STANDARD, stand_ins

LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})  # what carries nearly all MACs, and decides the type
RESIZE = 11  # the opset since which Resize says where it samples
NARROW = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
NAMES: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
}


def load(path: Path) -> onnx.ModelProto:
    """Read a valid FP32 network, made plain: no local functions, constants as initializers that are no inputs, ONNX's
    own operators under one name of their domain, every node with a name.

    Raises:
        ContentError: a tensor has another float type, or one that ONNX cannot tell; the message names it, its node
            and operator.
    """
    model = onnx_files.read(path, check=False)
    if model.functions:
        model = _by_onnx(model, inliner.inline_local_functions)
    _store_constants(model.graph)
    _close_constants(model)
    for part in (*model.opset_import, *model.graph.node):
        part.domain = "" if part.domain in STANDARD else part.domain
    model = inferred(named(model))
    require_fp32(model.graph, path)
    _require_known(model.graph, path)
    return model


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types and shapes of all tensors worked out anew. The model given is used up."""
    del model.graph.value_info[:]
    originals = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    instead = [stand_ins(node) for node in originals]
    del model.graph.node[:]
    model.graph.node.extend(each for node, others in zip(originals, instead, strict=True) for each in others or [node])
    model = _by_onnx(model, partial(onnx.shape_inference.infer_shapes, data_prop=True))
    looked_at = iter([onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node])
    del model.graph.node[:]
    for node, others in zip(originals, instead, strict=True):
        seen = [next(looked_at) for _ in others or [node]]
        model.graph.node.append(node if others else seen[0])  # a node's own graphs have their types in it
    return model


def _by_onnx(model: onnx.ModelProto, change: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """What one of onnx's own functions makes of a model; a large one does not get its large constants to see."""
    light = _light(model)
    changed = change(light)
    if light is not model:
        inputs = {value.name for value in model.graph.input}
        taken_out = {value.name for value in light.graph.input} - inputs
        _keep(changed.graph.input, lambda value: value.name not in taken_out)
        given = {tensor.name for tensor in changed.graph.initializer}
        changed.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in given)
    return changed


def _light(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model; where protobuf cannot write it in one piece, a copy in which large constants are inputs."""
    if not onnx_files.is_large(model):
        return model
    light, listed = onnx_files.without_weights(model), {value.name for value in model.graph.input}
    del light.graph.initializer[:]
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= onnx_files.SMALL:
            light.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in listed:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


class Names:
    """The names that a graph has, and new ones."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.taken = {value.name for value in (*model.graph.input, *model.graph.initializer)}
        for node in model.graph.node:
            self.taken |= {node.name, *node.output}

    def fresh(self, wanted: str) -> str:
        """A name that nothing has yet: the one that is wanted, or that with a number."""
        name, number = wanted, 1
        while name in self.taken:
            name, number = f"{wanted}_{number}", number + 1
        self.taken.add(name)
        return name


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name for each node that had none, or one that another has already."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}_{node.output[0]}"
        taken.add(node.name)
    return model


def join_casts(model: onnx.ModelProto) -> None:
    """Let nodes that stay FP32 hand each other FP32: what is cast to a narrower type and back is read as it was."""
    made = makers(model)

    def cast_to(name: str, wide: bool) -> onnx.NodeProto | None:
        node = made.get(name)
        if node is None or node.op_type != "Cast":
            return None
        return node if (helper.get_node_attr_value(node, "to") == TensorProto.FLOAT) == wide else None

    for node in model.graph.node:
        for index, name in enumerate(node.input):
            up = cast_to(name, wide=True)
            down = cast_to(up.input[0], wide=False) if up is not None else None
            if down is not None and helper.get_node_attr_value(down, "to") in NARROW:
                node.input[index] = down.input[0]
    drop_unused(model)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove the nodes and the constants that nothing depends on."""
    made, used = makers(model), {value.name for value in model.graph.output}
    waiting = [*used]
    while waiting:
        node = made.get(waiting.pop())
        new = {*reads(node)} - used if node is not None else set()
        used |= new
        waiting += new
    _keep(model.graph.node, lambda node: bool(used.intersection(node.output)))
    _keep(model.graph.initializer, lambda tensor: tensor.name in used)


def _keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Remove from a list of a message what is not wanted, from its end: each removal moves what follows."""
    for index in reversed([index for index, item in enumerate(items) if not wanted(item)]):
        del items[index]


def folded(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The network with BatchNorm and constants folded in FP32, so that each layer's final weights are rounded.

    GroupNormalization stays one node, whose inside is FP32 whatever it reads: ONNX Runtime would write it out.
    """
    from polar_deploy.precision.calibration import Session

    model, group_norms = _hidden_group_norms(model)

    options = session_options(level="basic")
    with tempfile.TemporaryDirectory() as folder:
        destination = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(destination)
        if onnx_files.is_large(model):
            beside = onnx_files.data_path(destination).name
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", beside)
        Session(model, path, options)
        folded = onnx_files.read(destination, check=False)
    used = {node.domain for node in folded.graph.node}
    imports = [each for each in folded.opset_import if each.domain in used]  # it imports all domains that it knows
    del folded.opset_import[:]
    folded.opset_import.extend(imports)
    for node in folded.graph.node:
        if node.name in group_norms:
            node.op_type = "GroupNormalization"
            del node.attribute[:]
            node.attribute.extend(group_norms[node.name].attribute)
    return named(inferred(folded))


def _hidden_group_norms(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.NodeProto]]:
    """A copy in which GroupNormalization, unless it can be folded, is an operator of the same inputs and shapes for
    which ONNX Runtime has a kernel; and the true nodes by name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    variable, hidden = {value.name for value in model.graph.input}, {}
    for node, true in zip(copy.graph.node, model.graph.node, strict=True):
        if not variable.intersection(reads(node)):
            continue
        variable.update(node.output)
        if node.op_type == "GroupNormalization" and node.domain in STANDARD:
            node.op_type, hidden[node.name] = "InstanceNormalization", true
            del node.attribute[:]
    return copy, hidden


def at_least(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model in `opset`, or as it is where it has that or a later one. Names stay."""
    if opset_of(model) >= opset:
        return model
    samplings = _old_samplings(model) if opset_of(model) < RESIZE else {}
    model = _by_onnx(model, partial(onnx.version_converter.convert_version, target_version=opset))
    for node in model.graph.node:
        if node.op_type == "Resize" and node.output[0] in samplings:
            node.attribute.extend(starmap(helper.make_attribute, samplings[node.output[0]].items()))
    return inferred(model)


def _old_samplings(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """What a Resize of opset 11 has to say to sample where an older one or an Upsample did, by its output's name.

    onnx's version converter (1.23) leaves the new defaults, which sample half a pixel further."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, dict[str, str]] = {}
    for node in model.graph.node:
        if node.op_type in ("Resize", "Upsample") and node.domain in STANDARD:
            scales = constants.get(node.input[1]) if len(node.input) > 1 else None
            shrinks = scales is not None and bool((numpy_helper.to_array(scales) < 1).any())
            nearest = "ceil" if shrinks else "floor"  # as ONNX Runtime does
            found[node.output[0]] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": nearest}
    return found


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators."""
    return int(next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")))


def checked(model: onnx.ModelProto, path: Path, precision: str, wide: Collection[str] = ()) -> dict[str, int]:
    """Check a graph that this package wrote, and count its layers by the type that they compute in.

    Args:
        model: the graph.
        path: the network's file, for messages.
        precision: of all layers; of INT8 some may be wider.
        wide: the names of those that stay wider on purpose.

    Raises:
        ContentError: it is not valid, types and shapes included, or a layer has another type than it should.
    """
    if precision == "fp32":  # nothing was written
        return {"fp32": sum(node.op_type in LAYERS for node in model.graph.node)}
    try:
        onnx.checker.check_model(_light(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContentError(
            f"{path}: the graph with its new types is not valid: {one_line(error)}",
            "use an FP32 target for this network, and report it",
        ) from error
    found = layer_types(model)
    for node in model.graph.node:
        if precision != "int8" and node.name not in wide and found.get(node.name, precision) != precision:
            raise ContentError(
                f"{path}: {onnx_files.described(node)} would stay {found[node.name]}, the target is {precision}",
                "choose another target for this network, and report it",
            )
    return dict(Counter(found.values()).most_common())


def layer_types(model: onnx.ModelProto) -> dict[str, str]:
    """The type that each layer computes in, by its name; of a graph with the types of its tensors."""
    made, known = makers(model), dict(tensor_types(model.graph))
    return {node.name: _type(node, made, known) for node in model.graph.node if node.op_type in LAYERS}


def count_wider(path: Path, precision: str) -> int:
    """How many layers of a typed graph compute in another type than its target's: they stay wider on purpose."""
    if precision == "fp32":
        return 0
    types = layer_types(inferred(onnx_files.read(path, external=False, check=False)))
    return sum(kind != precision for kind in types.values())


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


def readers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor, each once, in the order of the graph; [] for a tensor that nothing reads."""
    found: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in dict.fromkeys(reads(node)):
            found[name].append(node)
    return found


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


def _close_constants(model: onnx.ModelProto) -> None:
    """Constants that are listed as inputs, too, as all were before version 4 of ONNX's format, are constants only."""
    constants = {tensor.name for tensor in model.graph.initializer}
    _keep(model.graph.input, lambda value: value.name not in constants)
    model.ir_version = max(model.ir_version, 4)


def require_fp32(graph: onnx.GraphProto, path: Path) -> None:
    """Raise ContentError, naming tensor, node and operator, if a float tensor is not FP32.

    Args:
        graph: with the types of its tensors worked out.
        path: its file.
    """
    for name, code in tensor_types(graph):
        kind = TensorProto.DataType.Name(code)
        if kind != "FLOAT" and ("FLOAT" in kind or kind.startswith(("DOUBLE", "COMPLEX"))):
            near = [node for node in graph.node if name in (*node.output, *node.input)]
            place = f" of {onnx_files.described(near[0])}" if near else ""
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
                    f"{path}: ONNX does not know the type of {name!r}, which {onnx_files.described(node)} makes, so "
                    "that none can be written behind it",
                    "export the network with ONNX's own operators, or choose an FP32 target",
                )


def tensor_types(graph: onnx.GraphProto) -> Iterable[tuple[str, int]]:
    """The tensors of a graph whose types are known, those of bodies included, each with its ONNX element type."""
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
    for value in (*graph.input, *graph.value_info, *graph.output):
        yield value.name, value.type.tensor_type.elem_type
    for body in (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from tensor_types(body)
