from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.engines import network
from polar_deploy.errors import ContentError, UsageError
from tests.engines.networks import classifier, model, saved


def test_reads_a_network_with_external_data(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(classifier(), path, save_as_external_data=True, location="a.data", size_threshold=0)
    weight = next(t for t in network.read(path).graph.initializer if t.name == "conv.weight")
    expected = next(t for t in classifier().graph.initializer if t.name == "conv.weight")
    np.testing.assert_array_equal(numpy_helper.to_array(weight), numpy_helper.to_array(expected))

    (tmp_path / "a.data").unlink()
    with pytest.raises(ContentError, match=r"conv\.weight"):
        network.read(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a.onnx is empty"),
        (b"<html>not a network</html>\n" * 20, "not an ONNX file"),
        (classifier().SerializeToString()[:-100], "not an ONNX file, or is cut short"),
    ],
)
def test_file_that_is_no_network(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(ContentError, match=says):
        network.read(path)


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        network.read(tmp_path / "none.onnx")


def test_unknown_operator_names_node_and_operator(tmp_path: Path) -> None:
    broken = classifier()
    broken.graph.node[1].op_type = "Rellu"
    with pytest.raises(ContentError, match=r"Rellu") as error:
        network.read(saved(broken, tmp_path / "a.onnx"))
    assert "Name: relu" in error.value.what
    assert "\n" not in error.value.what


def retype(network: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The same network with all its floats of another type."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in network.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*network.graph.input, *network.graph.output):
        value.type.tensor_type.elem_type = kind
    return network


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_network_of_another_float_type_names_the_first_tensor(kind: int) -> None:
    name = TensorProto.DataType.Name(kind)
    with pytest.raises(ContentError, match=f"tensor 'conv.weight' is {name}"):
        network.require_fp32(retype(classifier(), kind), Path("a.onnx"))


def test_hidden_cast_to_another_float_type_is_found() -> None:
    mixed = classifier()
    casts = [
        helper.make_node("Cast", ["r"], ["r16"], name="down", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["r16"], ["r32"], name="up", to=TensorProto.FLOAT),
    ]
    mixed.graph.node[2].input[0] = "r32"
    for node in reversed(casts):
        mixed.graph.node.insert(2, node)
    onnx.checker.check_model(mixed)
    with pytest.raises(ContentError, match="tensor 'r16' is FLOAT16"):
        network.require_fp32(mixed, Path("a.onnx"))


def test_float_type_inside_a_branch_is_found() -> None:
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
    assert network.blame(branching, "in Cast(13)") == "node 'inner32' (operator Cast): "
    with pytest.raises(ContentError, match="tensor 'inner64' is DOUBLE"):
        network.require_fp32(branching, Path("a.onnx"))


def test_fp32_network_with_integer_shapes_is_accepted() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["m"], keepdims=0),
        helper.make_node("Reshape", ["m", "shape"], ["logits"]),
    ]
    weights = {"axes": np.array([2, 3]), "shape": np.array([-1, 3])}
    network.require_fp32(model(nodes, weights, classes=3, size=8), Path("a.onnx"))


def test_blame_prefers_the_node_that_is_named() -> None:
    nodes = classifier()
    named = "Could not find an implementation for Conv(11) node with name 'conv'"
    assert network.blame(nodes, named) == "node 'conv' (operator Conv): "
    assert network.blame(nodes, "my.ops:Gemm(-1) is not a registered function/op") == "node 'fc' (operator Gemm): "
    assert network.blame(nodes, "my.ops:OtherGemm(-1) is not a registered function/op") == ""
