"""Costs, the report and its schema, and what importing the package costs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper
from rich.console import Console

from polar_deploy.errors import ContentError, MachineError
from polar_deploy.surgery import compress, compress_file, cost
from polar_deploy.surgery.report import alignment, show
from tests.support.schemas import valid
from tests.surgery.graphs import Net, cut, names


def _model() -> onnx.ModelProto:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 16, "stem", strides=[2, 2]), "act"), [0], "g0")
    y = net.gate(net.relu(net.conv(x, 16, "a", group=16), "r"), [1, 2], "g1")
    y = net.gate(net.conv(y, 16, "b", kernel=1), range(16), "g2")
    x = net.relu(net.add(y, x, "add"), "out")
    return net.model(net.head(net.scale(x, net.random.random(16), "g3")))


def test_layers_whose_weights_are_constant_nodes() -> None:
    """Where nothing goes, the model comes back with them: nodes that no layer's place may be mistaken for."""
    net = Net()
    x = net.head(net.relu(net.conv(net.conv("input", 4, "one"), 6, "two"), "act"))
    model = net.model(x)
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    layers = cut(model).report["layers"]
    found = [(layer["name"], layer["out"], layer["params"]) for layer in layers]
    expected = [("one", 4, 4 * 28), ("two", 6, 6 * 37), ("logits", 5, 5 * 7)]
    assert found == [(name, [width] * 2, [size] * 2) for name, width, size in expected]


def test_cost_by_hand() -> None:
    counted = cost(_model())
    macs = {layer.name: layer.macs for layer in counted.layers}
    params = {layer.name: layer.params for layer in counted.layers}
    assert macs == {"stem": 16 * 4 * 4 * 27, "a": 16 * 16 * 9, "b": 16 * 16 * 16, "logits": 16 * 5}
    assert params == {"stem": 16 * 27 + 16, "a": 16 * 9 + 16, "b": 16 * 16 + 16, "logits": 16 * 5 + 5}
    assert counted.macs == sum(macs.values())
    assert counted.params == sum(params.values()) + 4 * 16, "gates hold parameters too"


def test_cost_of_matmul_and_transposed_convolution() -> None:
    net = Net(channels=4, size=6)
    up = net.node(
        "ConvTranspose", ["input", net.constant("w", net.random.random((4, 3, 2, 2)).astype("f"))], "up", strides=[2, 2]
    )
    net.width[up] = 3
    shift = net.node("Transpose", [up], "shift", perm=[0, 1, 3, 2])
    counted = cost(net.model(net.node("MatMul", [up, shift], "product")))
    assert counted.macs == 4 * 6 * 6 * 3 * 4 + 3 * 12 * 12 * 12
    assert [layer.name for layer in counted.layers] == ["up"], "a product of two computed tensors has no weights"


def test_cost_of_a_constant_shared_by_two_layers_counts_it_once() -> None:
    net = Net()
    x = net.relu(net.conv("input", 3, "one", bias=False), "act")
    model = net.model(net.node("Conv", [x, "one.weight"], "two", pads=[1, 1, 1, 1]))
    assert cost(model).params == 81
    assert cost(model).macs == 2 * 64 * 81


def test_cost_of_a_graph_that_cannot_run_is_an_error() -> None:
    net = Net()
    flat = net.node("Flatten", ["input"], "flat")
    model = net.model(net.gemm(flat, 7, 5, "logits"))
    with pytest.raises(ContentError):
        cost(model)


def test_report_says_what_went_and_what_stayed() -> None:
    report = cut(_model()).report
    valid("surgery", report)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["stem"]["out"] == [16, 15]
    assert layers["a"]["out"] == layers["b"]["in"] == [16, 0]
    assert layers["logits"]["in"] == [16, 15]
    assert layers["logits"]["alignment"] == {"in": 1, "out": 1}
    assert layers["a"]["macs"] == [2304, 0]
    assert report["macs"] == [cost(_model()).macs, 15 * 16 * 27 + 15 * 5]
    assert report["blocks_removed"] == [{"add": "add", "layers": ["a", "b"]}]
    outcomes = {gate["node"]: gate["outcome"] for gate in report["gates"]}
    assert outcomes == {"g0": "removed", "g1": "removed", "g2": "removed", "g3": "kept"}
    assert report["operators"]["Mul"] == [4, 1]
    assert report["verified"]
    assert report["inputs"] == {"input": [1, 3, 8, 8]}


def test_closed_channels_that_stay_are_counted_once_a_set() -> None:
    net = Net()
    x = net.relu(net.conv("input", 8, "stem"), "act")
    for name in ("a", "b"):
        x = net.add(net.gate(net.conv(x, 8, name), [0, 1], f"{name}.gate"), x, f"{name}.add")
    surgery = compress(net.model(net.head(x)))
    (entry,) = surgery.report["cuts_not_made"]
    assert (entry["layer"], entry["channels"], entry["node"]) == ("a", 2, "stem")
    assert {gate["outcome"] for gate in surgery.report["gates"]} == {"folded"}
    assert "a.gate" not in names(surgery.model)


