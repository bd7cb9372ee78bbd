"""INT8 by pairs of QuantizeLinear and DequantizeLinear (Q/DQ), calibrated on training images.

Two graphs, because two libraries recognise different patterns. Weights are symmetric and have a scale a channel in
both.

ONNX Runtime on a CPU: activations unsigned with a zero point, and the outputs of layers quantised, too, as well as
what lies between (Add, Concat, pooling, shapes), so that integers flow from layer to layer. The rest is FP32.

TensorRT: activations signed and symmetric, at the inputs of layers only; biases stay float. The sum of a residual
block is fused with the convolution in front of it if its OTHER input is quantised (TensorRT's guide: "quantize the
residual input in skip connections"), and a pair between the two would keep them apart. The rest is FP16, scales too.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from polar_deploy.errors import ContentError
from polar_deploy.precision import calibration, fp16, graph, sensitivity
from polar_deploy.precision.calibration import Array, Range

if TYPE_CHECKING:
    from polar_deploy.config import Build

_BETWEEN = (
    *("Relu", "Clip", "Add", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Flatten", "Pad", "Reshape", "Slice", "Transpose"),
)


@dataclass(frozen=True)
class _Scheme:
    """One of the two graphs.

    `between`: operators that pass integers on; `wider`: type of what is not quantised; `opset`: the oldest that will
    do (scales a channel: 13, FP16 scales: 19).
    """

    symmetric: bool
    between: tuple[str, ...]
    wider: str
    opset: int


ORT = _Scheme(symmetric=False, between=_BETWEEN, wider="fp32", opset=13)
TRT = _Scheme(symmetric=True, between=(), wider="fp16", opset=19)


def converted(
    model: onnx.ModelProto, path: Path, scheme: _Scheme, options: Build, images: Array | None
) -> tuple[onnx.ModelProto, list[dict[str, Any]], dict[str, Any]]:
    """Write INT8 into a graph: the graph, the layers that stay wider, and how it was calibrated.

    Args:
        model: FP32, as `graph.load` gives it.
        path: its file, for messages.
        scheme: `ORT` or `TRT`.
        options: `max_layer_error`, `calibration` and `edges` are read.
        images: normalised training images [N,C,H,W].

    Raises:
        ContentError: no images, or not such as the network takes; no layer that INT8 suits.
    """
    images = calibration.require_images(images, model, path)
    model = graph.at_least(_folded(model, path), scheme.opset)
    layers = _layers(model, path)
    sums = {} if scheme.between else _residual_sums(model, layers)
    nodes = [*layers, *_passing(model, scheme.between), *(node for node in model.graph.node if node.name in sums)]
    tensors = _activations(model, nodes, outputs=bool(scheme.between))
    ranges = calibration.ranges(model, tensors, images, options.calibration, path)

    def quantised(wide: Collection[str] = ()) -> onnx.ModelProto:
        plain = {*wide, *(name for name, (_, main) in sums.items() if main in wide)}
        chosen = [node for node in nodes if node.name not in plain]
        result = _quantised(model, chosen, ranges, scheme, keep_relus=bool(wide))
        return _bypassed(result, wide, {name: between for name, (between, _) in sums.items()})

    typed = quantised()
    errors = sensitivity.errors(model, typed, images, path)
    kept = _too_large(errors, model, options.max_layer_error, scheme.wider)
    if kept:
        typed = quantised({each["layer"] for each in kept})
    if all(layer.name in {each["layer"] for each in kept} for layer in layers):
        best = min(layers, key=lambda layer: errors[layer.name])
        raise ContentError(
            f"{path}: INT8 moves the logits by more than {options.max_layer_error:g} of their size in every layer, "
            f"by {errors[best.name]:.2g} in the best one, {graph.described(best)}",
            "choose a float target, or calibrate on more images or with build.calibration.method: minmax",
        )
    if scheme.wider == "fp16":
        typed = fp16.converted(graph.inferred(typed), path, keep_edges=options.edges == "fp32")
    return graph.inferred(typed), kept, _described(options, len(images))


def _too_large(errors: Mapping[str, float], model: onnx.ModelProto, bound: float, wider: str) -> list[dict[str, Any]]:
    """The nodes whose error is above `bound`, the worst first, as build.json lists them."""
    found = sorted(
        (node for node in model.graph.node if errors.get(node.name, 0) > bound), key=lambda node: -errors[node.name]
    )
    return [
        {"layer": node.name, "operator": node.op_type, "error": round(errors[node.name], 6), "type": wider}
        for node in found
    ]


def _folded(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The network with BatchNorm and constants folded, so that each layer's final weights are what is rounded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # ONNX's own operators only
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        calibration.session(model, path, options)
        folded = onnx.load(options.optimized_model_filepath)
    used = {node.domain for node in folded.graph.node}
    imports = [each for each in folded.opset_import if each.domain in used]  # it imports all domains that it knows
    del folded.opset_import[:]
    folded.opset_import.extend(imports)
    return graph.named(graph.inferred(folded))


def _layers(model: onnx.ModelProto, path: Path) -> list[onnx.NodeProto]:
    """The layers with a constant weight of their own type: what INT8 makes faster."""
    constants, computed = graph.weights(model), {name for node in model.graph.node for name in node.output}
    computed |= {value.name for value in model.graph.input}
    found = [
        node
        for node in model.graph.node
        if node.op_type in graph.LAYERS
        and node.input[0] in computed
        and node.input[1] in constants
        and (node.op_type != "MatMul" or constants[node.input[1]].ndim == 2)
    ]
    if not found:
        raise ContentError(
            f"{path} has no layer that INT8 would make faster: no {', '.join(sorted(graph.LAYERS))} with constant "
            "FP32 weights",
            "choose a float target, or export the network in FP32",
        )
    return found


def _passing(model: onnx.ModelProto, operators: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes of these operators that integers may flow through. What is added or joined has to be an activation."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in operators and not (node.op_type in ("Add", "Concat") and constants.intersection(node.input))
    ]


def _residual_sums(model: onnx.ModelProto, layers: list[onnx.NodeProto]) -> dict[str, tuple[str, str]]:
    """By the name of each sum that a layer feeds alone: the tensor in between, and the layer. Of two, the last one."""
    order = {layer.output[0]: index for index, layer in enumerate(layers)}
    readers = Counter(name for node in model.graph.node for name in node.input)
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        alone = [name for name in node.input if name in order and readers[name] == 1]
        if node.op_type == "Add" and alone and not constants.intersection(node.input):
            between = max(alone, key=order.__getitem__)
            found[node.name] = (between, layers[order[between]].name)
    return found


def _activations(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], *, outputs: bool) -> list[str]:
    """The float tensors that nodes read (and write), constants aside, each once."""
    known = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats -= {tensor.name for tensor in model.graph.initializer}
    names = [name for node in nodes for name in (*node.input, *(node.output if outputs else ()))]
    return [name for name in dict.fromkeys(names) if name in floats]


def _quantised(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], ranges: dict[str, Range], scheme: _Scheme, *, keep_relus: bool
) -> onnx.ModelProto:
    """ONNX Runtime's quantizer puts the pairs in; ranges and, for TensorRT, the weights' scales are ours."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    layers = [node for node in nodes if node.op_type in graph.LAYERS]
    # The quantizer drops a Relu whose result is unsigned: what clips at zero twice is slower. Where a node reads past
    # a pair, it must not read past a Relu.
    options: dict[str, Any] = {"ActivationSymmetric": scheme.symmetric, "QDQKeepRemovableActivations": keep_relus}
    if scheme is TRT:
        options["QuantizeBias"] = False
        options["OpTypesToExcludeOutputQuantization"] = [*graph.LAYERS, "Add"]
        options["TensorQuantOverrides"] = _fp16_scales(model, layers, QuantType.QInt8)
    else:  # logits stay FP32, at no cost: the kernels of both add the bias in float, if they need not quantise
        options["OpTypesToExcludeOutputQuantization"] = ["Gemm", "MatMul"]
    data = {n: TensorData(lowest=np.float32(low), highest=np.float32(high)) for n, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,  # only CPUs without byte dot products need it, and it costs a bit of each weight
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if scheme.symmetric else QuantType.QUInt8,
        tensors_range=data,
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({node.op_type for node in nodes}),
        extra_options=options,
    )
    result: onnx.ModelProto = quantizer.quantize_model()
    graph.sort(result.graph)  # it appends its pairs
    return result


