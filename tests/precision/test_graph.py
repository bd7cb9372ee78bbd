"""What every precision asks of a network: that it is FP32 throughout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.errors import ContentError
from polar_deploy.precision import graph
from tests.support.classifiers import classifier, model, saved


def retype(network: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The same network with all its floats of another type."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in network.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*network.graph.input, *network.graph.output):
        value.type.tensor_type.elem_type = kind
    return network


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_network_of_another_float_type_names_tensor_and_node(kind: int, tmp_path: Path) -> None:
    name = TensorProto.DataType.Name(kind)
    with pytest.raises(ContentError, match=rf"tensor 'conv\.weight' of node 'conv' \(operator Conv\) is {name}"):
        graph.load(saved(retype(classifier(), kind), tmp_path / "a.onnx"))


def test_hidden_cast_to_another_float_type_is_found(tmp_path: Path) -> None:
    mixed = classifier()
    casts = [
        helper.make_node("Cast", ["r"], ["r16"], name="down", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["r16"], ["r32"], name="up", to=TensorProto.FLOAT),
    ]
    mixed.graph.node[2].input[0] = "r32"
    for node in reversed(casts):
        mixed.graph.node.insert(2, node)
    onnx.checker.check_model(mixed)
    with pytest.raises(ContentError, match=r"tensor 'r16' of node 'down' \(operator Cast\) is FLOAT16"):
        graph.load(saved(mixed, tmp_path / "a.onnx"))


def test_float_type_inside_a_branch_is_found(tmp_path: Path) -> None:
    double = helper.make_tensor("one", TensorProto.DOUBLE, [1], [1.0])
    nodes = [
        helper.make_node("Constant", [], ["inner64"], value=double),
        helper.make_node("Cast", ["inner64"], ["inner32"], to=TensorProto.FLOAT),
    ]
    output = helper.make_tensor_value_info("inner32", TensorProto.FLOAT, [1])
    inner = helper.make_graph(nodes, "branch", [], [output])
    branching = classifier()
    flag = numpy_helper.from_array(np.array(True), "flag")
    branching.graph.initializer.append(flag)
    choice = helper.make_node("If", ["flag"], ["chosen"], name="choice", then_branch=inner, else_branch=inner)
    branching.graph.node.append(choice)
    with pytest.raises(ContentError, match="tensor 'inner64' is DOUBLE"):
        graph.load(saved(branching, tmp_path / "a.onnx"))


def test_fp32_network_with_integer_shapes_is_accepted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["m"], keepdims=0),
        helper.make_node("Reshape", ["m", "shape"], ["logits"]),
    ]
    weights = {"axes": np.array([2, 3]), "shape": np.array([-1, 3])}
    graph.load(saved(model(nodes, weights, classes=3, size=8), tmp_path / "a.onnx"))


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize(
    ("operator", "opset", "scale"),
    [("Upsample", 9, 2), ("Upsample", 9, 1.25), ("Resize", 10, 2), ("Resize", 10, 1.25), ("Resize", 10, 0.4)],
)
def test_a_later_opset_samples_where_the_old_one_did(operator: str, opset: int, mode: str, scale: float) -> None:
    size = int(np.float32(scale) * 13)
    network = helper.make_model(
        helper.make_graph(
            [helper.make_node(operator, ["x", "scales"], ["y"], name="up", mode=mode)],
            "up",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 13, 13])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, size, size])],
            [numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), "scales")],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    x = np.random.default_rng(0).standard_normal((1, 2, 13, 13)).astype(np.float32)
    before = outputs(network, x)
    raised = graph.at_least(network, 19)
    onnx.checker.check_model(raised, full_check=True)
    assert graph.opset_of(raised) == 19
    np.testing.assert_array_equal(outputs(raised, x), before)


def outputs(network: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])
