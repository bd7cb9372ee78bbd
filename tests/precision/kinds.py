"""Small networks, each with one thing that a quantizer or a converter gets wrong: [batch,3,16,16] to 5 logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 16
KINDS: dict[str, Callable[[], onnx.ModelProto]] = {}


def images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, SIDE, SIDE), np.float32)


def kind(build: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    KINDS[build.__name__] = build
    return build


class Net:
    """Nodes and constants, written down one after the other."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, name: str, *shape: int, value: np.ndarray | None = None) -> str:
        fan = int(np.prod(shape[1:])) or 1
        drawn = (self.rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32) if value is None else value
        self.constants[name] = np.asarray(drawn)
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", **attributes))
        return output

    def conv(self, source: str, output: str, into: int, out: int, **attributes: object) -> str:
        inputs = [source, self.constant(f"{output}.w", out, into, 3, 3), self.constant(f"{output}.b", out)]
        return self.node("Conv", inputs, output, pads=[1] * 4, **attributes)

    def flat(self, source: str) -> str:
        return self.node("Flatten", [self.node("GlobalAveragePool", [source], f"{source}.mean")], f"{source}.flat")

    def classifier(
        self, source: str, channels: int, opset: int = 17, *, outputs: dict[str, int] | None = None
    ) -> onnx.ModelProto:
        """The network with a head on `source`; `outputs` names others of [batch,N,16,16]."""
        inputs = [self.flat(source), self.constant("head.w", 5, channels), self.constant("head.b", 5)]
        self.node("Gemm", inputs, "logits", transB=1)
        return self.model(opset, outputs)

    def model(self, opset: int = 17, outputs: dict[str, int] | None = None) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])]
        for name, channels in (outputs or {}).items():
            values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, SIDE, SIDE]))
        source = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "net", [source], values, constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.checker.check_model(made, full_check=True)
        return made


def stem(seed: int = 0) -> Net:
    """A convolution and a Relu: the tensor "r" has 8 channels."""
    net = Net(seed)
    net.node("Relu", [net.conv("input", "a", 3, 8)], "r")
    return net


@kind
def gemm_with_factors() -> onnx.ModelProto:
    net = stem()
    net.flat("r")
    net.node("Gemm", ["r.flat", net.constant("h.w", 16, 8), net.constant("h.b", 16)], "h", beta=0.5, transB=1)
    net.node("Gemm", [net.node("Relu", ["h"], "h.r"), net.constant("o.w", 16, 5)], "logits", alpha=3.0)
    return net.model()


@kind
def gemm_with_a_computed_bias() -> onnx.ModelProto:
    net = stem()
    net.flat("r")
    net.node("Gemm", ["r.flat", net.constant("h.w", 8, 8), net.constant("h.b", 8)], "h", alpha=0.5, beta=2.0)
    net.node("Gemm", ["r.flat", net.constant("i.w", 8, 8), "h"], "i", alpha=2.0, beta=0.5, transB=1)
    net.node("Gemm", ["i", net.constant("o.w", 8, 5)], "logits")
    return net.model()


def gemm_bias(*shape: int) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        net = stem()
        bias = net.constant("o.b", value=np.float32(net.rng.standard_normal(shape)))
        net.node("Gemm", [net.flat("r"), net.constant("o.w", 8, 5), bias], "logits")
        return net.model()

    return build


SHAPES = ((1, 5), (1,), (), (1, 1))
KINDS |= {f"gemm_bias_{'x'.join(map(str, shape)) or 'scalar'}": gemm_bias(*shape) for shape in SHAPES}


@kind
def matmul_and_a_row() -> onnx.ModelProto:
    net = stem()
    net.node("MatMul", [net.flat("r"), net.constant("o.w", 8, 5)], "product")
    net.node("Add", ["product", net.constant("o.b", 1, 5)], "logits")
    return net.model()


