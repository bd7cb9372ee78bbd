"""Types in the graph: what the build stage writes before an engine is made of it. No torch.

TensorRT 11 knows no other way than types in the graph, and 10 can go it: so there is one way for all. A precision is
a file here. Its result is checked by ONNX's own type inference, its layers are counted by type, and its outputs are
held against those in FP32: what puts them off stays in the wider type, and is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import onnx_files
from polar_deploy.documents.build import Types, WiderLayer

if TYPE_CHECKING:
    from polar_deploy.config import Build
    from polar_deploy.precision.proof import Kernels
    from polar_deploy.targets import Target
    from polar_deploy.tensors import Arrays


def write(
    source: Path,
    destination: Path,
    target: Target,
    options: Build,
    calibration: Arrays | None,
    kernels: Kernels | None = None,
) -> Types:
    """Write the network `source` to `destination` with the types of `target`; graph inputs and outputs keep names.

    Args:
        source: a valid FP32 network.
        destination: the .onnx file to write, atomically; what it cannot hold, with its weights in DESTINATION.data.
        target: precision, and for INT8 in which dialect.
        options: `io_dtype`, `max_layer_error`, `reduce_range` and `calibration` are read.
        calibration: inputs of training samples, un-augmented, by name; for INT8, and where an input is not of floats.
        kernels: how the target's runtime computes a graph, to prove this one by; None: it cannot be asked here, and
            the graph is proven as it is written.

    Returns:
        What build.json tells of the types.

    Raises:
        ContentError: a tensor of another float type, a constant that FP16 cannot hold, an operator that ONNX does not
            know, no calibration samples or wrong ones, no layer that INT8 suits; the message names file, tensor or
            node, and operator.
    """
    from polar_deploy.precision import bf16, fp16, graph, int8
    from polar_deploy.precision.proof import Reference, normal_samples, spread
    from polar_deploy.surgery import detached

    kept: list[WiderLayer] = []
    described: dict[str, Any] | None = None
    keep_io_types = options.io_dtype == "fp32"
    if target.precision == "fp32":
        model = graph.inferred(onnx_files.read(source, external=False, check=False))
        graph.require_fp32(model.graph, source)
    elif target.precision == "int8":
        scheme = int8.SCHEMES[target.backend.int8]
        model, kept, described = int8.to_int8(graph.load(source), source, scheme, options, calibration, kernels)
    else:
        wide = graph.load(source)
        samples = normal_samples(wide) or (calibration and spread(calibration))
        reference = None if samples is None else Reference.of(wide, samples, source)
        convert = fp16.to_fp16 if target.precision == "fp16" else bf16.to_bf16
        model, kept = convert(wide, source, reference, keep_io_types=keep_io_types, kernels=kernels)
    types = graph.checked(model, source, target.precision, {each.layer for each in kept})
    if target.precision == "fp32":
        detached.copy(source, destination)  # as it is
    else:
        detached.save(model, destination)
    narrow = any(
        value.type.tensor_type.elem_type in graph.NARROW for value in (*model.graph.input, *model.graph.output)
    )
    return Types(
        io_dtype="native" if narrow else "fp32", types=types, high_precision_layers=kept, calibration=described
    )
