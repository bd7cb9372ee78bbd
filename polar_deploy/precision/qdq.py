"""Pairs of QuantizeLinear and DequantizeLinear (Q/DQ) in a graph, in the dialects that runtimes fuse.

ONNX Runtime on a CPU: activations unsigned with a zero point, and the outputs of layers rounded, too, as well as what
lies between (Add, Concat, pooling, shapes), so that integers flow from layer to layer; biases in int32. Its integer
convolution writes integers only, so that all who read one read it rounded, whatever they are (Sigmoid, HardSwish).
OpenVINO: the same, but its kernels write floats as well, and it has them for transposed convolutions without groups.

TensorRT: activations signed and symmetric, at the inputs of layers only; biases stay float. The sum of a residual
block is fused with the convolution in front of it if its OTHER input is rounded (TensorRT's guide: "quantize the
residual input in skip connections"), and a pair between the two would keep them apart. Scales are numbers of FP16.

Weights are symmetric, with a scale a channel, and have 7 bits where 8 would overflow, see `precision.saturation`. Of
ONNX Runtime's own quantizer (1.32) nothing is left here: its time grows with the square of the layers, it loses Gemm's
beta, and it confuses tensors with names of its own making.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.onnx_files import attribute_value
from polar_deploy.precision import graph
from polar_deploy.surgery.detached import put_nodes
from polar_deploy.surgery.ir import has_body

Range = tuple[float, float]  # the smallest and the largest value that is represented

_MOVING = ("Flatten", "MaxPool", "Pad", "Reshape", "Slice", "Transpose")  # their outputs are values that they read
_CLIPPING = ("Clip", "Relu")
_LOGITS = ("Gemm", "MatMul")  # their integer kernels write FP32 at no cost
_LARGEST_INT32 = 2.0**31 * 0.99


@dataclass(frozen=True)
class Scheme:
    """A dialect.

    Attributes:
        symmetric: activations are INT8 without a zero point; else UINT8 with one.
        layers: operators with weights that the runtime has an integer kernel for.
        between: operators that pass integers on.
        wider: type of what is not quantised.
        opset: the oldest that will do (scales a channel: 13, FP16 scales: 19).
        transposed_groups: whether it has kernels for transposed convolutions in groups, whose weights have one scale.
        largest: what the largest weight of a channel becomes.
        rounds_weights: whether the runtime rounds weights unasked that stand between pairs (`shield`).
        whole: whether its integer convolution writes integers only, so that nothing may read one as it is.
    """

    symmetric: bool
    layers: frozenset[str]
    between: tuple[str, ...]
    wider: str
    opset: int
    transposed_groups: bool = False
    largest: int = 127
    rounds_weights: bool = False
    whole: bool = False

    def has_kernel(self, layer: onnx.NodeProto) -> bool:
        """Whether the runtime computes a layer in integers."""
        return layer.op_type in self.layers and (self.transposed_groups or channel_axis(layer) is not None)

    @property
    def outputs(self) -> bool:
        """Whether what layers write is rounded, too."""
        return bool(self.between)


ORT = Scheme(
    symmetric=False,
    layers=graph.LAYERS - {"ConvTranspose"},
    between=(*_CLIPPING, *_MOVING, "Add", "AveragePool", "Concat", "GlobalAveragePool"),
    wider="fp32",
    opset=13,
    rounds_weights=True,
    whole=True,
)
TRT = Scheme(symmetric=True, layers=graph.LAYERS, between=(), wider="fp16", opset=19, transposed_groups=True)
OPENVINO = replace(ORT, layers=graph.LAYERS, rounds_weights=False, whole=False)
SCHEMES = {"onnxruntime": ORT, "openvino": OPENVINO, "tensorrt": TRT}  # as `backends.Backend.int8` names them


@dataclass(frozen=True)
class Rounding:
    """How an activation is rounded: `real = scale * (integer - zero)`."""

    scale: float
    zero: int
    symmetric: bool

    @classmethod
    def of(cls, extent: Range, symmetric: bool) -> Rounding:
        """What represents a range, 0 included, with 8 bits."""
        low, high = min(extent[0], 0.0), max(extent[1], 0.0)
        if symmetric:
            return cls(float(fp16_above(np.array(max(-low, high) / 127, np.float32))), 0, True)
        scale = float(np.float32((high - low) / 255))
        return cls(scale, round(-low / scale), False) if scale > np.finfo(np.float32).tiny else cls(1.0, 0, False)

    @property
    def levels(self) -> Range:
        """The smallest and the largest value."""
        first = -128 if self.symmetric else 0
        return (first - self.zero) * self.scale, (first + 255 - self.zero) * self.scale


def reads(node: onnx.NodeProto) -> Sequence[str]:
    """The inputs of a node that hold activations: of sums and joins all, else the first."""
    return list(node.input) if node.op_type in ("Add", "Concat") else node.input[:1]


def activations(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], scheme: Scheme) -> list[str]:
    """The float tensors that nodes read, and write where these are rounded, too; constants aside, each once."""
    known = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats -= {tensor.name for tensor in model.graph.initializer}
    names = (name for node in nodes for name in (*reads(node), *(node.output[:1] if scheme.outputs else ())))
    return [name for name in dict.fromkeys(names) if name in floats]


def quantised(
    model: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    ranges: Mapping[str, Range],
    scheme: Scheme,
    sums: Mapping[str, str] | None = None,
    wide: Collection[str] = (),
) -> onnx.ModelProto:
    """A copy of a network in which nodes read, and in ONNX Runtime's dialect write, rounded numbers.

    Args:
        model: FP32, each layer in the form that `layers.plain` gives it.
        nodes: some of its nodes, layers among them; what the others read stays as it is.
        ranges: of each of their `activations`.
        scheme: the dialect.
        sums: by the name of a sum, the one tensor that it reads as it is.
        wide: names of nodes that INT8 would hurt: they read no rounded numbers, even where the scheme is `whole`.
    """
    return _Inserter(model, nodes, ranges, scheme, sums or {}, wide).run()


class _Inserter:
    """Writes the pairs of one graph, each node behind what it reads."""

    def __init__(
        self,
        model: onnx.ModelProto,
        nodes: Iterable[onnx.NodeProto],
        ranges: Mapping[str, Range],
        scheme: Scheme,
        sums: Mapping[str, str],
        wide: Collection[str],
    ) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.scheme, self.ranges, self.sums, self.wide = scheme, ranges, sums, wide
        self.chosen = {node.name for node in nodes}
        self.names, self.constants = graph.Names(model), graph.weights(model)
        self.outputs = {value.name for value in model.graph.output}
        self.makers = graph.makers(self.model)
        self.readers = graph.readers(self.model)
        self.rounded: dict[str, Rounding] = {}
        self.whole: set[str] = set()  # what all readers read rounded
        self.absorbed: dict[str, str] = {}  # what a Relu or Clip gave that its pair makes needless -> what it read
        self.pairs: dict[str, str] = {}  # activation -> the same, rounded
        self.raw: dict[str, str] = {}  # output of the graph that is rounded -> the tensor in front of its pair
        self.stored: dict[tuple[str, int, bytes], str] = {}  # weight, axis and scales -> the weight, rounded
        self.written: list[onnx.NodeProto] = []

    def run(self) -> onnx.ModelProto:
        nodes = list(self.model.graph.node)
        for node in nodes:
            if node.name in self.chosen:
                self._decide(node)
        for node in nodes:
            if node.name in self.chosen and node.op_type in _CLIPPING:
                self._absorb(node)
        for value in self.model.graph.input:
            self._pair(value.name, value.name)
        for node in nodes:
            self._write(node)
        put_nodes(self.model.graph, self.written)
        graph.drop_unused(self.model)
        return self.model

    def _decide(self, node: onnx.NodeProto) -> None:
        """Round what a node reads and writes. What only moves values writes with the scale that it reads."""
        for name in self._reads_rounded(node):
            self.rounded.setdefault(name, Rounding.of(self.ranges[name], self.scheme.symmetric))
        result = node.output[0]
        if not self.scheme.outputs or node.op_type in _LOGITS or result not in self.ranges:
            return
        if self.scheme.whole and node.op_type in self.scheme.layers and self._may_be_whole(result):
            self.whole.add(result)
        moves = node.op_type in _MOVING and (node.op_type != "Pad" or self._pads_with_zeros(node))
        if moves and node.input[0] in self.rounded:
            self.rounded[result] = self.rounded[node.input[0]]
        else:
            self.rounded[result] = Rounding.of(self.ranges[result], self.scheme.symmetric)

    def _may_be_whole(self, tensor: str) -> bool:
        """Whether none of its readers has to have a tensor as it is; a body reads it by its name."""
        return not any(reader.name in self.wide or has_body(reader) for reader in self.readers[tensor])

    def _reads_rounded(self, node: onnx.NodeProto) -> Iterator[str]:
        if node.name in self.chosen:
            yield from (name for name in reads(node) if name in self.ranges and name != self.sums.get(node.name))
        yield from self.whole.intersection(node.input)

    def _pads_with_zeros(self, node: onnx.NodeProto) -> bool:
        mode = attribute_value(node, "mode", b"constant")
        value = node.input[2] if len(node.input) > 2 else ""
        return mode != b"constant" or not value or (value in self.constants and not self.constants[value].any())

    def _absorb(self, node: onnx.NodeProto) -> None:
        """Drop a Relu or Clip whose pair cuts off the same values: the layer in front is then fused with the pair.

        Nothing else may read what it reads, or read what it gives without the pair; of two in a row the first one goes.
        Where it has to stay, and no integers arrive, there is no reason to round what it reads.
        """
        source, result = node.input[0], node.output[0]
        alone = self.readers[source] == [node] and source not in self.outputs
        if not alone or result not in self.rounded or source in self.absorbed:
            return
        if source in self.whole and self._may_be_whole(result):
            self.whole.add(result)
        if all(result in self._reads_rounded(reader) for reader in self.readers[result]) and self._cuts_off(node):
            self.absorbed[result] = source
            self.rounded.pop(source, None)
        elif (maker := self.makers.get(source)) is None or maker.name not in self.chosen:
            self.rounded.pop(source, None)

    def _cuts_off(self, node: onnx.NodeProto) -> bool:
        """Whether the pair behind a Relu or Clip rounds all that lies outside of its bounds to the bounds."""
        bounds: list[float] = [-np.inf, np.inf]
        if node.op_type == "Relu":
            bounds[0] = 0.0
        for index, name in enumerate(node.input[1:3]):
            if name and (name not in self.constants or self.constants[name].size != 1):
                return False
            if name:
                bounds[index] = float(self.constants[name].reshape(()))
        rounding = self.rounded[node.output[0]]
        low, high = rounding.levels
        return bounds[0] <= low + rounding.scale / 2 and bounds[1] >= high - rounding.scale / 2

    def _write(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            if name in self.rounded and name in self.outputs and name not in self.absorbed:
                self.raw[name] = self.names.fresh(f"{name}_unrounded")
        if node.output[0] in self.absorbed:
            self._pair(node.output[0], self._plain(self.absorbed[node.output[0]]))
            return
        rounded = {name for name in self._reads_rounded(node) if name in self.pairs}
        source = node.input[0] if len(node.input) else ""
        node.input[:] = [self.pairs[name] if name in rounded else self._plain(name) for name in node.input]
        if node.name in self.chosen and node.op_type in self.scheme.layers and source in rounded:
            self._round_constants(node, self.rounded[source].scale)
        results = list(node.output)
        node.output[:] = [self._plain(name) for name in results]
        self.written.append(node)
        for name in results:
            self._pair(name, self._plain(name))

    def _plain(self, name: str) -> str:
        return self.raw.get(name, name)

    def _pair(self, name: str, source: str) -> None:
        """Write the pair of an activation, which lies in `source`; outputs of the graph keep their names behind it."""
        if name not in self.rounded:
            return
        rounding = self.rounded[name]
        scale = self._store(np.array(rounding.scale, np.float32), f"{name}_scale")
        zero = self._store(np.array(rounding.zero, np.int8 if rounding.symmetric else np.uint8), f"{name}_zero_point")
        integers = self.names.fresh(f"{name}_quantized")
        given = name in self.outputs and source != name
        result = name if given else self.names.fresh(f"{name}_dequantized")
        self._node("QuantizeLinear", [source, scale, zero], integers)
        self._node("DequantizeLinear", [integers, scale, zero], result)
        self.pairs[name] = result

    def _round_constants(self, layer: onnx.NodeProto, scale: float) -> None:
        """A layer's weight in INT8; its bias in INT32, in steps of both scales, where the dialect wants that."""
        weight = self.constants[layer.input[1]]
        axis = channel_axis(layer)
        bias = self.constants[layer.input[2]] if len(layer.input) > 2 and layer.input[2] else None
        if self.scheme.symmetric:
            steps = symmetric_scales(weight, axis, self.scheme.largest)
        else:
            in_steps = None if bias is None else np.abs(bias / np.float32(scale))
            steps = _scales_with_bias(weight, axis, self.scheme.largest, in_steps)
        layer.input[1] = self._rounded_weight(layer.input[1], weight, axis, steps)
        if bias is not None and not self.scheme.symmetric:
            wide = np.float64(scale) * steps
            values = np.rint(bias / wide).astype(np.int32)
            layer.input[2] = self._constant(layer.input[2], values, wide.astype(np.float32), 0)

    def _rounded_weight(
        self, name: str, weight: npt.NDArray[np.float32], axis: int | None, steps: npt.NDArray[np.float32]
    ) -> str:
        key = (name, -1 if axis is None else axis, steps.tobytes())
        if key not in self.stored:
            shape = [1] * weight.ndim
            if axis is not None:
                shape[axis] = -1
            largest = self.scheme.largest
            values = np.clip(np.rint(weight / steps.reshape(shape)), -largest, largest).astype(np.int8)
            self.stored[key] = self._constant(name, values, steps, axis)
        return self.stored[key]

    def _constant(
        self, name: str, values: npt.NDArray[np.signedinteger], steps: npt.NDArray[np.float32], axis: int | None
    ) -> str:
        """Store integers and dequantise them."""
        stored = self._store(values, f"{name}_quantized")
        scale = self._store(steps, f"{name}_scale")
        zero = self._store(np.zeros(steps.shape, values.dtype), f"{name}_zero_point")
        result = self.names.fresh(f"{name}_dequantized")
        attributes = {} if axis is None else {"axis": axis}
        self._node("DequantizeLinear", [stored, scale, zero], result, **attributes)
        return result

    def _store(self, value: npt.NDArray[np.generic], name: str) -> str:
        tensor = numpy_helper.from_array(value, self.names.fresh(name))
        self.model.graph.initializer.append(tensor)
        return tensor.name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        name = self.names.fresh(f"{output}/{operator}")
        self.written.append(helper.make_node(operator, inputs, [output], name=name, **attributes))