@kind
def matrix_along_both_axes() -> onnx.ModelProto:
    net = stem()
    spread = net.rng.standard_normal((8, 8)) * np.logspace(-2, 1, 8)
    net.constant("tied", value=spread.astype(np.float32))
    net.node("Gemm", [net.flat("r"), "tied", net.constant("e.b", 8)], "e")
    net.node("Gemm", [net.node("Relu", ["e"], "e.r"), "tied", net.constant("d.b", 8)], "d", transB=1)
    net.node("Gemm", ["d", net.constant("o.w", 8, 5)], "logits")
    return net.model()


@kind
def constants_shared_under_names_of_copies() -> onnx.ModelProto:
    """Three layers share weight and bias; tensors have the names that copies would get."""
    net = Net()
    weight, bias = net.constant("w", 8, 8, 3, 3), net.constant("b", 8)
    net.conv("input", "b0", 3, 8)
    source = "b0"
    for name in ("b_quantized", "w_scale", "w_dequantized"):
        source = net.node("Relu", [net.node("Conv", [source, weight, bias], f"{name}_pre", pads=[1] * 4)], name)
    return net.classifier(source, 8)


@kind
def sum_with_itself() -> onnx.ModelProto:
    net = stem()
    net.node("Add", ["r", "r"], "twice")
    return net.classifier(net.conv("twice", "c", 8, 8), 8)


@kind
def joined_with_itself() -> onnx.ModelProto:
    net = stem()
    net.node("Concat", ["r", "r"], "twice", axis=1)
    return net.classifier(net.conv("twice", "c", 16, 8), 8)


def second_output(operator: str, name: str) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        net = Net()
        net.conv("input", "a", 3, 8)
        bounds = [net.constant(f"bound{number}", value=np.float32(number)) for number in (0, 1) if operator == "Clip"]
        net.node(operator, ["a", *bounds], "r")
        return net.classifier(net.conv("r", "c", 8, 8), 8, outputs={name: 8})

    return build


KINDS |= {
    "relu_is_an_output": second_output("Relu", "r"),
    "output_before_a_relu": second_output("Relu", "a"),
    "clip_is_an_output": second_output("Clip", "r"),
    "output_before_a_clip": second_output("Clip", "a"),
}


def group_norm(opset: int) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        net = Net()
        net.conv("input", "a", 3, 8)
        net.constant("gn.scale", value=np.linspace(0.5, 2, 8, dtype=np.float32))
        net.node("GroupNormalization", ["a", "gn.scale", net.constant("gn.b", 8)], "n", num_groups=2)
        return net.classifier(net.conv(net.node("Relu", ["n"], "r"), "c", 8, 8), 8, opset)

    return build


KINDS |= {f"group_norm_{opset}": group_norm(opset) for opset in (21, 24)}


