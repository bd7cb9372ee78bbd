"""Small graphs to operate on, and the judge: both graphs run in ONNX Runtime and their outputs are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from polar_deploy.surgery import Surgery, compress

Array = npt.NDArray[Any]
How = Literal["plain", "exact", "reference"]
TOLERANCE = 1e-5


class Net:
    """Builds a graph node by node; every method takes tensor names and returns that of its result."""

    def __init__(self, channels: int = 3, size: int = 8, opset: int = 17, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.opset = opset
        self.inputs = [helper.make_tensor_value_info("input", 1, ["batch", channels, size, size])]
        self.width = {"input": channels}

    def constant(self, name: str, values: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, domain=domain, **attributes))
        self.width[name] = next((self.width[x] for x in inputs if x in self.width), 0)
        return name

    def conv(
        self, x: str, width: int, name: str, kernel: int = 3, group: int = 1, bias: bool = True, **attributes: Any
    ) -> str:
        """Same-size convolution (zero padding for kernels above 1) unless `pads` or `strides` say otherwise."""
        inputs = self.width[x] // group
        weight = self.random.standard_normal((width, inputs, kernel, kernel)) / np.sqrt(inputs * kernel**2)
        tensors = [x, self.constant(f"{name}.weight", weight.astype(np.float32))]
        if bias:
            tensors.append(self.constant(f"{name}.bias", self.random.standard_normal(width).astype(np.float32)))
        attributes.setdefault("pads", [kernel // 2] * 4)
        self.node("Conv", tensors, name, group=group, kernel_shape=[kernel, kernel], **attributes)
        self.width[name] = width
        return name

    def bn(self, x: str, name: str) -> str:
        """BatchNormalization in which nothing is accidentally zero."""
        width = self.width[x]
        scale, offset, mean = (self.random.uniform(0.5, 1.5, width).astype(np.float32) for _ in range(3))
        variance = self.random.uniform(0.5, 2, width).astype(np.float32)
        names = ("scale", "offset", "mean", "variance")
        arrays = (scale, offset - 1.2, mean - 1, variance)
        parameters = [
            self.constant(f"{name}.{key}", values.astype(np.float32)) for key, values in zip(names, arrays, strict=True)
        ]
        return self.node("BatchNormalization", [x, *parameters], name)

    def gate(self, x: str, closed: Iterable[int], name: str, *, shape: str = "1c11", left: bool = False) -> str:
        """Multiplies with 0 where closed, else 1."""
        values = np.ones(self.width[x], np.float32)
        values[list(closed)] = 0
        return self.scale(x, values, name, shape=shape, left=left)

    def scale(self, x: str, values: Array, name: str, *, shape: str = "1c11", left: bool = False) -> str:
        shapes = {"1c11": (1, -1, 1, 1), "c11": (-1, 1, 1), "1c": (1, -1)}
        factor = self.constant(f"{name}.factor", values.astype(np.float32).reshape(shapes[shape]))
        return self.node("Mul", [factor, x] if left else [x, factor], name)

    def relu(self, x: str, name: str) -> str:
        return self.node("Relu", [x], name)

    def add(self, x: str, y: str, name: str) -> str:
        return self.node("Add", [x, y], name)

    def gemm(self, x: str, inputs: int, width: int, name: str) -> str:
        weight = self.random.standard_normal((width, inputs)) / np.sqrt(inputs)
        tensors = [x, self.constant(f"{name}.weight", weight.astype(np.float32))]
        tensors.append(self.constant(f"{name}.bias", self.random.standard_normal(width).astype(np.float32)))
        self.node("Gemm", tensors, name, transB=1)
        self.width[name] = width
        return name

    def linear(self, x: str, inputs: int, outputs: int, name: str, zeros: Array | None = None) -> str:
        """zeros: outputs that are zero throughout."""
        weight, bias = self.random.standard_normal((inputs, outputs)) / 3, self.random.standard_normal(outputs)
        if zeros is not None:
            weight[:, zeros], bias[zeros] = 0, 0
        product = self.node("MatMul", [x, self.constant(f"{name}.w", weight.astype(np.float32))], name)
        return self.node("Add", [product, self.constant(f"{name}.b", bias.astype(np.float32))], f"{name}.sum")

    def head(self, x: str, classes: int = 5) -> str:
        """Global pooling, flattening, and the classifier that every test net ends in."""
        pooled = self.node("GlobalAveragePool", [x], "pool")
        flat = self.node("Flatten", [pooled], "flat", axis=1)
        return self.gemm(flat, self.width[x], classes, "logits")

    def model(self, *outputs: str, ranks: Sequence[int] = ()) -> onnx.ModelProto:
        ranks = ranks or [2 if name == "logits" else 4 for name in outputs]
        declared = [
            helper.make_tensor_value_info(name, 1, ["batch", self.width[name] or None, *[None] * (rank - 2)])
            for name, rank in zip(outputs, ranks, strict=True)
        ]
        graph = helper.make_graph(self.nodes, "net", self.inputs, declared, self.constants)
        domains = {node.domain for node in self.nodes if node.domain}
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in sorted(domains))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def cut(model: onnx.ModelProto) -> Surgery:
    """Compresses, and holds the result to everything that is promised of any graph."""
    before = model.SerializeToString(deterministic=True)
    surgery = compress(model)
    assert model.SerializeToString(deterministic=True) == before, "the model given is left as it is"
    onnx.checker.check_model(surgery.model, full_check=True)
    was, now = operators(model), operators(surgery.model)
    assert all(now[name] <= was[name] for name in now), "no operator type is counted more often than before"
    assert [v.SerializeToString() for v in surgery.model.graph.input] == [
        v.SerializeToString() for v in model.graph.input
    ]
    assert [v.SerializeToString() for v in surgery.model.graph.output] == [
        v.SerializeToString() for v in model.graph.output
    ]
    assert_same(model, surgery.model)
    return surgery


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Both compute the same, at two batch sizes that surgery itself does not use.

    Where kernels for bytes may overflow, others decide; these need an optimised graph, which does not always load.
    """
    outputs, multiplies_bytes = [v.name for v in before.graph.output], not BYTE_KERNELS.isdisjoint(operators(before))
    for batch in (2, 5):
        different = _different(outputs, run(before, batch), run(after, batch))
        if different and multiplies_bytes:
            different = _different(outputs, run(before, batch, how="exact"), run(after, batch, how="exact"))
        assert not different


