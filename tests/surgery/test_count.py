"""What a graph costs: multiply-accumulates and parameters, alike for all who write the same network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from polar_deploy.surgery import cost
from polar_deploy.surgery.count import count, foldable_norms
from tests.surgery.graphs import Net

HEAD = 5 * 6 + 5  # of six channels
CONV = 9 * 3 * 6


def plain(net: Net) -> str:
    return net.conv("input", 6, "one")


def without_bias(net: Net) -> str:
    return net.conv("input", 6, "one", bias=False)


def norm_behind_a_layer(net: Net) -> str:
    return net.bn(net.conv("input", 6, "one", bias=False), "norm")


def norm_behind_a_bias(net: Net) -> str:
    return net.bn(net.conv("input", 6, "one"), "norm")


def norm_behind_a_norm(net: Net) -> str:
    return net.bn(norm_behind_a_layer(net), "norm2")


def norm_behind_an_activation(net: Net) -> str:
    return net.bn(net.relu(plain(net), "act"), "norm")


def norm_whose_layer_is_read_elsewhere(net: Net) -> str:
    x = plain(net)
    return net.add(net.bn(x, "norm"), x, "sum")


def norm_behind_a_shared_weight(net: Net) -> str:
    x = net.bn(net.conv("input", 6, "one", bias=False), "norm")
    y = net.node("Conv", ["input", "one.weight"], "other", pads=[1] * 4, kernel_shape=[3, 3])
    net.width[y] = 6
    return net.add(x, y, "sum")


def scalars(net: Net) -> str:
    """Such as an exporter writes for `x * 0.5`."""
    x = net.node("Mul", [plain(net), net.constant("factor", np.array(0.5, np.float32))], "scaled")
    return net.node("Add", [x, net.constant("shift", np.array(0.1, np.float32))], "shifted")


def a_vector_of_one(net: Net) -> str:
    return net.node("PRelu", [plain(net), net.constant("slope", np.full((1, 1, 1), 0.1, np.float32))], "act")


def a_number_a_channel(net: Net) -> str:
    return net.scale(plain(net), np.full(6, 0.5), "scaled")


def whole_numbers(net: Net) -> str:
    """Shapes are no parameters."""
    x = net.node("Reshape", [plain(net), net.constant("shape", np.array([0, 6, 8, 8]))], "shaped")
    net.width[x] = 6
    return x


@pytest.mark.parametrize(
    ("body", "params", "layers"),
    [
        (plain, CONV + 6, 1),
        (without_bias, CONV, 1),
        (norm_behind_a_layer, CONV + 4 * 6, 1),  # offset, scale, mean and variance
        (norm_behind_a_shared_weight, CONV + 4 * 6, 2),  # each constant once
        (scalars, CONV + 6, 1),
        (a_vector_of_one, CONV + 6 + 1, 1),
        (a_number_a_channel, CONV + 6 + 6, 1),
        (whole_numbers, CONV + 6, 1),
    ],
)
def test_parameters_and_multiplications(body: Callable[[Net], str], params: int, layers: int) -> None:
    net = Net()
    counted = cost(net.model(net.head(body(net))))
    assert (counted.params, counted.macs) == (params + HEAD, layers * 64 * CONV + 5 * 6)


@pytest.mark.parametrize(
    ("body", "params"),
    [
        (norm_behind_a_layer, CONV + 6),  # the bias that it folds to
        (norm_behind_a_bias, CONV + 6),
        (norm_behind_a_norm, CONV + 6 + 4 * 6),
        (norm_behind_an_activation, CONV + 6 + 4 * 6),
        (norm_whose_layer_is_read_elsewhere, CONV + 6 + 4 * 6),
        (norm_behind_a_shared_weight, CONV + 4 * 6),
    ],
)
def test_norms_that_will_be_folded_can_count_as_what_they_fold_to(body: Callable[[Net], str], params: int) -> None:
    net = Net()
    model = net.model(net.head(body(net)))
    assert count(model, foldable_norms(model)).params == params + HEAD


@pytest.mark.parametrize("handed_out", [False, True])
def test_a_norm_whose_layer_is_an_output_does_not_fold(handed_out: bool) -> None:
    net = Net()
    x = net.conv("input", 6, "one", bias=False)
    logits = net.head(net.bn(x, "norm"))
    model = net.model(logits, x) if handed_out else net.model(logits)
    assert list(foldable_norms(model).values()) == ([] if handed_out else [True])


def test_a_norm_counts_as_what_an_optimiser_that_folds_it_writes(tmp_path: Path) -> None:
    net = Net()
    model = net.model(net.head(net.relu(norm_behind_a_layer(net), "act")))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    folded = onnx.load(tmp_path / "folded.onnx")
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    assert cost(folded).params == count(model, foldable_norms(model)).params


@pytest.mark.parametrize(
    ("equation", "weights", "macs", "width"),
    [
        ("oi,bi->bo", (7, 4), 1 * 4 * 7, (4, 7)),  # the weight comes first
        ("bi,oi", (7, 4), 1 * 4 * 7, (4, 7)),  # the result is what is named once: bo
        ("bi->b", None, 0, None),
        ("bi,i->bi", (4,), 0, (0, 0)),  # element by element
        ("b...,b...->b", (1, 4), 0, (0, 0)),
    ],
)
def test_products_of_an_einsum(
    equation: str, weights: tuple[int, ...] | None, macs: int, width: tuple[int, int] | None
) -> None:
    first = equation.startswith("oi")
    names = ["x"] if weights is None else ["w", "x"] if first else ["x", "w"]
    constants = [] if weights is None else [onnx.numpy_helper.from_array(np.ones(weights, np.float32), "w")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Einsum", names, ["y"], equation=equation)],
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 4))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        constants,
    )
    found = count(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]))
    assert found.macs == macs
    assert [layer.width for layer in found.layers] == ([] if width is None else [width])


@pytest.mark.parametrize("by_shape", [False, True])
def test_rows_add_up_where_weights_are_computed_from_constants(by_shape: bool) -> None:
    """As PyTorch's exporter writes an LSTM: its gates in another order, cut out at numbers or at parts of a shape."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        lstm (float[N, 5, 3] x, float[4] h) => (float[5, 1, N, 4] y)
        <float[16, 3] w, float[1, 16, 4] r, int64[1] zero = {0}, int64[1] last = {16}, int64[1] fixed = {4}> {
            steps = Transpose<perm = [1, 0, 2]>(x)
            four = CUT
            first = Slice(w, zero, four)
            others = Slice(w, four, last)
            joined = Concat<axis = 0>(others, first)
            weight = Unsqueeze(joined, zero)
            y = LSTM<hidden_size = 4>(steps, weight, r)
        }""".replace("CUT", "Shape(h)" if by_shape else "Identity(fixed)")
    )
    shapes = (("w", (16, 3)), ("r", (1, 16, 4)))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.ones(shape, np.float32), n) for n, shape in shapes)
    counted = cost(model)
    (layer,) = counted.layers
    assert (layer.operator, layer.macs, layer.params) == ("LSTM", 5 * 16 * (3 + 4), 16 * (3 + 4))
    assert (counted.macs, counted.params) == (layer.macs, layer.params)
