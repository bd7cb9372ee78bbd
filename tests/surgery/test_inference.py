"""What is known of shapes: from one inference where a batch is all that varies, else from one at each of two sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy.surgery import compress
from polar_deploy.surgery.count import count
from polar_deploy.surgery.inference import Skeleton
from polar_deploy.surgery.validation import NotUnderstoodError
from tests.surgery.graphs import Net

FLOAT = onnx.TensorProto.FLOAT


def model(nodes: list[onnx.NodeProto], given: list[Any], **constants: Any) -> onnx.ModelProto:
    """Nodes from `x`, whose shape is `given`, to `y`."""
    held = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    inputs = [helper.make_tensor_value_info("x", FLOAT, given)]
    graph = helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("y", FLOAT, None)], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def network(*given: Any) -> onnx.ModelProto:
    """A strided convolution, and a head that is flattened to 32 features a picture."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Flatten", ["relu"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v"], ["y"]),
    ]
    return model(nodes, list(given), w=np.ones((8, 3, 3, 3), np.float32), v=np.ones((32, 5), np.float32))


@pytest.fixture
def inferences(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each time that onnx is asked: the first dimension of the first input."""
    asked: list[str] = []
    infer = onnx.shape_inference.infer_shapes

    def counted(model: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
        dim = model.graph.input[0].type.tensor_type.shape.dim[0]
        asked.append(dim.dim_param or str(dim.dim_value))
        return infer(model, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    return asked


@pytest.mark.parametrize("batch", ["batch", None])
def test_a_batch_alone_takes_one_inference(batch: str | None, inferences: list[str]) -> None:
    skeleton = Skeleton(network(batch, 3, 4, 4))
    assert skeleton.tensors.shape("relu") == ((2, 3), 8, 2, 2)
    assert skeleton.tensors.shape("y") == ((2, 3), 5)
    assert skeleton.tensors.shape("v") == (32, 5)
    inputs, shape = skeleton.at_batch_1()
    assert inputs == {"x": (1, 3, 4, 4)}
    assert [shape(name) for name in ("x", "flat", "y")] == [(1, 3, 4, 4), (1, 32), (1, 5)]
    assert inferences == [batch or "x:0"]


def test_other_dynamic_sizes_take_one_each(inferences: list[str]) -> None:
    nodes = [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])]
    assert Skeleton(model(nodes, ["batch", 3, "height", 8])).tensors.shape("y") == ((2, 3), 3, (112, 189), 4)
    assert inferences == ["2", "3"]


def test_what_depends_on_the_batch_otherwise_takes_one_each(inferences: list[str]) -> None:
    """Pictures that are cut in two: a symbol does not tell how many there are then."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    cut = model(nodes, ["batch", 4], shape=np.array([-1, 2]))
    assert Skeleton(cut).tensors.shape("y") == ((4, 6), 2)
    assert inferences == ["batch", "2", "3"]


def test_a_batch_that_is_said_to_vary_and_does_not(inferences: list[str]) -> None:
    """A symbol goes with any number in broadcasting; only one number goes with five."""
    fixed = model([helper.make_node("Add", ["x", "five"], ["y"])], ["batch", 4], five=np.ones((5, 4), np.float32))
    assert Skeleton(fixed).tensors.shape("y") == (5, 4)
    assert inferences[:3] == ["batch", "2", "2"]


def test_features_that_do_not_fit_at_any_batch() -> None:
    """Four features a picture reshaped to five: inference lets that pass."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["five"]),
        helper.make_node("Relu", ["five"], ["y"]),
    ]
    wrong = model(nodes, ["batch", 4], shape=np.array([0, 5]))
    with pytest.raises(NotUnderstoodError, match="contradict"):
        Skeleton(wrong).at_batch_1()


@pytest.mark.parametrize("batch", ["batch", 1])
def test_what_comes_in_may_come_out_as_well(batch: str | int) -> None:
    """An output that no node computes says nothing of shapes, and is no reason to forget them."""
    both = network(batch, 3, 4, 4)
    for name in ("x", "w"):
        both.graph.output.append(helper.make_tensor_value_info(name, FLOAT, None))
    shape = Skeleton(both).at_batch_1()[1]
    assert [shape(name) for name in ("x", "w", "flat")] == [(1, 3, 4, 4), (8, 3, 3, 3), (1, 32)]
    assert count(both).macs == 8 * 2 * 2 * 3 * 9 + 32 * 5


@pytest.mark.parametrize("levels", [(1, 2), (1, 2, 4), (2, 1), (4, 1), (4, 2, 1)])
def test_inputs_whose_sizes_belong_together(levels: tuple[int, ...]) -> None:
    """Each is enlarged to the size of the largest; what they are called does not tell that."""
    net = Net()
    inputs = [helper.make_tensor_value_info(f"x{i}", 1, ["N", 3, f"H{i}", f"W{i}"]) for i in range(len(levels))]
    large = [
        net.node("Resize", [f"x{i}", "", net.constant(f"scale{i}", np.array([1, 1, by, by], "f"))], f"up{i}")
        for i, by in enumerate(levels)
    ]
    x = net.node("Concat", large, "joined", axis=1)
    net.width[x] = 3 * len(levels)
    x = net.gate(net.relu(net.conv(x, 8, "one"), "act"), [0, 1], "gate")
    model = net.model(net.head(net.conv(x, 4, "two")))
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    assert compress(model).report["layers"][0]["out"] == [8, 6]


@pytest.mark.parametrize("kernel", [1024, 9000])
def test_sizes_of_sound(kernel: int) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        sound (float[N, 1, T] x) => (float[N, 2, S] y) <float[2, 1, {kernel}] w> {{ y = Conv(x, w) }}"""
    )
    weights = np.ones((2, 1, kernel), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    assert compress(model).report["verified"]