@pytest.mark.parametrize(("width", "step"), [(0, 0), (1, 1), (12, 4), (24, 8), (48, 16), (96, 32), (7, 1), (10, 2)])
def test_alignment(width: int, step: int) -> None:
    assert alignment(width) == step


def test_padding_is_counted_by_groups() -> None:
    """A device that works in multiples of 8: 5 of 8 outputs and 3 of 8 inputs are used, depthwise 10 of 16 channels."""
    net = Net(size=4)
    x = net.conv("input", 10, "plain", kernel=1)
    x = net.conv(x, 10, "depthwise", group=10)
    model = net.model(net.conv(x, 12, "grouped", group=2))
    layers = {layer["name"]: layer for layer in compress(model).report["layers"]}
    assert layers["plain"]["padding"]["8"] == pytest.approx(1 - 3 * 10 / (8 * 16), abs=1e-4)
    assert layers["depthwise"]["padding"] == {"8": 0.375, "16": 0.375, "32": 0.6875}
    assert layers["grouped"]["padding"]["8"] == pytest.approx(1 - 5 * 6 / 64, abs=1e-4)
    macs = {"plain": 16 * 30, "depthwise": 16 * 90, "grouped": 16 * 12 * 45}
    padded = 16 * (8 * 16 + 16 * 9 + 2 * 8 * 8 * 9)
    assert compress(model).report["padding"]["8"] == pytest.approx(1 - sum(macs.values()) / padded, abs=1e-4)


def test_names_from_strangers_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    x = net.conv("input", 4, "[/red]one\x1b[2J")
    show(compress(net.model(net.conv(x, 4, "two"))).report, Console(width=200))
    shown = capsys.readouterr().out
    assert "[/red]one\\x1b[2J" in shown
    assert "\x1b" not in shown


def test_gates_are_counted_in_words_and_a_graph_without_any_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for closed, told in (([1, 2], "gates: 1 removed\n"), ([], "gates: none\nnothing to cut: no channel is closed")):
        net = Net()
        x = net.relu(net.conv("input", 4, "one"), "act")
        x = net.gate(x, closed, "gate") if closed else x
        show(compress(net.model(net.head(net.conv(x, 4, "two")))).report, Console(width=200))
        shown = capsys.readouterr().out
        assert told in shown
        assert ("nothing to cut" in shown) is (not closed)


def test_a_row_says_what_products_of_computed_tensors_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """The rows add up to the total."""
    net = Net()
    x = net.relu(net.conv("input", 4, "one"), "act")
    net.width[product := net.node("MatMul", [x, x], "product")] = 4
    model = net.model(net.head(net.conv(product, 4, "two")))
    report = compress(model).report
    rest = report["macs"][0] - sum(layer["macs"][0] for layer in report["layers"])
    assert rest == 4 * 8 * 8 * 8
    show(report, Console(width=200))
    row = next(line for line in capsys.readouterr().out.splitlines() if "products without weights" in line)
    assert row.split()[-2:] == ["2.05", "k"]


def test_a_gate_behind_what_is_not_followed_has_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, L, 4] x) => (float[N, L, 4] y)
        <float[4] gate = {1, 0, 0, 1}, float[3] sums = {1, 2, 3}> {
            z = Einsum<equation = "nclw,c->nlw">(x, sums)
            y = Mul(z, gate)
        }"""
    )
    report = compress(model).report
    (kept,) = report["cuts_not_made"]
    assert (kept["channels"], kept["operator"], report["gates"]) == (2, "Einsum", [])
    show(report, Console(width=200))
    shown = capsys.readouterr().out
    assert "kept: 2 closed channels of y: " in shown
    assert "nothing to cut" not in shown


def test_a_graph_without_inputs_to_feed() -> None:
    """Everything is constant: nothing to cut, nothing to fail on."""
    value = helper.make_tensor_value_info("y", 1, [2])
    node = helper.make_node("Constant", [], ["y"], value_floats=[1.0, 2.0])
    model = helper.make_model(
        helper.make_graph([node], "g", [], [value]), ir_version=8, opset_imports=[helper.make_opsetid("", 17)]
    )
    assert len(compress(model).model.graph.node) == 1


def test_import_is_light() -> None:
    """`benchmarks.bar_surgery_speed` times it."""
    code = "import sys, polar_deploy.surgery; print({'torch', 'onnx', 'onnxruntime'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_full_disk_is_told_by_the_name_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(_model().SerializeToString())
    write_text = Path.write_text

    def full(path: Path, text: str, **how: str) -> int:
        if "json" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, text, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MachineError, match="no space left") as caught:
        compress_file(tmp_path / "a.onnx", tmp_path / "b.onnx", report=tmp_path / "r.json", verify=False)
    assert f"{tmp_path}/r.json" in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.onnx"], "neither half of a result is left"