def channel_axis(layer: onnx.NodeProto) -> int | None:
    """The axis of a layer's weight that counts its output channels; None where none does (ConvTranspose in groups)."""
    attributes = {each.name: each.i for each in layer.attribute}
    if layer.op_type == "Gemm":
        return 0 if attributes.get("transB") else 1
    if layer.op_type == "ConvTranspose":
        return 1 if attributes.get("group", 1) == 1 else None
    return {"Conv": 0, "MatMul": 1}[layer.op_type]


def symmetric_scales(weight: npt.NDArray[np.float32], axis: int | None, largest: int) -> npt.NDArray[np.float32]:
    """Weights' scales that FP16 holds exactly: each weight is rounded with the very scale that is stored.

    Symmetric, one an output channel: the channel's largest magnitude becomes `largest`. That is a small scale, and FP16
    is coarse below 6e-5.
    """
    exact = _largest(weight, axis) / np.float32(largest)
    return fp16_above(np.where(exact > 0, exact, 1).astype(np.float32))


def fp16_above(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The smallest positive numbers of FP16 that are not below `values`, as FP32; at most FP16's largest."""
    narrow = np.minimum(values, np.finfo(np.float16).max).astype(np.float16)
    narrow = np.where(narrow < values, np.nextafter(narrow, np.float16(np.inf)), narrow)
    return np.asarray(np.clip(narrow, 2.0**-24, np.finfo(np.float16).max), np.float32)


def _scales_with_bias(
    weight: npt.NDArray[np.float32], axis: int | None, largest: int, bias: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """Weights' scales, so large that the bias (in units of the input's scale) fits into INT32.

    A channel whose weights are a billion times smaller than others is one without weights.
    """
    sizes = _largest(weight, axis)
    steps = np.maximum(sizes, 1e-9 * sizes.max(initial=0)) / largest if sizes.any() else np.ones_like(sizes)
    if bias is not None:
        steps = np.maximum(steps, bias / _LARGEST_INT32)
    return np.asarray(np.maximum(steps, np.finfo(np.float32).tiny), np.float32)


def _largest(weight: npt.NDArray[np.float32], axis: int | None) -> npt.NDArray[np.float32]:
    """The largest magnitude of each channel, or of all."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    return np.asarray(np.abs(weight).max(axis=others, initial=0), np.float32)
