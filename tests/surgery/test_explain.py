"""`--explain TENSOR`: what is known of a tensor's channels, in words."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from polar_deploy.errors import UsageError
from polar_deploy.surgery.__main__ import main
from polar_deploy.surgery.explain import explain_file
from tests.surgery.graphs import CLOSED, Net


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _closed(folder: Path) -> Path:
    """Channels 1 and 4 of six are closed."""
    net = Net()
    x = net.relu(net.gate(net.conv("input", 6, "one"), CLOSED, "gate"), "act")
    return _saved(net.model(net.conv(x, 4, "two")), folder)


def test_what_goes_and_with_whom(tmp_path: Path) -> None:
    told = explain_file(_closed(tmp_path), "gate")
    assert told[0] == "gate: 6 channels on axis 1, made by gate"
    assert "  go: 1, 4 (2)" in told
    assert "  needed: 0, 2-3, 5 (4)" in told
    assert "  constant: 1, 4 (2) = 0" in told
    partners = [line for line in told if "together with" in line and line.startswith("  6 of them")]
    assert [line.split()[-4].rstrip(",") for line in partners] == ["one", "act"]


def test_why_closed_channels_stay(tmp_path: Path) -> None:
    """They are added to what a graph output has."""
    net = Net()
    x = net.conv("input", 6, "one")
    y = net.gate(net.conv(x, 6, "two"), CLOSED, "gate")
    told = explain_file(_saved(net.model(net.add(x, y, "sum")), tmp_path), "gate")
    assert "  constant: 1, 4 (2) = 0" in told
    assert any("stay" in line and "it reaches a graph output" in line for line in told), told
    assert not any(line.startswith("  go:") for line in told)


def test_a_node_is_meant_where_no_tensor_has_that_name(tmp_path: Path) -> None:
    path = _closed(tmp_path)
    model = onnx.load(path)
    next(node for node in model.graph.node if node.name == "act").name = "the activation"
    onnx.save(model, path)
    assert explain_file(path, "the activation")[0].startswith("act: 6 channels")


def test_constants_have_no_channels(tmp_path: Path) -> None:
    net = Net()
    shape = net.node("Shape", ["input"], "sizes")
    x = net.conv("input", 4, "one")
    model = net.model(net.node("Reshape", [net.node("Reshape", [x, shape], "same"), shape], "again"))
    (line,) = explain_file(_saved(model, tmp_path), "sizes")
    assert line.startswith("sizes: no channels are followed here")


def test_an_unknown_name_is_answered_by_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tensor and no node 'gatt'") as error:
        explain_file(_closed(tmp_path), "gatt")
    assert "gate" in str(error.value)


def test_the_command_tells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _closed(tmp_path)
    assert main([str(path), "--explain", "gate"]) == 0
    assert "  go: 1, 4 (2)" in capsys.readouterr().out
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]


def test_a_cut_wants_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(_closed(tmp_path))]) == 2
    assert "OUT.onnx" in capsys.readouterr().err
