"""Graphs as PyTorch's exporter writes them: BatchNorm folded, equal constants merged, Slice and Pad."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from polar_deploy.tasks.classification import classifier
from tests.surgery.graphs import Array, Net, cut, names, operators, weight
from tests.surgery.test_residual import insert_gates

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def resnet20(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR ResNet-20 with option-A shortcuts, and BatchNorms in which nothing is accidentally zero."""
    from polar_deploy import models

    torch.manual_seed(0)
    network = models.build("resnet20", classifier(10, 16)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    path = tmp_path_factory.mktemp("exported") / "resnet20.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        names = {"input_names": ["input"], "output_names": ["logits"], "verbose": False}
        example = (torch.zeros(2, 3, 16, 16),)
        torch.onnx.export(network, example, path, dynamo=True, dynamic_shapes=shapes, external_data=False, **names)
    return path


def _blocks(model: onnx.ModelProto) -> list[tuple[str, str, str, str]]:
    """(first Conv, its Relu's output, second Conv, its output) of every block, by the Adds of the graph."""
    makers = {name: node for node in model.graph.node for name in node.output}
    blocks = []
    for node in model.graph.node:
        if node.op_type == "Add":
            second = next(makers[name] for name in node.input if makers[name].op_type == "Conv")
            relu = makers[second.input[0]]
            blocks.append((makers[relu.input[0]].name, relu.output[0], second.name, second.output[0]))
    return blocks


def _stream(model: onnx.ModelProto) -> str:
    """Output of the stem's Relu."""
    return str(next(node.output[0] for node in model.graph.node if node.op_type == "Relu"))


def test_inner_channels_and_blocks(resnet20: Path) -> None:
    model = onnx.load(resnet20)
    assert "BatchNormalization" not in operators(model)
    blocks, random = _blocks(model), np.random.default_rng(0)
    assert len(blocks) == 9
    masks: dict[str, Array] = {}
    dead = {1, 4, 8}
    for index, (_, inner, second, out) in enumerate(blocks):
        width = weight(model, second).shape[0]
        masks[inner] = random.permutation(width) < width // 2
        masks[out] = np.full(width, index not in dead)
    insert_gates(model, masks)
    surgery = cut(model)
    left = names(surgery.model)
    for index, (first, inner, second, _) in enumerate(blocks):
        assert (first in left) == (second in left) == (index not in dead)
        if index not in dead:
            np.testing.assert_array_equal(weight(surgery.model, first), weight(model, first)[masks[inner]])
            np.testing.assert_array_equal(weight(surgery.model, second), weight(model, second)[:, masks[inner]])
    assert operators(surgery.model)["Mul"] == 0
    assert operators(surgery.model)["Add"] == 6
    assert len(surgery.report["blocks_removed"]) == 3
    assert surgery.report["unsupported"] == surgery.report["cuts_not_made"] == []


def test_streams_through_the_shortcuts(resnet20: Path) -> None:
    """Channel c of stage 1 is c + 8 in stage 2 and c + 24 in stage 3."""
    model = onnx.load(resnet20)
    closed = {16: [3, 4], 32: [11, 12, 0], 64: [27, 28, 16, 63]}
    masks: dict[str, Array] = {}
    for _, _, second, out in _blocks(model):
        width = weight(model, second).shape[0]
        masks[out] = ~np.isin(np.arange(width), closed[width])
    masks[_stream(model)] = ~np.isin(np.arange(16), closed[16])
    insert_gates(model, masks)
    smaller = cut(model).model
    widths = {16: 14, 32: 29, 64: 60}
    for _, _, second, _ in _blocks(model_before := onnx.load(resnet20)):
        assert weight(smaller, second).shape[0] == widths[weight(model_before, second).shape[0]]
    assert weight(smaller, next(n.name for n in smaller.graph.node if n.op_type == "Gemm")).shape == (10, 60)
    assert operators(smaller)["Mul"] == 0


def test_a_block_closed_on_all_channels_that_are_left_goes_too() -> None:
    """Only after the stream has lost channels 0 to 3 is the second branch closed throughout."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "stem"), "act"), [0, 1, 2, 3], "stem.gate")
    for name, closed in (("a", [0, 1, 2, 3]), ("b", [4, 5, 6, 7])):
        y = net.conv(net.relu(net.conv(x, 8, f"{name}.1"), f"{name}.act"), 8, f"{name}.2")
        x = net.gate(net.add(net.gate(y, closed, f"{name}.gate"), x, f"{name}.add"), [0, 1, 2, 3], f"{name}.stream")
    surgery = cut(net.model(net.head(x)))
    assert not {name for name in names(surgery.model) if name.startswith("b.")}
    assert surgery.report["blocks_removed"] == [{"add": "b.add", "layers": ["b.1", "b.2"]}]
    assert {gate["outcome"] for gate in surgery.report["gates"]} <= {"removed", "folded"}
    assert weight(surgery.model, "stem").shape[0] == 4


def test_a_branch_that_goes_holds_nothing_back() -> None:
    """The closed branch adds two streams and holds an operator that nobody knows; its channels go all the same."""
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act1"), [0, 1], "g1")
    y = net.gate(net.relu(net.conv("input", 8, "two"), "act2"), [2], "g2")
    both = net.node("LRN", [net.add(x, y, "both")], "lrn", size=3)
    branch = net.gate(net.conv(both, 4, "three"), range(4), "block")
    joined = net.add(net.add(net.conv(x, 4, "four"), net.conv(y, 4, "five"), "sum"), branch, "block.add")
    surgery = cut(net.model(net.head(joined)))
    assert weight(surgery.model, "one").shape[0] == 6
    assert weight(surgery.model, "two").shape[0] == 7
    assert surgery.report["unsupported"] == []
