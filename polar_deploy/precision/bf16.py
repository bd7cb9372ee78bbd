"""BF16: no converter writes it, so this one does. Weights are rounded to nearest even, casts stand where they must.

ONNX's own schemas say which inputs and outputs of an operator may be BF16; the others stay FP32 behind a cast. Conv
and pooling have BF16 since opset 22.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from polar_deploy import onnx_files
from polar_deploy.documents.build import WiderLayer
from polar_deploy.errors import ContentError
from polar_deploy.precision import graph
from polar_deploy.precision.proof import BOUNDS, Kernels, Reference, kept_wide
from polar_deploy.surgery.detached import sort_nodes

OPSET = 22
_FLOAT, _BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16


def to_bf16(
    model: onnx.ModelProto,
    path: Path,
    reference: Reference | None,
    *,
    keep_io_types: bool,
    kernels: Kernels | None = None,
) -> tuple[onnx.ModelProto, list[WiderLayer]]:
    """Write BF16 into a graph, casts where an operator cannot have it: the graph, and the nodes that stay FP32.

    Args:
        model: FP32, as `graph.load` gives it.
        path: its file, for messages.
        reference: what the network gives in FP32; None: the result is not compared.
        keep_io_types: the graph's inputs and outputs stay FP32.
        kernels: of the runtime that the graph is for, if they can be asked here.

    Raises:
        ContentError: the graph has a body in it (If, Loop, Scan).
    """
    for node in model.graph.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise ContentError(
                f"{path}: {onnx_files.described(node)} has a body of its own, and BF16 is not written into bodies",
                "export the network without control flow, or build for an FP16 or FP32 target",
            )
    if any(node.op_type == "BatchNormalization" for node in model.graph.node):
        model = graph.folded(model, path)
    model = graph.at_least(model, OPSET)

    def convert(wide: Collection[str]) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        _Caster(copy, wide).run(keep_io_types)
        if wide:
            graph.join_casts(copy)
        sort_nodes(copy.graph)
        return graph.inferred(copy)

    return kept_wide(model, convert, reference, BOUNDS["bf16"], kernels)


class _Caster:
    """Turns each FP32 tensor of a graph into BF16; where FP32 is needed, there is one cast, `NAME/fp32`."""

    def __init__(self, model: onnx.ModelProto, wide: Collection[str]) -> None:
        self.wide = wide  # names of nodes that stay FP32
        self.graph, self.opset = model.graph, graph.opset_of(model)
        known = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self.floats = {value.name for value in known if value.type.tensor_type.elem_type == _FLOAT}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == _FLOAT}
        self.floats -= set(self.constants)
        self.casts: dict[str, onnx.NodeProto] = {}
        self.names, self.given = graph.Names(model), dict[str, str]()

    def run(self, keep_io_types: bool) -> None:
        """Convert the graph in place."""
        casts = [self._cast_io(value, keep_io_types) for value in (*self.graph.input, *self.graph.output)]
        self._round_constants()
        for node in list(self.graph.node):
            self._convert(node)
        self.graph.node.extend([*self.casts.values(), *filter(None, casts)])

    def _cast_io(self, value: onnx.ValueInfoProto, keep: bool) -> onnx.NodeProto | None:
        """Make an input or output of the graph BF16; or keep it, by name and type, and return the cast beside it."""
        if value.name not in self.floats:
            return None
        if not keep:
            value.type.tensor_type.elem_type = _BF16
            return None
        inner = self._name(f"{value.name}/bf16")
        for node in self.graph.node:
            for names in (node.input, node.output):
                names[:] = [inner if name == value.name else name for name in names]
        self.floats.add(inner)
        if value in self.graph.input:
            return self._cast(value.name, inner, _BF16)
        return self._cast(inner, value.name, _FLOAT)

    def _round_constants(self) -> None:
        """What an operator needs in FP32 keeps its exact value there: no cast, and a copy if others want BF16."""
        wide = {name for node in self.graph.node for name, narrow in self._inputs(node) if not narrow}
        narrow = {name for node in self.graph.node for name, narrow in self._inputs(node) if narrow}
        for name, tensor in self.constants.items():
            if name in wide & narrow:
                self.graph.initializer.append(
                    numpy_helper.from_array(numpy_helper.to_array(tensor), self._name(f"{name}/fp32"))
                )
            if name not in wide - narrow:
                tensor.CopyFrom(_rounded(tensor))

    def _inputs(self, node: onnx.NodeProto) -> Iterator[tuple[str, bool]]:
        """The inputs of a node, and whether each may be BF16."""
        schema = self._schema(node)
        for index, name in enumerate(node.input):
            yield name, schema is not None and _allows(schema.inputs, index)

    def _convert(self, node: onnx.NodeProto) -> None:
        for index, (name, narrow) in enumerate(self._inputs(node)):
            if name in self.floats and not narrow:
                node.input[index] = self._name(f"{name}/fp32")
                if node.input[index] not in self.casts:
                    self.casts[node.input[index]] = self._cast(name, node.input[index], _FLOAT)
            elif name in self.constants and not narrow and self.constants[name].data_type == _BF16:
                node.input[index] = self._name(f"{name}/fp32")
        schema = self._schema(node)
        for index, name in enumerate(node.output):
            if name in self.floats:
                if schema is not None and _allows(schema.outputs, index):
                    _narrow_attributes(node)
                else:
                    node.output[index] = self._name(f"{name}/made")
                    self.casts[node.output[index]] = self._cast(node.output[index], name, _BF16)

    def _name(self, wanted: str) -> str:
        """The name of a tensor that is written: the one that is wanted, or a new one where the network has that."""
        if wanted not in self.given:
            self.given[wanted] = self.names.fresh(wanted)
        return self.given[wanted]

    def _cast(self, source: str, result: str, kind: int) -> onnx.NodeProto:
        return helper.make_node("Cast", [source], [result], name=self.names.fresh(f"{result}/cast"), to=kind)

    def _schema(self, node: onnx.NodeProto) -> onnx.defs.OpSchema | None:
        """What ONNX says of an operator; None for those of others, and for nodes of `wide`: they stay FP32."""
        if node.domain not in ("", "ai.onnx") or node.name in self.wide:
            return None
        return onnx.defs.get_schema(node.op_type, self.opset)


def _narrow_attributes(node: onnx.NodeProto) -> None:
    """Cast's `to`, `dtype` of what makes tensors, and the value that ConstantOfShape repeats (without one: FP32 0)."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == _FLOAT:
            attribute.i = _BF16
        elif attribute.HasField("t") and attribute.t.data_type == _FLOAT:
            attribute.t.CopyFrom(_rounded(attribute.t))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", helper.make_tensor("value", _BF16, [1], [0.0])))


def _allows(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> bool:
    """Whether BF16 may stand there. The last parameter may stand for many (Concat)."""
    return "tensor(bfloat16)" in parameters[min(index, len(parameters) - 1)].types


def _rounded(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The tensor in BF16."""
    wide = numpy_helper.to_array(tensor).ravel()  # not a scalar: numpy warns where one wraps around
    return helper.make_tensor(tensor.name, _BF16, tensor.dims, rounded_bits(wide).tobytes(), raw=True)


def rounded_bits(wide: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of an array of FP32 in BF16, which is their upper half: rounded to nearest, ties to even.

    Numbers between BF16's largest and FP32's would round to infinity (0.4 % above); they become the largest.
    """
    bits = np.ascontiguousarray(wide).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    rounded = np.where(np.isfinite(wide) & (rounded & 0x7F80 == 0x7F80), rounded - 1, rounded)
    rounded = np.where(np.isnan(wide), bits >> 16 | 0x40, rounded)  # the sum may overflow; the bit keeps it a NaN
    return rounded.astype("<u2")
