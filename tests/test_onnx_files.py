from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from polar_deploy import onnx_files
from polar_deploy.errors import ContentError, UsageError
from tests.support.classifiers import classifier, saved


def test_reads_a_network_with_external_data(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(classifier(), path, save_as_external_data=True, location="a.data", size_threshold=0)
    weight = next(t for t in onnx_files.read(path).graph.initializer if t.name == "conv.weight")
    expected = next(t for t in classifier().graph.initializer if t.name == "conv.weight")
    np.testing.assert_array_equal(numpy_helper.to_array(weight), numpy_helper.to_array(expected))

    (tmp_path / "a.data").unlink()
    with pytest.raises(ContentError, match=r"conv\.weight"):
        onnx_files.read(path)


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
        onnx_files.read(path)


def test_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        onnx_files.read(tmp_path / "none.onnx")


def test_unknown_operator_names_node_and_operator(tmp_path: Path) -> None:
    broken = classifier()
    broken.graph.node[1].op_type = "Rellu"
    with pytest.raises(ContentError, match=r"Rellu") as error:
        onnx_files.read(saved(broken, tmp_path / "a.onnx"))
    assert "Name: relu" in error.value.what
    assert "\n" not in error.value.what


def test_blame_prefers_the_node_that_is_named() -> None:
    nodes = classifier()
    named = "Could not find an implementation for Conv(11) node with name 'conv'"
    assert onnx_files.blame(nodes, named) == "node 'conv' (operator Conv): "
    assert onnx_files.blame(nodes, "my.ops:Gemm(-1) is not a registered function/op") == "node 'fc' (operator Gemm): "
    assert onnx_files.blame(nodes, "my.ops:OtherGemm(-1) is not a registered function/op") == ""


def test_blame_finds_a_node_inside_a_branch() -> None:
    nodes = [helper.make_node("Constant", [], ["a"], value_float=1.0), helper.make_node("Sin", ["a"], ["inner"])]
    body = helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [])])
    branching = classifier()
    branching.graph.node.append(
        helper.make_node("If", ["flag"], ["chosen"], name="choice", then_branch=body, else_branch=body)
    )
    assert onnx_files.blame(branching, "in Sin(7)") == "node 'inner' (operator Sin): "
