"""What an engine is made of: each layer with its precision, format and tactic, held against the target."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polar_deploy.documents.layers import Layer
from polar_deploy.errors import ContentError

# TensorRT's names of types, in the network (DataType) and in the inspector's texts
_TYPES = {
    "FLOAT": "fp32",
    "FP32": "fp32",
    "TF32": "fp32",
    "HALF": "fp16",
    "FP16": "fp16",
    "BF16": "bf16",
    "BFLOAT16": "bf16",
    "INT8": "int8",
    "UINT8": "uint8",
    "FP8": "fp8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "INT4": "int4",
}
_WORD = re.compile(rf"\b({'|'.join(_TYPES)})\b", re.IGNORECASE)
_COMPUTES = re.compile(r"conv|gemm|matmul|matrix_?multiply|fullyconnected", re.IGNORECASE)
_MULTIPLYING_KERNEL = re.compile(r"fprop|gemm|xmma_conv|cudnn", re.IGNORECASE)
# A kernel's name says what it multiplies: "..._i8f32_i8i32_f32_..." reads INT8, writes FP32, multiplies INT8 into INT32
_KERNEL = re.compile(r"_(?:i8|u8|bf16|f16|f32)+_(tf32|bf16|f16|f32|i8)(?:i32|f32|f16)_")
_MULTIPLIES = {"tf32": "tf32", "bf16": "bf16", "f16": "fp16", "f32": "fp32", "i8": "int8"}
_NARROWER = {"fp32": ("fp16", "bf16", "int8", "fp8")}  # precision -> what no layer at all may be in
_PRECISIONS = frozenset({"fp32", "tf32", "fp16", "bf16", "fp8", "int8"})
_FLOATS = ("fp16", "bf16", "fp32")  # the narrow ones first
_WIDE = {"Two": 2, "Four": 4, "Eight": 8, "Sixteen": 16, "Thirty-two": 32}
_THROUGH = frozenset({"SHUFFLE", "IDENTITY", "CONSTANT", "CAST", "SQUEEZE", "UNSQUEEZE"})


def of_network(network: Any) -> list[Layer]:
    """The layers of a network definition, before it is built: what TensorRT for RTX can tell without a GPU.

    A layer whose operands all come from DequantizeLinear is one of INT8: the builder computes it so.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    return [_network_layer(layer, makers) for layer in layers]


def of_inspector(information: Mapping[str, Any]) -> list[Layer]:
    """The layers of a built engine from its inspector's DETAILED JSON, in the order in which they run.

    Types of dynamic tensors are told only under an execution context whose shapes are set.
    """
    return [_engine_layer(each) for each in information["Layers"]]


class Formats(NamedTuple):
    """What costs time and computes nothing: layers that only change the format, and channels that fill one up.

    None where the layers are those of a network that is not built yet.
    """

    reformats: int | None
    padded_channels: int | None


def counts(layers: Sequence[Layer]) -> Formats:
    """How many there are of both."""
    if all(layer.format is None for layer in layers):
        return Formats(None, None)
    return Formats(sum(layer.op.lower() == "reformat" for layer in layers), sum(layer.padded or 0 for layer in layers))


