"""Residual networks: inner channels, whole blocks, whole streams, through option-A shortcuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy.surgery import compress_file
from tests.support.shared import SHARED
from tests.surgery.graphs import Array, Net, constant, cut, half, names, operators, weight

RESNET56 = SHARED / "models" / "resnet56_cifar10_built.onnx"
needs_resnet56 = pytest.mark.skipif(not RESNET56.exists(), reason="../shared is not beside this checkout")


def insert_gates(model: onnx.ModelProto, gates: dict[str, Array]) -> None:
    """Multiplies tensors of a finished graph by [channels] masks; gate nodes are called `gate.TENSOR`."""
    nodes = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in gates:
                node.input[index] = f"{name}.gated"
        nodes.append(node)
        for name in set(node.output) & gates.keys():
            factor = gates[name].astype(np.float32).reshape(1, -1, 1, 1)
            model.graph.initializer.append(numpy_helper.from_array(factor, f"{name}.factor"))
            nodes.append(helper.make_node("Mul", [name, f"{name}.factor"], [f"{name}.gated"], name=f"gate.{name}"))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@needs_resnet56
def test_resnet56_with_half_open_gates_loses_every_closed_inner_channel(tmp_path: Path) -> None:
    model = onnx.load(RESNET56)
    random = np.random.default_rng(0)
    masks: dict[str, Array] = {}
    for node in list(model.graph.node):
        if node.op_type == "Conv" and node.name.startswith("layer") and node.name.endswith("conv1"):
            width = weight(model, node.name).shape[0]
            masks[node.name.replace("conv1", "bn1.y.r")] = random.permutation(width) < width // 2
    assert len(masks) == 27
    insert_gates(model, masks)
    source, target = tmp_path / "gated.onnx", tmp_path / "compressed.onnx"
    onnx.save(model, source)

    compress_file(source, target, verify=False)
    smaller = onnx.load(target)
    for tensor, mask in masks.items():
        one, two = tensor.replace("bn1.y.r", "conv1"), tensor.replace("bn1.y.r", "conv2")
        np.testing.assert_array_equal(weight(smaller, one), weight(model, one)[mask])
        np.testing.assert_array_equal(weight(smaller, two), weight(model, two)[:, mask])
    surgery = cut(model)
    assert surgery.model.SerializeToString(deterministic=True) == target.read_bytes(), "same bytes every time"
    assert surgery.report["operators"]["Mul"] == [27, 0]
    assert surgery.report["cuts_not_made"] == []


@needs_resnet56
def test_resnet56_loses_closed_blocks_with_all_their_nodes() -> None:
    model = onnx.load(RESNET56)
    dead = ["layer1.0", "layer1.4", "layer2.0", "layer3.8"]
    masks = {
        node.output[0]: np.full(
            weight(model, node.name.replace("bn2", "conv2")).shape[0],
            not node.name.startswith(tuple(f"{d}." for d in dead)),
        )
        for node in model.graph.node
        if node.name.endswith("bn2")
    }
    assert len(masks) == 27
    insert_gates(model, masks)
    surgery = cut(model)
    left = names(surgery.model)
    for block in dead:
        inside = {name for name in left if name.startswith(f"{block}.")}
        assert inside == ({f"{block}.sl", f"{block}.pad"} & names(model)), "only the shortcut stays"
    assert operators(surgery.model)["Relu"] == 55 - 2 * len(dead), "a Relu behind a Relu goes with its block"
    assert operators(surgery.model)["Mul"] == 0
    assert [entry["layers"] for entry in surgery.report["blocks_removed"]] == [
        [f"{block}.conv1", f"{block}.conv2"] for block in dead
    ]


@needs_resnet56
def test_resnet56_loses_closed_channels_of_its_streams_through_option_a_shortcuts() -> None:
    """Stream channel c of stage 1 is c + 8 in stage 2 and c + 24 in stage 3."""
    model = onnx.load(RESNET56)
    closed = {1: [0, 5, 9], 2: [8, 13, 17, 2, 30], 3: [24, 29, 33, 18, 46, 1, 63]}
    masks = {}
    for node in model.graph.node:
        if node.name == "bn1" or node.name.endswith("bn2"):
            stage = 1 if node.name == "bn1" else int(node.name[5])
            # behind the Relu for the stem, before the Add for every block
            mask = np.ones(16 * 2 ** (stage - 1))
            mask[closed[stage]] = 0
            masks["bn1.y.r" if node.name == "bn1" else node.output[0]] = mask
    insert_gates(model, masks)
    surgery = cut(model)
    assert operators(surgery.model)["Mul"] == 0
    assert surgery.report["cuts_not_made"] == []
    for node in surgery.model.graph.node:
        if node.op_type == "Conv" and node.name != "conv1":
            stage, second = int(node.name[5]), node.name.endswith("conv2")
            axis = 0 if second else 1
            first = node.name.endswith(".0.conv1") and stage > 1
            width = {1: 13, 2: 27, 3: 57}[stage - 1 if first else stage]
            assert weight(surgery.model, node.name).shape[axis] == width, node.name
    assert weight(surgery.model, "conv1").shape[0] == 13
    assert weight(surgery.model, "linear").shape == (10, 57)
    # added channels 2 of the first 8 and 30 of the last 8 in stage 2; 1 and 63 in stage 3
    assert constant(surgery.model, _pads(surgery.model, "layer2.0.pad")).tolist()[1::4] == [7, 7]
    assert constant(surgery.model, _pads(surgery.model, "layer3.0.pad")).tolist()[1::4] == [15, 15]


def _pads(model: onnx.ModelProto, output: str) -> str:
    name: str = next(node.input[1] for node in model.graph.node if node.output[0] == output)
    return name


def _block(net: Net, x: str, name: str, *, inner: list[int], out: list[int] | None = None) -> str:
    """Conv, BatchNorm, Relu, gate, Conv, BatchNorm, gate, Add, Relu."""
    width = net.width[x]
    y = net.gate(net.relu(net.bn(net.conv(x, width, f"{name}.1"), f"{name}.bn1"), f"{name}.act"), inner, f"{name}.g")
    y = net.bn(net.conv(y, width, f"{name}.2"), f"{name}.bn2")
    if out is not None:
        y = net.gate(y, out, f"{name}.block")
    return net.relu(net.add(y, x, f"{name}.add"), f"{name}.out")


def test_a_stream_goes_only_where_every_writer_agrees() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "stem"), "act"), [0, 1, 2], "stem.gate")
    x = _block(net, x, "a", inner=half(8, 0), out=[1, 2, 3])
    x = _block(net, x, "b", inner=half(8, 1), out=[2, 3, 0])
    surgery = cut(net.model(net.head(x)))
    smaller = surgery.model
    assert weight(smaller, "stem").shape[0] == 7, "channel 2 is closed by all, the others by some"
    assert weight(smaller, "a.2").shape == (7, 4, 3, 3)
    assert operators(smaller)["Mul"] == 0, "closed channels that stay are folded into zero filters"
    assert not np.any(weight(smaller, "stem")[[0, 1]])
    assert {entry["operator"] for entry in surgery.report["cuts_not_made"]} == {"coupling"}


def test_a_stream_gated_behind_every_add_goes() -> None:
    """A gate behind the Add's Relu closes the stream whatever the branches write."""
    net = Net()
    closed = [1, 6]
    x = net.gate(net.relu(net.conv("input", 8, "stem"), "act"), closed, "stem.gate")
    for name in ("a", "b"):
        x = net.gate(_block(net, x, name, inner=[0]), closed, f"{name}.stream")
    smaller = cut(net.model(net.head(x))).model
    assert weight(smaller, "stem").shape[0] == 6
    assert weight(smaller, "a.2").shape == weight(smaller, "b.2").shape == (6, 7, 3, 3)
    assert operators(smaller)["Mul"] == 0