def _fp16_scales(model: onnx.ModelProto, layers: list[onnx.NodeProto], kind: Any) -> dict[str, list[dict[str, Any]]]:
    """Weights' scales that FP16 holds exactly, rounded up: each weight is rounded with the very scale that is stored.

    Symmetric, one an output channel: the channel's largest magnitude becomes 127. That is a small scale, and FP16 is
    coarse below 6e-5.
    """
    constants, found = graph.weights(model), {}
    for layer in layers:
        weight, axis = constants[layer.input[1]], _channel_axis(layer)
        exact = np.abs(weight).max(axis=tuple(index for index in range(weight.ndim) if index != axis)) / 127
        exact = np.where(exact > 0, exact, 1).astype(np.float32)
        narrow = exact.astype(np.float16)
        narrow = np.where(narrow < exact, np.nextafter(narrow, np.float16(np.inf)), narrow)
        found[layer.input[1]] = [
            {"axis": axis, "quant_type": kind, "scale": np.float32(each), "zero_point": np.int8(0)} for each in narrow
        ]
    return found


def _channel_axis(layer: onnx.NodeProto) -> int:
    """The axis of a layer's weight that counts its output channels."""
    if layer.op_type == "Gemm":
        return 0 if any(each.name == "transB" and each.i for each in layer.attribute) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[layer.op_type]


def _bypassed(model: onnx.ModelProto, wide: Collection[str], sums: Mapping[str, str]) -> onnx.ModelProto:
    """Connect nodes with what is in front of the Q/DQ pairs that they should not read. The model given is changed.

    wide: nodes that read no rounded number at all, though others may want the same tensors rounded.
    sums: by name, the one tensor that a sum reads as it is.
    """
    made = graph.makers(model)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            last = made.get(name)
            if last is None or last.op_type != "DequantizeLinear" or last.input[0] not in made:
                continue
            plain = made[last.input[0]].input[0]
            if node.name in wide or sums.get(node.name) == plain:
                node.input[index] = plain
    graph.drop_unused(model)
    return model


def _described(options: Build, images: int) -> dict[str, Any]:
    settings = options.calibration
    share = {"percentile": settings.percentile} if settings.method == "percentile" else {}
    return {"images": images, "method": settings.method, **share, "max_layer_error": options.max_layer_error}
