"""Models as other tools write them, which ONNX Runtime runs: they are cut, or come back as they are with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.surgery import Surgery, compress
from tests.surgery.graphs import Array, Net, newest_opset, weight

FLOAT, INT64, TEXT = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
Feeds = dict[str, Any]


class Trunk(Net):
    """A network whose first layer has eight channels, of which a gate closes the first four."""

    def __init__(self, *, opset: int = 17) -> None:
        super().__init__(opset=opset)
        self.made: list[onnx.ValueInfoProto] = []
        x = self.gate(self.relu(self.conv("input", 8, "one"), "act"), range(4), "gate")
        self.end = self.conv(x, 4, "two")

    def input(self, name: str, shape: list[int | str] | None, kind: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def done(self, output: str, shape: list[int | str | None] | None = None, kind: int = FLOAT) -> onnx.ModelProto:
        model = self.model(output)
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(output, kind, shape))
        return model


def images(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def run(model: onnx.ModelProto, feeds: Feeds) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def halved(model: onnx.ModelProto, feeds: Feeds, **options: bool) -> Surgery:
    """Cuts a model, and checks that its first layer has lost four channels, and that it computes the same."""
    surgery = compress(model, **options)
    assert weight(surgery.model, "one").shape[0] == weight(model, "one").shape[0] - 4
    for one, other in zip(run(model, feeds), run(surgery.model, feeds), strict=True):
        if isinstance(one, np.ndarray) and one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(one).max()))
        else:
            assert str(one) == str(other)
    return surgery


IMAGE = {"input": images(2, 3, 8, 8)}


# ---- what is declared of shapes


def _declared(into: list[int | str] | None, out: list[int | str | None] | None) -> onnx.ModelProto:
    net = Trunk()
    model = net.done(net.end, out)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", FLOAT, into))
    return model


@pytest.mark.parametrize(
    ("into", "out"),
    [
        ([-1, 3, 8, -1], [-1, 4, 8, -1]),
        (["n", 3, 8, 8], None),
        (["n", 3, 8, 8], ["n", 5, 8, 8]),
        (["n", 3, 8, 8], [7]),
    ],
    ids=["negative", "no output shape", "wrong size", "wrong rank"],
)
def test_declared_shapes_are_not_believed(into: list[int | str], out: list[int | str | None] | None) -> None:
    model = _declared(into, out)
    surgery = halved(model, IMAGE)
    assert surgery.model.graph.input == model.graph.input
    assert surgery.model.graph.output == model.graph.output


def test_an_input_without_a_shape() -> None:
    """Nothing is known of its channels, and so nothing goes: the model comes back as it is."""
    model = _declared(None, None)
    assert run(compress(model).model, IMAGE)[0].shape == (2, 4, 8, 8)


def test_a_stale_value_info() -> None:
    model = _declared(["n", 3, 8, 8], None)
    model.graph.value_info.append(helper.make_tensor_value_info("act", FLOAT, [1, 9, 8, 8]))
    halved(model, IMAGE)


# ---- dynamic dimensions that take few sizes


def _open_sizes(net: Net) -> None:
    net.inputs[0].CopyFrom(helper.make_tensor_value_info("input", FLOAT, ["n", 3, "height", "width"]))


def _flat_head(net: Trunk) -> str:
    """Fits 32 pixels: 4 channels × 16 × 16."""
    x = net.node("MaxPool", [net.end], "pool", kernel_shape=[2, 2], strides=[2, 2])
    return net.gemm(net.node("Flatten", [x], "flat"), 4 * 16 * 16, 5, "head")


def _reshaped_head(net: Trunk) -> str:
    x = net.node("Reshape", [net.end, net.constant("shape", np.array([0, 4 * 32 * 32]))], "flat")
    return net.gemm(x, 4 * 32 * 32, 5, "head")


def _u_net(net: Trunk) -> str:
    """Takes multiples of 64."""
    x = net.end
    for i in range(6):
        x = net.node("MaxPool", [x], f"down{i}", kernel_shape=[2, 2], strides=[2, 2])
    for i in range(6):
        x = net.node("Resize", [x, "", net.constant(f"scale{i}", np.array([1, 1, 2, 2], np.float32))], f"up{i}")
    return net.node("Concat", [x, net.end], "skip", axis=1)


def _one_sample(net: Trunk) -> str:
    """The batch is called dynamic, and baked in."""
    x = net.node("Reshape", [net.end, net.constant("shape", np.array([1, 4 * 32 * 32]))], "flat")
    return net.gemm(x, 4 * 32 * 32, 5, "head")


def _two_samples(net: Trunk) -> str:
    return net.node("Concat", [net.end, net.constant("more", images(2, 1, 32, 32))], "joined", axis=1)


def _five_samples(net: Trunk) -> str:
    x = net.node("Reshape", [net.end, net.constant("shape", np.array([5, 4 * 32 * 32]))], "flat")
    return net.gemm(x, 4 * 32 * 32, 5, "head")


@pytest.mark.parametrize("verify", [True, False], ids=["proven", "not proven"])
@pytest.mark.parametrize(
    ("grow", "shape"),
    [
        (_flat_head, (1, 3, 32, 32)),
        (_reshaped_head, (2, 3, 32, 32)),
        (_u_net, (1, 3, 128, 64)),
        (_one_sample, (1, 3, 32, 32)),
        (_two_samples, (2, 3, 32, 32)),
        (_five_samples, (5, 3, 32, 32)),
    ],
)
def test_sizes_that_a_model_takes_are_found(grow: Any, shape: tuple[int, ...], verify: bool) -> None:
    net = Trunk()
    _open_sizes(net)
    halved(net.done(grow(net)), {"input": images(*shape)}, verify=verify)


def test_a_table_of_positions() -> None:
    """Fifty of them, looked up by a length that is called dynamic: longer texts are out of the table."""
    net = Trunk()
    ids = net.input("ids", ["n", "length"], INT64)
    length = net.node("Squeeze", [net.node("Shape", [ids], "shape", start=1, end=2)], "length")
    ends = net.constant("zero", np.array(0)), length, net.constant("step", np.array(1))
    table = net.constant("table", net.random.standard_normal((50, 4)).astype(np.float32))
    x = net.node("Gather", [table, net.node("Range", ends, "places")], "position")
    x = net.node("Add", [x, net.node("Gather", [table, ids], "word")], "words")
    pooled = net.node("ReduceMean", [net.end], "mean", axes=[2, 3], keepdims=0)
    x = net.node("Add", [net.node("ReduceMean", [x], "text", axes=[1], keepdims=0), pooled], "sum")
    halved(net.done(x), {**IMAGE, "ids": np.ones((2, 20), np.int64)})


# ---- what comes in and goes out


@pytest.mark.parametrize("kind", [INT64, TensorProto.BOOL, FLOAT])
def test_inputs_without_dimensions(kind: int) -> None:
    net = Trunk()
    rate = net.node("Cast", [net.input("rate", [], kind)], "number", to=FLOAT)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    halved(net.done(net.node("Mul", [net.end, rate], "out")), {**IMAGE, "rate": np.array(3, dtype)})


def test_a_divisor_that_must_not_be_zero() -> None:
    net = Trunk()
    whole = net.node("Cast", [net.end], "whole", to=INT64)
    net.node("Div", [whole, net.input("divisor", [1], INT64)], "out")
    halved(net.done("out", kind=INT64), {**IMAGE, "divisor": np.array([2])})


def test_a_shape_that_comes_in() -> None:
    net = Trunk()
    net.node("Reshape", [net.end, net.input("shape", [2], INT64)], "out")
    halved(net.done("out", ["n", 4 * 64]), {**IMAGE, "shape": np.array([2, 256])})


def _best(net: Trunk) -> str:
    return net.node("ArgMax", [net.node("ReduceMean", [net.end], "mean", axes=[2, 3], keepdims=0)], "best", axis=1)


def test_words_come_out_of_a_table() -> None:
    net = Trunk()
    best = _best(net)
    net.constants.append(helper.make_tensor("words", TEXT, [4], [b"cat", b"dog", b"cow", b"hen"]))
    surgery = halved(net.done(net.node("Gather", ["words", best], "label"), kind=TEXT), IMAGE)
    assert [t.string_data[0] for t in surgery.model.graph.initializer if t.name == "words"] == [b"cat"]


def test_words_come_out_of_a_constant_node() -> None:
    net = Trunk()
    best = _best(net)
    net.nodes.append(helper.make_node("Constant", [], ["words"], value_strings=[b"cat", b"dog", b"cow", b"hen"]))
    halved(net.done(net.node("Gather", ["words", best], "label"), kind=TEXT), IMAGE)


@pytest.mark.parametrize("verify", [True, False])
def test_a_sequence_comes_out(verify: bool) -> None:
    net = Trunk()
    net.node("SequenceConstruct", [net.end, net.end], "list")
    model = net.model("list")
    model.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("list", FLOAT, None))
    halved(model, IMAGE, verify=verify)


def test_a_mask_comes_out() -> None:
    """Near zero, the order of summation decides; float64 tells that it is the same function."""
    net = Trunk()
    net.node("Greater", [net.end, net.constant("zero", np.array(0, np.float32))], "mask")
    model = net.done("mask", kind=TensorProto.BOOL)
    surgery = compress(model)
    before, after = (run(one, {"input": images(64, 3, 8, 8)})[0] for one in (model, surgery.model))
    assert np.mean(before != after) < 1e-3
    assert weight(surgery.model, "one").shape[0] == 4


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN])
def test_narrow_types_come_in_and_go_out(kind: int) -> None:
    net = Trunk(opset=21)
    net.inputs[0] = helper.make_tensor_value_info("narrow", kind, ["n", 3, 8, 8])
    net.nodes.insert(0, helper.make_node("Cast", ["narrow"], ["input"], to=FLOAT))
    model = net.done(net.node("Cast", [net.end], "out", to=kind), kind=kind)
    model.ir_version = 10
    surgery = compress(model)
    assert weight(surgery.model, "one").shape[0] == 4
    assert (surgery.report["verified"], surgery.report["runtime"]) == (True, "onnxruntime")


# ---- how the file is written


def test_operators_imported_as_ai_onnx() -> None:
    net = Trunk()
    model = net.done(net.end)
    model.opset_import[0].domain = "ai.onnx"
    surgery = halved(model, IMAGE)
    assert surgery.model.opset_import == model.opset_import


@pytest.mark.parametrize("imported", ["", "ai.onnx"])
def test_nodes_that_name_ai_onnx(imported: str) -> None:
    net = Trunk()
    model = net.done(net.end)
    model.opset_import[0].domain = imported
    for node in model.graph.node:
        node.domain = "ai.onnx"
    halved(model, IMAGE)


def test_an_input_that_is_an_output() -> None:
    net = Trunk()
    model = net.done(net.end)
    model.graph.output.append(model.graph.input[0])
    assert halved(model, IMAGE).report["macs"][0] > 0


def test_a_weight_that_is_an_output() -> None:
    net = Trunk()
    model = net.done(net.end)
    model.graph.output.append(helper.make_tensor_value_info("one.weight", FLOAT, [8, 3, 3, 3]))
    halved(model, IMAGE)


def test_a_weight_that_a_body_reads_as_well() -> None:
    net = Trunk()
    body = [
        helper.make_graph(
            [helper.make_node(operator, ["one.weight"], [operator], operator)],
            operator,
            [],
            [helper.make_tensor_value_info(operator, FLOAT, [8, 3, 3, 3])],
        )
        for operator in ("Neg", "Abs")
    ]
    net.input("which", [], TensorProto.BOOL)
    net.nodes.append(helper.make_node("If", ["which"], ["weights"], "choice", then_branch=body[0], else_branch=body[1]))
    model = net.done(net.end)
    model.graph.output.append(helper.make_tensor_value_info("weights", FLOAT, [8, 3, 3, 3]))
    halved(model, IMAGE | {"which": np.array(True)})


def test_nodes_out_of_order() -> None:
    net = Trunk()
    net.nodes.reverse()
    halved(net.done(net.end), IMAGE)


def test_what_constants_and_tensors_are_annotated_with_stays() -> None:
    net = Trunk()
    model = net.done(net.end)
    for tensor in model.graph.initializer:
        tensor.doc_string = f"about {tensor.name}"
        tensor.metadata_props.add(key="origin", value=tensor.name)
    for name, scale in (("act", np.array(0.5, np.float32)), ("gate", np.full(8, 0.5, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        note = model.graph.quantization_annotation.add(tensor_name=name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=f"{name}.scale")
    smaller = compress(model).model
    scales = [tensor.name for tensor in smaller.graph.initializer if tensor.name.endswith(".scale")]
    assert "act.scale" in scales
    assert [note.tensor_name for note in smaller.graph.quantization_annotation] == ["act"], (
        "not with an entry a channel"
    )
    for tensor in smaller.graph.initializer:
        if tensor.name not in scales:
            assert tensor.doc_string == f"about {tensor.name}"
            assert [entry.value for entry in tensor.metadata_props] == [tensor.name]


def test_an_opset_that_onnx_does_not_know_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime runs it: it comes back as it is."""
    net = Trunk(opset=newest_opset())
    model = net.done(net.end)
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: newest_opset() - 1)
    surgery = compress(model)
    assert surgery.model == model
    assert "wants opset" in surgery.report["as_it_is"]
    assert surgery.report["verified"] is True
