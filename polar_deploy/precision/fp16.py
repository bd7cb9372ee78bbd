"""FP16: ONNX Runtime's converter, its result put in order and checked."""

from __future__ import annotations

from collections.abc import Sequence
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
        ContentError: a constant does not fit into FP16's range.
    """
    if any(node.op_type == "BatchNormalization" for node in model.graph.node):
        model = graph.folded(model, path)
    _require_range(model, path)

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


def _require_range(model: onnx.ModelProto, path: Path) -> None:
    """The converter clamps without a word what FP16 cannot hold: find it before."""
    layers = {node.input[1]: node for node in model.graph.node if node.op_type in graph.LAYERS}
    users = {name: node for node in reversed(model.graph.node) for name in node.input}
    for name, value in graph.weights(model).items():
        node = layers.get(name) or users.get(name)
        if node is None or not value.size:
            continue
        largest = float(np.abs(value).max())
        if np.isfinite(largest) and largest > LARGEST:
            raise _misfit(path, name, node, f"holds {largest:g}, and FP16 ends at {LARGEST:g}")
        if name in layers and (loss := _loss(value)) > MAX_LOSS:
            raise _misfit(path, name, node, f"is too small for FP16 ({largest:g} at most): {loss:.0%} would be lost")


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