def require(
    layers: Sequence[Layer], precision: str, path: Path, *, tf32: bool = False, wider: int = 0
) -> dict[str, int]:
    """Count layers by precision; ContentError unless the layers with weights are of the target's.

    Layers of wider integers compute shapes and are left out. For INT8 half of them have to be: those that lose
    too much stay wider on purpose. An FP32 engine has nothing narrower at all.

    Args:
        layers: of `of_network` or `of_inspector`.
        precision: the target's.
        path: the network, for messages.
        tf32: whether FP32 may be computed as TF32.
        wider: how many layers the graph keeps in a wider type on purpose.
    """
    allowed = {precision, "tf32"} if precision == "fp32" and tf32 else {precision}
    computing = [layer for layer in layers if _computes(layer)]
    odd = [layer for layer in computing if layer.type not in allowed]
    odd += [layer for layer in layers if layer.type in _NARROWER.get(precision, ())]
    if all(layer.type not in allowed for layer in computing):
        raise ContentError(
            f"{path}: no layer of the engine computes in {precision}: {_listed(computing) or 'none has weights'}",
            "the types are in the graph: see whether the file is the typed one, and report this network",
        )
    if len(odd) > (len(computing) // 2 if precision == "int8" else wider):
        what = f"layer {odd[0].name!r} ({odd[0].op}) computes in {odd[0].type}"
        raise ContentError(
            f"{path}: {what}, the target is {precision}", "report this network and the version of TensorRT"
        )
    return dict(Counter(layer.type for layer in layers if layer.type in _PRECISIONS).most_common())


def type_of(text: str) -> str:
    """The type in one of TensorRT's texts: "Channel major FP16 format where channel % 8 == 0" is "fp16"."""
    found = _WORD.search(text)
    return _TYPES[found[1].upper()] if found else "unknown"


def _computes(layer: Layer) -> bool:
    """Whether a layer multiplies with weights, so that its precision matters."""
    if _COMPUTES.search(f"{layer.op} {layer.kind or ''}"):
        return True
    return _MULTIPLYING_KERNEL.search(layer.tactic or "") is not None


def _network_layer(layer: Any, makers: Mapping[str, Any]) -> Layer:
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    types = [_TYPES.get(tensor.dtype.name, tensor.dtype.name.lower()) for tensor in inputs if tensor is not None]
    output = layer.get_output(0)
    written = _TYPES.get(output.dtype.name, output.dtype.name.lower())
    operands = [tensor for tensor in inputs[:2] if tensor is not None]
    computes = _COMPUTES.search(layer.type.name)
    quantised = computes and len(operands) == 2 and all(_dequantised(tensor, makers) for tensor in operands)
    kind = "int8" if quantised else written
    return Layer(name=layer.name, op=layer.type.name.lower(), inputs=types, type=kind)


def _dequantised(tensor: Any, makers: Mapping[str, Any]) -> bool:
    """Whether a tensor comes from DequantizeLinear of INT8, perhaps through layers that only move values."""
    while (maker := makers.get(tensor.name)) is not None:
        if maker.type.name == "DEQUANTIZE":
            return bool(maker.get_input(0).dtype.name == "INT8")
        if maker.type.name not in _THROUGH or maker.num_inputs == 0:
            return False
        tensor = maker.get_input(0)
    return False


def _engine_layer(each: Mapping[str, Any]) -> Layer:
    read, written = ([_format(tensor) for tensor in each.get(key, ())] for key in ("Inputs", "Outputs"))
    tactic = each.get("TacticName", each.get("TacticValue", ""))
    inputs, outputs = ([type_of(text) for text in texts] for texts in (read, written))
    return Layer(
        name=each["Name"],
        op=each["LayerType"],
        kind=each.get("ParameterType", ""),
        inputs=inputs,
        type=_computes_in(tactic, each.get("Weights"), inputs, outputs),
        format=written[0] if written else "",
        tactic=tactic,
        padded=sum(_padding(tensor) for tensor in each.get("Outputs", ())),
    )


def _format(tensor: Mapping[str, Any]) -> str:
    """A tensor's layout and type, which are one text."""
    return str(tensor.get("Format/Datatype") or f"{tensor.get('Format', '')} {tensor.get('Datatype', '')}").strip()


def _computes_in(tactic: str, weights: Any, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """What a layer of an engine computes in: its kernel's name says it best, then its weights, then its tensors.

    Of the tensors' types the narrowest counts, as a fused cast reads or writes wider ones; but one that only writes
    INT8 computes in what it reads.
    """
    if kernel := _KERNEL.search(tactic):
        return _MULTIPLIES[kernel[1]]
    if isinstance(weights, dict) and weights.get("Count") and (stored := type_of(weights["Type"])) != "unknown":
        return stored
    if "int8" in inputs:
        return "int8"
    known = [kind for kind in (*inputs, *outputs) if kind != "unknown"]
    return next((kind for kind in _FLOATS if kind in known), known[0] if known else "unknown")


def _padding(tensor: Mapping[str, Any]) -> int:
    """Channels that a tensor's format adds to fill a vector of channels."""
    text, shape = _format(tensor), tensor.get("Dimensions", ())
    modulo = re.search(r"channel % (\d+) == 0", text)
    word = text.split(" wide channel")[0]
    step = int(modulo[1]) if modulo else _WIDE.get(word, 1)
    return -shape[1] % step if len(shape) == 4 else 0


def _listed(layers: Iterable[Layer]) -> str:
    return ", ".join(f"{number} in {kind}" for kind, number in Counter(each.type for each in layers).items())