def test_a_closed_block_goes_with_its_add_and_an_open_one_stays() -> None:
    net = Net()
    x = net.relu(net.conv("input", 8, "stem"), "act")
    x = _block(net, x, "a", inner=[], out=list(range(8)))
    x = _block(net, x, "b", inner=[], out=[])
    surgery = cut(net.model(net.head(x)))
    assert not {name for name in names(surgery.model) if name.startswith("a.")}
    assert operators(surgery.model)["Add"] == 1
    assert surgery.report["blocks_removed"] == [{"add": "a.add", "layers": ["a.1", "a.2"]}]
    assert [layer["out"] for layer in surgery.report["layers"] if layer["name"] == "a.1"] == [[8, 0]]


def test_a_block_whose_inner_channels_are_all_closed_leaves_its_constant() -> None:
    """The branch still adds its BatchNorm's offset: a constant, added without the layers."""
    net = Net()
    x = net.relu(net.conv("input", 8, "stem"), "act")
    x = _block(net, x, "a", inner=list(range(8)))
    smaller = cut(net.model(net.head(x))).model
    assert {name for name in names(smaller) if name.startswith("a.")} == {"a.add", "a.out"}
    assert operators(smaller)["Conv"] == 1


def test_a_closed_projection_block_keeps_the_projection() -> None:
    net = Net()
    x = net.relu(net.conv("input", 8, "stem"), "act")
    y = net.relu(net.conv(x, 6, "a.1", strides=[2, 2]), "a.act")
    y = net.gate(net.conv(y, 12, "a.2"), range(12), "a.block")
    x = net.relu(net.add(y, net.conv(x, 12, "a.down", kernel=1, strides=[2, 2]), "a.add"), "a.out")
    surgery = cut(net.model(net.head(x)))
    assert operators(surgery.model)["Add"] == 0
    assert {"a.down", "a.out"} <= names(surgery.model)
    assert surgery.report["blocks_removed"] == [{"add": "a.add", "layers": ["a.1", "a.2"]}]