def _different(names: Sequence[str], expected: Sequence[Array], found: Sequence[Array]) -> list[str]:
    """Outputs that differ in shape or by more than rounding."""
    return [
        name
        for name, one, other in zip(names, expected, found, strict=True)
        if one.shape != other.shape
        or not float(np.abs(one - other).max()) <= TOLERANCE * (float(np.abs(one).max()) or 1.0)
    ]


BYTE_KERNELS = {"MatMulInteger", "QGemm", "QLinearConv", "QLinearMatMul"}


def run(model: onnx.ModelProto, batch: int, *, how: How = "plain") -> list[Array]:
    """Outputs for random inputs, the same for the same batch size.

    how: by ONNX Runtime as it stands; optimised, which takes kernels for bytes that do not overflow on x86 without VNNI
    (but for QLinearMatMul); or by onnx's reference.
    """
    random, feeds = np.random.default_rng(1000 + batch), {}
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name not in constants]:
        shape = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = (2 * random.standard_normal(shape)).astype(np.float32)
    results: list[Array]
    if how == "reference":
        results = ReferenceEvaluator(model).run(None, feeds)
        return results
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if how == "plain":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_session_config_entry("optimization.disable_specified_optimizers", "QDQS8ToU8Transformer")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(None, feeds)
    return results


@cache
def newest_opset() -> int:
    """The newest opset that both onnx and ONNX Runtime know here."""
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        try:
            ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception:  # noqa: BLE001 - ONNX Runtime has no common class for its errors
            continue
        return opset
    raise AssertionError("ONNX Runtime takes no opset")


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each type there are, those in bodies and local functions included."""
    return Counter(node.op_type for nodes in (model.graph, *model.functions) for node in _all_nodes(nodes.node))


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _all_nodes(attribute.g.node)


def names(model: onnx.ModelProto) -> set[str]:
    return {node.name for node in model.graph.node}


def weight(model: onnx.ModelProto, node: str, index: int = 1) -> Array:
    """Value of a node's weight (index 1) or bias (2)."""
    found = next(n for n in model.graph.node if n.name == node)
    return constant(model, found.input[index])


def constant(model: onnx.ModelProto, name: str) -> Array:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


CLOSED = (1, 4)  # of six channels, by `around`


def around(operator: str, *extra: Array, opset: int = 17, kernel: int = 1, **attributes: Any) -> onnx.ModelProto:
    """Conv `one` with 6 channels, a gate that closes CLOSED, `operator` with constant inputs `extra`, Conv `two`."""
    net = Net(opset=opset)
    x = net.gate(net.conv("input", 6, "one"), CLOSED, "gate")
    inputs = [x, *(net.constant(f"extra{i}", values) for i, values in enumerate(extra))]
    x = net.node(operator, inputs, "tested", **attributes)
    return net.model(net.conv(x, 4, "two", kernel=kernel))


def fates(
    model: onnx.ModelProto,
    surgery: Surgery,
    writer: str = "one",
    reader: str = "two",
    closed: Sequence[int] = CLOSED,
) -> list[str]:
    """What became of each output channel of `writer`, read off the weights of two layers, before and after.

    Per channel: "open" (its filter is still there, and it was not to go), "removed" (no filter, no column in `reader`),
    "folded" (gone, and the bias of `reader` took up its constant), or "kept: REASON" (its place is kept, with its
    filter or a zero one), with the reason from the report.
    """
    before, after = weight(model, writer), names(surgery.model)
    rows = [row.tobytes() for row in weight(surgery.model, writer)] if writer in after else []
    there = [row.tobytes() in rows for row in before]
    emptied = sum(not np.frombuffer(row, before.dtype).any() for row in rows)
    assert len(rows) == sum(there) + emptied, f"{writer} has filters that nobody knows"
    reasons = [entry["reason"] for entry in surgery.report["cuts_not_made"] if entry["layer"] in (writer, "gate")]
    kept = f"kept: {'; '.join(dict.fromkeys(reasons))}"
    moved = reader in after and not np.array_equal(weight(model, reader, 2), weight(surgery.model, reader, 2))
    away = kept if emptied else "folded" if moved else "removed"
    return [("open" if i not in closed else kept) if there[i] else away for i in range(len(before))]


def outcome(model: onnx.ModelProto, surgery: Surgery | None = None) -> str:
    """The one fate of the closed channels of `around`, see `fates`; every other channel must be open still."""
    found = fates(model, surgery or cut(model))
    assert all(found[i] == "open" for i in range(len(found)) if i not in CLOSED), found
    closed = {found[i] for i in CLOSED}
    assert len(closed) == 1, found
    return closed.pop()


def half(width: int, seed: int) -> list[int]:
    """A random half of the channels."""
    return sorted(np.random.default_rng(seed).permutation(width)[: width // 2].tolist())