def transposed(groups: int) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        net = stem()
        inputs = ["r", net.constant("t.w", 8, 8 // groups, 2, 2), net.constant("t.b", 8)]
        return net.classifier(net.node("ConvTranspose", inputs, "t", strides=[2, 2], group=groups), 8)

    return build


KINDS |= {"transposed": transposed(1), "transposed_in_groups": transposed(2)}


@kind
def weights_far_smaller_than_their_bias() -> onnx.ModelProto:
    net = stem()
    net.constants["a.w"][0], net.constants["a.w"][1] = 0, net.constants["a.w"][1] * np.float32(1e-9)
    net.constants["a.b"] *= 10
    return net.classifier(net.conv("r", "c", 8, 8), 8)


def read_by(*operators: str) -> Callable[[], onnx.ModelProto]:
    """A convolution that others read than layers, sums and pooling; of two of them the second joins both."""

    def build() -> onnx.ModelProto:
        net = Net()
        source = first = net.conv("input", "a", 3, 8)
        for operator in operators:
            inputs = [source, first] if operator == "Mul" else [source]
            source = net.node(operator, inputs, f"a.{operator}")
        return net.classifier(net.conv(source, "c", 8, 8), 8)

    return build


KINDS |= {
    "read_by_" + "_and_".join(names): read_by(*names)
    for names in (("HardSwish",), ("LeakyRelu",), ("Sigmoid", "Mul"), ("Relu", "Tanh"), ("Relu", "Softplus", "Mul"))
}


@kind
def bounds_twice_in_a_row() -> onnx.ModelProto:
    net = stem()
    bounds = [net.constant(f"bound{number}", value=np.float32(number)) for number in (0, 6)]
    net.node("Relu", [net.node("Clip", ["r", *bounds], "clipped")], "again")
    return net.classifier(net.conv("again", "c", 8, 8), 8)


@kind
def squares_beyond_fp16() -> onnx.ModelProto:
    """MeanVarianceNormalization of numbers above 256, whose function in ONNX has constants of FP32."""
    net = stem()
    net.constants["a.w"] *= 300
    net.node("MeanVarianceNormalization", ["r"], "n", axes=[2, 3])
    return net.classifier(net.conv("n", "c", 8, 8), 8)


@kind
def operators_without_fp16() -> onnx.ModelProto:
    net = stem()
    net.node("IsInf", [net.node("Celu", ["r"], "bent")], "endless")
    net.node("Where", ["endless", net.constant("zero", value=np.float32(0)), "bent"], "finite")
    return net.classifier(net.conv("finite", "c", 8, 8), 8)


@kind
def a_layer_that_reads_the_input() -> onnx.ModelProto:
    net = Net()
    net.node("Gemm", [net.node("Flatten", ["input"], "flat"), net.constant("o.w", 5, 3 * SIDE**2)], "logits", transB=1)
    return net.model()


@kind
def joined_with_nothing() -> onnx.ModelProto:
    net = stem()
    for name, value in (("first", 0), ("last", 0), ("axis", 1)):
        net.constant(name, value=np.array([value]))
    net.node("Slice", ["r", "first", "last", "axis"], "nothing")
    net.node("Concat", ["r", "nothing"], "all", axis=1)
    return net.classifier(net.conv("all", "c", 8, 8), 8)


@kind
def attention_with_a_mask() -> onnx.ModelProto:
    """What is masked gets minus infinity before Softmax, by a tensor that is computed: its range has no end."""
    net = stem()
    net.constant("rows", value=np.array([0, 8, SIDE**2]))
    net.node("Reshape", ["r", "rows"], "keys")
    net.node("MatMul", [net.node("Transpose", ["keys"], "tokens", perm=[0, 2, 1]), "keys"], "products")
    net.node("Div", ["products", net.constant("root", value=np.float32(8))], "scores")
    net.node("Mul", ["scores", net.constant("zero", value=np.float32(0))], "open")
    net.constant("masked", value=np.arange(SIDE**2) % 3 == 0)
    net.node("Where", ["masked", net.constant("no", value=np.float32(-np.inf)), "open"], "mask")
    net.node("Softmax", [net.node("Add", ["scores", "mask"], "allowed")], "shares", axis=-1)
    net.node("MatMul", ["keys", "shares"], "mixed")
    net.node("Reshape", ["mixed", net.constant("image", value=np.array([0, 8, SIDE, SIDE]))], "back")
    return net.classifier(net.conv("back", "c", 8, 8), 8)


@kind
def attention_with_masks_beyond_fp16() -> onnx.ModelProto:
    """What is masked gets the lowest number of FP32, in the ways of exporters; one row is masked throughout.

    Scores lie below -16: added to FP16's lowest number, they make it infinite.
    """
    lowest = np.finfo(np.float32).min
    net = stem()
    net.constant("rows", value=np.array([0, 8, SIDE**2]))
    net.node("Reshape", ["r", "rows"], "keys")
    net.node("MatMul", [net.node("Transpose", ["keys"], "tokens", perm=[0, 2, 1]), "keys"], "products")
    net.node("Div", ["products", net.constant("root", value=np.float32(8))], "raw")
    net.node("Clip", ["raw", net.constant("low", value=lowest), net.constant("high", value=-lowest)], "bounded")
    net.node("Sub", ["bounded", net.constant("twenty", value=np.float32(20))], "scores")
    masked = np.arange(SIDE**2) % 3 == 0
    net.node("Cast", [net.constant("masked", value=masked)], "ones", to=TensorProto.FLOAT)
    net.node("Expand", [net.constant("lowest", value=lowest), net.constant("length", value=np.array([SIDE**2]))], "all")
    net.node("Mul", ["ones", "all"], "row")
    net.node("Unsqueeze", ["row", net.constant("axes", value=np.array([0, 1]))], "added")
    net.node("Add", ["scores", "added"], "padded")
    triangle = np.where(np.tri(SIDE**2, dtype=bool), 0, lowest).astype(np.float32)
    triangle[1] = lowest
    net.node("Where", ["masked", net.constant("no", value=lowest), "padded"], "allowed")
    net.node("Add", ["allowed", net.constant("triangle", value=triangle)], "causal")
    net.node("MatMul", ["keys", net.node("Softmax", ["causal"], "shares", axis=-1)], "mixed")
    net.node("Reshape", ["mixed", net.constant("image", value=np.array([0, 8, SIDE, SIDE]))], "back")
    return net.classifier(net.conv("back", "c", 8, 8), 8)


@kind
def constants_that_are_inputs_too() -> onnx.ModelProto:
    made = stem().classifier("r", 8, 12)
    made.ir_version = 3  # the format before constants could stand alone
    for tensor in made.graph.initializer:
        made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(made, full_check=True)
    return made


@kind
def operators_of_a_domain_by_its_name() -> onnx.ModelProto:
    made = stem().classifier("r", 8)
    made.opset_import[0].domain = "ai.onnx"
    onnx.checker.check_model(made, full_check=True)
    return made


@kind
def what_lies_between() -> onnx.ModelProto:
    """Padding with a number, bounds that are not 0, pooling, a slice: none may be computed with others' scales."""
    net = Net()
    net.constant("pads", value=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    net.node("Pad", ["input", "pads", net.constant("number", value=np.float32(0.7))], "padded")
    net.conv("padded", "a", 3, 8)
    bounds = [net.constant(f"bound{number}", value=np.float32(number)) for number in (0, 6)]
    net.node("Clip", ["a", *bounds], "clipped")
    net.node("MaxPool", ["clipped"], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    for name, value in (("first", 2), ("last", 6), ("axis", 1)):
        net.constant(name, value=np.array([value]))
    net.node("Slice", [net.node("Pad", ["pooled", "pads"], "wider"), "first", "last", "axis"], "part")
    net.conv("part", "c", 4, 8)
    net.node("Clip", ["c", net.constant("half", value=np.float32(0.5)), bounds[1]], "above")
    return net.classifier(net.node("AveragePool", ["above"], "mean", kernel_shape=[2, 2]), 8)


@kind
def convolution_with_a_computed_bias() -> onnx.ModelProto:
    net = stem()
    net.node("ReduceMean", ["r", net.constant("axes", value=np.array([0, 2, 3]))], "computed", keepdims=0)
    net.node("Conv", ["r", net.constant("c.w", 8, 8, 3, 3), "computed"], "c", pads=[1] * 4)
    return net.classifier("c", 8, 18)


@kind
def batch_norms() -> onnx.ModelProto:
    """Behind a convolution, whose weights it makes 300 times larger, and behind a sum."""
    net, source = Net(), "input"
    for index in range(6):
        net.conv(source, f"c{index}", 3 if index == 0 else 8, 8)
        rng = np.random.default_rng(index)
        values = {"s": 1.5, "b": 0.2, "m": 0.1, "v": 0.5}
        names = [
            net.constant(f"bn{index}.{name}", value=(value * rng.uniform(0.5, 2, 8)).astype(np.float32))
            for name, value in values.items()
        ]
        source = net.node("Relu", [net.node("BatchNormalization", [f"c{index}", *names], f"n{index}")], f"r{index}")
    return net.classifier(source, 8)
