"""FP16: ONNX Runtime's converter, its result put in order and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from polar_deploy import onnx_files
from polar_deploy.documents.build import WiderLayer
from polar_deploy.errors import ContentError
from polar_deploy.precision import graph
from polar_deploy.precision.proof import BOUNDS, Kernels, Reference, kept_wide
from polar_deploy.surgery.detached import sort_nodes

LARGEST = float(np.finfo(np.float16).max)  # 65504
# In place of numbers that stand for no end: what a mask adds to scores leaves room for these, and for a second mask, so
# that where all is masked nothing becomes infinite, and then no number.
MASK = LARGEST / 2
MASKING = frozenset({"Add", "Sub", "Where"})
BOUNDING = frozenset({"Clip", "Max", "Min", "Pad"})
ON_THE_WAY = frozenset(  # from a number to the mask that is made of it
    {"Cast", "Concat", "Expand", "Gather", "Identity", "Mul", "Reshape", "ScatterND", "Slice", "Squeeze", "Tile"}
    | {"Transpose", "Trilu", "Unsqueeze"}
)
MAX_LOSS = 0.01  # of a layer's weights, RMS; rounding costs 0.0002, only numbers below 6e-5 lose more


def to_fp16(
    model: onnx.ModelProto,
    path: Path,
    reference: Reference | None,
    *,
    keep_io_types: bool,
    kernels: Kernels | None = None,
    bound: float = BOUNDS["fp16"],
) -> tuple[onnx.ModelProto, list[WiderLayer]]:
    """Write FP16 into a graph: the graph, and the nodes that stay FP32 because FP16 would ruin the outputs.

    Args:
        model: FP32, as `graph.load` gives it; it may have Q/DQ pairs, whose scales become FP16 (opset >= 19).
        path: its file, for messages.
        reference: what the network gives in FP32; None: the result is not compared.
        keep_io_types: the graph's inputs and outputs stay FP32.
        kernels: of the runtime that the graph is for, if they can be asked here.
        bound: on the error of each output.

    Raises:
        ContentError: a constant does not fit into FP16's range, and is neither in a mask nor a bound.
    """
    if any(node.op_type == "BatchNormalization" for node in model.graph.node):
        model = graph.folded(model, path)
    model = _within_range(model, path, is_proven=reference is not None)

    def convert(wide: Sequence[str]) -> onnx.ModelProto:
        return _converted(model, wide, keep_io_types=keep_io_types)

    return kept_wide(model, convert, reference, bound, kernels)


def _converted(model: onnx.ModelProto, wide: Sequence[str], *, keep_io_types: bool) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    blocked = [*wide, *_without_fp16(model)]
    copy = convert_float_to_float16(
        copy, keep_io_types=keep_io_types, disable_shape_infer=True, node_block_list=blocked
    )
    if wide:
        graph.join_casts(copy)
    sort_nodes(copy.graph)  # the converter appends its casts
    return graph.inferred(copy)


def _without_fp16(model: onnx.ModelProto) -> list[str]:
    """The nodes of ONNX's operators that know no FP16, in the graph's opset, where they read or write floats."""
    opset, found = graph.opset_of(model), []
    for node in model.graph.node:
        if not node.domain:
            schema = onnx.defs.get_schema(node.op_type, opset)
            kinds = [{*parameter.types} for parameter in (*schema.inputs, *schema.outputs)]
            if any("tensor(float)" in each and "tensor(float16)" not in each for each in kinds):
                found.append(node.name)
    return found


def _within_range(model: onnx.ModelProto, path: Path, *, is_proven: bool) -> onnx.ModelProto:
    """The graph with ends that FP16 has, in masks and as bounds; what else it lacks, the converter clamps unasked.

    is_proven: whether the result is compared; else every constant beyond FP16 may be a quantity.

    Raises:
        ContentError: a constant that is none of these does not fit, or the weights of a layer are too small.
    """
    layers = {node.input[1]: node for node in model.graph.node if node.op_type in graph.LAYERS}
    readers, held = graph.readers(model), dict[str, np.ndarray]()
    for name, value in graph.weights(model).items():
        node = layers.get(name) or next(iter(readers[name]), None)
        finite = np.isfinite(value)
        if node is None or not finite.any():
            continue
        largest = float(np.abs(value[finite]).max())
        if largest > LARGEST:
            end = min((_end(name, reader, readers) for reader in readers[name] if is_proven), default=0.0)
            if not end:
                raise _misfit(path, name, node, f"holds {largest:g}, and FP16 ends at {LARGEST:g}")
            held[name] = np.where(finite, np.clip(value, -end, end), value)
        elif name in layers and (loss := _loss(value)) > MAX_LOSS:
            raise _misfit(path, name, node, f"is too small for FP16 ({largest:g} at most): {loss:.0%} would be lost")
    return _with_constants(model, held) if held else model


def _end(name: str, reader: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> float:
    """What a number beyond all ends may become where `reader` reads it as the constant `name`; 0: it is a quantity."""
    if reader.domain:
        return 0.0
    if reader.op_type in BOUNDING and (reader.op_type in ("Max", "Min") or name != reader.input[0]):
        return LARGEST
    return MASK if _is_mask(reader, readers) else 0.0


def _is_mask(reader: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> bool:
    """Whether a node adds what it reads, or chooses it, or all that read its result do: `(1 - mask) * lowest`."""
    if reader.op_type in MASKING:
        return True
    behind = readers[reader.output[0]] if reader.op_type in ON_THE_WAY else ()
    return bool(behind) and all(_is_mask(node, readers) for node in behind)


def _with_constants(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The graph with other values of some constants."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    return copy


def _loss(value: np.ndarray) -> float:
    """What rounding to FP16 changes, RMS, as a share of the RMS."""
    wide = value.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    return float(np.linalg.norm(wide.astype(np.float16) - wide)) / norm if norm else 0.0


def _misfit(path: Path, name: str, node: onnx.NodeProto, why: str) -> ContentError:
    return ContentError(
        f"{path}: constant {name!r} of {onnx_files.described(node)} {why}",
        "scale the weights of this layer in training (weight decay, BatchNorm), or build for a BF16 or FP32 target",
    )