def test_an_add_that_broadcasts_stays() -> None:
    """Here the closed branch gives the output its height and width."""
    net = Net()
    x = net.gate(net.conv("input", 4, "one"), range(4), "gate")
    y = net.node("GlobalAveragePool", [net.conv("input", 4, "two")], "small")
    surgery = cut(net.model(net.head(net.conv(net.add(x, y, "sum"), 4, "three"))))
    assert operators(surgery.model)["Add"] == 1
    assert weight(surgery.model, "one").shape[0] == 4


def test_bottlenecks_lose_inner_channels_and_streams() -> None:
    net = Net()
    stream = [3, 7, 8]
    x = net.gate(net.relu(net.conv("input", 16, "stem"), "act"), stream, "stem.gate")
    for name, closed in (("a", [0, 1]), ("b", [2, 3, 4, 5])):
        y = net.gate(
            net.relu(net.bn(net.conv(x, 8, f"{name}.1", kernel=1), f"{name}.bn1"), f"{name}.act1"), closed, f"{name}.g1"
        )
        y = net.gate(net.relu(net.bn(net.conv(y, 8, f"{name}.2"), f"{name}.bn2"), f"{name}.act2"), [6], f"{name}.g2")
        y = net.gate(net.bn(net.conv(y, 16, f"{name}.3", kernel=1), f"{name}.bn3"), stream, f"{name}.g3")
        x = net.relu(net.add(y, x, f"{name}.add"), f"{name}.out")
    smaller = cut(net.model(net.head(x))).model
    assert weight(smaller, "a.1").shape == (6, 13, 1, 1)
    assert weight(smaller, "a.2").shape == (7, 6, 3, 3)
    assert weight(smaller, "b.1").shape == (4, 13, 1, 1)
    assert weight(smaller, "b.3").shape == (13, 7, 1, 1)
    assert operators(smaller)["Mul"] == 0


def test_slice_along_channels_follows_the_cut() -> None:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [0, 4, 7], "gate")
    for name, values in (("starts", [2]), ("ends", [6]), ("axes", [1])):
        net.constant(name, np.array(values, np.int64))
    y = net.node("Slice", [x, "starts", "ends", "axes"], "slice")
    net.width[y] = 4
    x = net.add(net.conv(x, 5, "two"), net.conv(y, 5, "three"), "sum")
    smaller = cut(net.model(net.head(x))).model
    assert weight(smaller, "two").shape[1] == 5
    assert weight(smaller, "three").shape[1] == 3
    assert (constant(smaller, "starts").tolist(), constant(smaller, "ends").tolist()) == ([1], [4])


def test_pad_that_adds_nothing_any_more_goes() -> None:
    net = Net()
    x = net.relu(net.conv("input", 4, "one"), "act")
    net.constant("pads", np.array([0, 2, 0, 0, 0, 2, 0, 0], np.int64))
    y = net.node("Pad", [x, "pads"], "pad")
    net.width[y] = 8
    closed = [0, 1, 6, 7]
    z = net.gate(net.conv(x, 8, "two"), closed, "gate")
    smaller = cut(net.model(net.head(net.conv(net.add(y, z, "sum"), 4, "three")))).model
    assert operators(smaller)["Pad"] == 0
    assert weight(smaller, "two").shape[0] == weight(smaller, "three").shape[1] == 4


def test_pad_with_another_value_than_zero() -> None:
    """Added channels hold 3; a bias takes them up where nothing is padded, and the Pad is without work."""
    net = Net()
    x = net.relu(net.conv("input", 4, "one"), "act")
    net.constant("pads", np.array([0, 0, 0, 0, 0, 2, 0, 0], np.int64))
    net.constant("value", np.array(3, np.float32))
    y = net.node("Pad", [x, "pads", "value"], "pad")
    net.width[y] = 6
    smaller = cut(net.model(net.head(net.conv(y, 4, "two", kernel=1)))).model
    assert operators(smaller)["Pad"] == 0
    assert weight(smaller, "two").shape[1] == 4
