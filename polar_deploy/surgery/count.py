"""What a graph costs: multiply-accumulates and parameters, layer by layer."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from polar_deploy.onnx_files import attribute_value
from polar_deploy.surgery.inference import Skeleton
from polar_deploy.surgery.ir import has_body
from polar_deploy.surgery.ops.einsum import REST, parse
from polar_deploy.surgery.sizes import Shape
from polar_deploy.surgery.standins import MICROSOFT, STANDARD

if TYPE_CHECKING:
    import onnx


LIKE = 1 << 12  # shapes and layers that are kept in mind


class Layer(NamedTuple):
    """One convolution, matrix product or recurrent layer with constant weights. Widths are channels, (inputs, outputs).

    groups: blocks of a convolution in which inputs and outputs are connected.
    """

    node: int  # its position among the graph's nodes
    name: str
    operator: str
    macs: int
    params: int
    width: tuple[int, int]
    groups: int

    def padding(self, multiple: int) -> float:
        """The share of a device's work that is lost where it rounds widths up to a multiple: 0 <= share < 1.

        Depthwise convolutions work channel by channel, in others the inputs and outputs of each group are rounded up.
        """
        return _lost(self.width, self.groups, multiple) if self.macs else 0.0


@lru_cache(LIKE)
def _lost(width: tuple[int, int], groups: int, multiple: int) -> float:
    inputs, outputs = (each / groups for each in width)
    if groups > 1 and inputs == 1:
        return 1 - width[1] / _up(width[1], multiple)
    return 1 - inputs * outputs / (_up(inputs, multiple) * _up(outputs, multiple))


def _up(width: float, multiple: int) -> int:
    return -(-int(width) // multiple) * multiple


@dataclass(frozen=True)
class Cost:
    """The cost of a graph at batch 1 and the model's input size (224 a side where that is dynamic and taken).

    Attributes:
        macs: multiply-accumulates of Conv, ConvTranspose, Gemm, MatMul and Einsum (those of two computed tensors too),
            quantised ones included, and of LSTM, GRU and RNN.
        params: elements of all floating-point constants and quantised weights that a node reads, each constant once.
            Scalars are left out: exporters that write the same network differ in them.
        layers: those with weights, in the graph's order.
        inputs: the shapes of the inputs that it is counted at.
    """

    macs: int
    params: int
    layers: tuple[Layer, ...]
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    def padding(self, multiple: int) -> float:
        """`Layer.padding` of all layers together, weighted with their multiply-accumulates."""
        weighted = sum(layer.macs / (1 - layer.padding(multiple)) for layer in self.layers)
        return 1 - sum(layer.macs for layer in self.layers) / weighted if weighted else 0.0


# Where the weights are among the inputs of each operator whose multiply-accumulates count; the data is input 0.
WEIGHTS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), 3),
    **dict.fromkeys(("FusedConv", "FusedGemm", "FusedMatMul"), 1),  # of com.microsoft
    **dict.fromkeys(("LSTM", "GRU", "RNN", "Einsum"), 1),
}


SUMS = ("Add", "Sum")
DOMAINS = (*STANDARD, MICROSOFT)
FOLDING = ("Conv", "ConvTranspose", "Gemm")  # that a BatchNormalization behind them folds into


def count(
    model: onnx.ModelProto, folding: Mapping[int, bool] | None = None, *, skeleton: Skeleton | None = None
) -> Cost:
    """Counts the cost of a model.

    Args:
        folding: BatchNormalizations (by position) that count as what they fold to, see `foldable_norms`.
        skeleton: that of the model, where there is one.

    Raises:
        ContentError: its shapes contradict each other.
    """
    inputs, shape_of = (skeleton or Skeleton(model)).at_batch_1()
    sizes = parameters(model)
    made = _made_of(model, sizes)
    folding = folding or {}
    counted: set[str] = set()
    rearranged: set[str] = set()
    params = macs = 0
    layers: list[Layer] = []
    for position, node in enumerate(model.graph.node):
        operator = node.op_type
        if operator not in WEIGHTS and node.output[0] in made:
            rearranged.update(name for name in node.input if name in sizes)
            continue  # they count where what is made of them is read
        own = [each for name in node.input for each in made.get(name, (name,) if name in sizes else ())]
        if not own and operator not in WEIGHTS:
            continue
        if position in folding:
            own = own[:1] if folding[position] else []
        new = 0
        for name in own:
            if name not in counted:
                counted.add(name)
                new += sizes[name]
        params += new
        if operator in WEIGHTS and node.domain in DOMAINS:
            done, width = _multiply(node, operator, shape_of)
            macs += done
            weights = node.input if operator == "Einsum" else [node.input[WEIGHTS[operator]]]
            if any(name in sizes or made.get(name) for name in weights):
                groups = attribute_value(node, "group", 1)
                layers.append(Layer(position, node.name or node.output[0], operator, done, new, width, groups))
    params += sum(sizes[name] for name in rearranged - counted)
    return Cost(macs, params, tuple(layers), inputs)


def layer_work(model: onnx.ModelProto) -> dict[int, int]:
    """What a node does at batch 1, by its position in the graph: multiply-accumulates, or the elements of a sum."""
    _, shape_of = Skeleton(model).at_batch_1()
    found = {}
    for position, node in enumerate(model.graph.node):
        if node.op_type in WEIGHTS and node.domain in DOMAINS:
            found[position] = _multiply(node, node.op_type, shape_of)[0]
        elif node.op_type in SUMS:
            sizes = shape_of(node.output[0]) or ()
            found[position] = math.prod(size for size in sizes if isinstance(size, int))
    return found


def foldable_norms(model: onnx.ModelProto) -> dict[int, bool]:
    """Positions of the BatchNormalizations that fold into the layer before them, and whether that layer gets a bias."""
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    reads = Counter(name for node in model.graph.node for name in node.input)
    reads.update(value.name for value in model.graph.output)
    found: dict[int, bool] = {}
    for position, node in enumerate(model.graph.node):
        layer = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if layer is None or layer.op_type not in FOLDING or reads[node.input[0]] > 1:
            continue
        own = [name for name in layer.input[1:] if name]
        if {*own, *node.input[1:]} <= constants and all(reads[name] == 1 for name in own):
            found[position] = len(own) == 1
    return found


def parameters(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of every constant that is a parameter, by name: floating-point ones and quantised weights."""
    import onnx

    floats = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")}
    constants = [(tensor.name, tensor) for tensor in model.graph.initializer]
    constants += [
        (node.output[0], attribute.t)
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    every: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, tensor in constants:
        dims = tuple(tensor.dims)
        every[name] = math.prod(dims)
        if dims and tensor.data_type in floats:
            sizes[name] = every[name]
    for node in model.graph.node:
        operator = node.op_type
        if operator == "DequantizeLinear" and node.input[0] in every:
            sizes[node.output[0]] = every[node.input[0]]
        elif operator.endswith("Integer") or operator.startswith("QLinear"):
            names = [node.input[i] for i in (WEIGHTS.get(operator, 0), 8) if i < len(node.input)]  # 8: the bias
            sizes.update((name, every[name]) for name in names if name in every)
    return sizes


def _made_of(model: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """The parameters that a tensor is made of, for each that is computed from constants and shapes alone.

    So exporters write the weights of an LSTM, whose gates ONNX has in another order than PyTorch.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    made: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        if node.op_type in ("Constant", "Shape", "Size"):
            constants.add(node.output[0])
        elif node.input and constants.issuperset(filter(None, node.input)) and not has_body(node):
            constants.update(node.output)
            if node.output[0] not in sizes:  # as what is dequantised is
                found = [each for name in node.input for each in made.get(name, (name,) if name in sizes else ())]
                made.update(dict.fromkeys(node.output, tuple(dict.fromkeys(found))))
    return made


def _multiply(
    node: onnx.NodeProto, operator: str, shape_of: Callable[[str], Shape | None]
) -> tuple[int, tuple[int, int]]:
    """Multiply-accumulates of one node, and its width; zeros where a shape is not known."""
    inputs = list(node.input)
    if operator == "Einsum":
        return _einsum(node, [_sizes(shape_of(name)) for name in inputs])
    first, second = _sizes(shape_of(inputs[0])), _sizes(shape_of(inputs[WEIGHTS[operator]]))
    result = _sizes(shape_of(node.output[0]))
    if first is None or second is None or result is None:
        return 0, (0, 0)
    if operator == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:]), (first[1], result[1])
    if "Conv" in operator:
        return math.prod(result) * math.prod(second[1:]), (first[1], result[1])
    if operator in ("LSTM", "GRU", "RNN"):
        recurrence = _sizes(shape_of(inputs[2]))
        return _recur(first, second, recurrence) if recurrence is not None else (0, (0, 0))
    inner = first[0] if attribute_value(node, "transA", 0) else first[-1]
    return math.prod(result) * inner, (inner, result[-1] if result else 1)


def _recur(data: tuple[int, ...], weight: tuple[int, ...], recurrence: tuple[int, ...]) -> tuple[int, tuple[int, int]]:
    """The same of an LSTM, GRU or RNN: each step multiplies by all of W and R once, for every gate and direction.

    So ONNX writes them: "it = f(Xt*(Wi^T) + Ht-1*(Ri^T) + …)"; what a cell multiplies element by element is left out,
    as it is in other operators.
    """
    steps = math.prod(data[:2])
    return steps * (math.prod(weight) + math.prod(recurrence)), (data[2], weight[0] * recurrence[2])


def _einsum(node: onnx.NodeProto, shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, tuple[int, int]]:
    """The same of an Einsum: two inputs at a time from the left, each pair over all indices that stay or are summed.

    A pair that sums over no common index multiplies element by element, which does not count. Dots are not followed.
    """
    terms, result = parse(attribute_value(node, "equation", b"").decode())
    known = [shape for shape in shapes if shape is not None]
    if REST in "".join(terms) or list(map(len, terms)) != list(map(len, known)):
        return 0, (0, 0)
    size = dict(zip("".join(terms), itertools.chain(*known), strict=True))
    macs, made, width = 0, set(terms[0]), (0, 0)
    for index, term in enumerate(terms[1:], 1):
        stays = set(result).union(*terms[index + 1 :])
        summed = (made & set(term)) - stays
        is_second = result[:1] in term and result[:1] not in made  # the data, which has the batch
        outputs = (made - set(term) if is_second else set(term) - made) & stays
        made = (made | set(term)) & stays
        if summed:
            inner, outer = (math.prod(size[letter] for letter in letters) for letters in (summed, made))
            macs, width = macs + inner * outer, (inner, math.prod(size[letter] for letter in outputs))
    return macs, width


@lru_cache(LIKE)
def _sizes(shape: Shape | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes = tuple(dim for dim in shape if isinstance(dim, int))
    return sizes if len(sizes) == len(shape) else None
