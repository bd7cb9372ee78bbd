"""Files from strangers: one clear error with the right exit code, nothing written, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy.surgery.__main__ import main
from tests.surgery.graphs import Net


def _model() -> onnx.ModelProto:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 16, "one"), "act"), [1, 2], "gate")
    return net.model(net.head(net.conv(x, 16, "two")))


def _bytes(change: Callable[[onnx.ModelProto], object]) -> bytes:
    model = _model()
    change(model)
    data: bytes = model.SerializeToString()
    return data


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "two"


def _self_loop(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "act"


def _duplicate_output(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "one"


def _duplicate_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(_initializer(model, "two.weight"))


def _short_weight(model: onnx.ModelProto) -> None:
    tensor = _initializer(model, "two.weight")
    tensor.raw_data = tensor.raw_data[:-40]


def _huge_dims(model: onnx.ModelProto) -> None:
    del _initializer(model, "two.weight").dims[:]
    _initializer(model, "two.weight").dims.extend([1 << 40, 1 << 20, 3, 3])


def _negative_dims(model: onnx.ModelProto) -> None:
    _initializer(model, "two.weight").dims[0] = -16


def _unknown_type(model: onnx.ModelProto) -> None:
    _initializer(model, "two.weight").data_type = 999


def _wrong_channels(model: onnx.ModelProto) -> None:
    _initializer(model, "two.weight").CopyFrom(
        numpy_helper.from_array(np.zeros((16, 9, 3, 3), np.float32), "two.weight")
    )


def _external(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = _initializer(model, "two.weight")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    return change


def _set(field: str, value: object) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(model, field, value)


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "text": b"this is not a model\n" * 50,
    "json": b'{"nodes": []}',
    "zeros": bytes(4096),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "truncated": _model().SerializeToString()[:-700],
    "half": _model().SerializeToString()[: len(_model().SerializeToString()) // 2],
    "no nodes": _bytes(lambda m: m.graph.ClearField("node")),
    "no outputs": _bytes(lambda m: m.graph.ClearField("output")),
    "no graph": _bytes(lambda m: m.ClearField("graph")),
    "no opset": _bytes(lambda m: m.ClearField("opset_import")),
    "no ir version": _bytes(lambda m: m.ClearField("ir_version")),
    "opset of the future": _bytes(lambda m: setattr(m.opset_import[0], "version", 4000)),
    "ir version of the future": _bytes(_set("ir_version", 999)),
    "cycle": _bytes(_cycle),
    "self loop": _bytes(_self_loop),
    "duplicate output": _bytes(_duplicate_output),
    "duplicate initializer": _bytes(_duplicate_initializer),
    "missing weight": _bytes(lambda m: m.graph.initializer.remove(_initializer(m, "two.weight"))),
    "missing input": _bytes(lambda m: m.graph.ClearField("input")),
    "weight too short": _bytes(_short_weight),
    "weight without data": _bytes(lambda m: _initializer(m, "two.weight").ClearField("raw_data")),
    "huge weight": _bytes(_huge_dims),
    "negative dimension": _bytes(_negative_dims),
    "unknown data type": _bytes(_unknown_type),
    "weight of another width": _bytes(_wrong_channels),
    "unknown operator": _bytes(lambda m: setattr(m.graph.node[1], "op_type", "NoSuchOperator")),
    "operator without inputs": _bytes(lambda m: m.graph.node[0].ClearField("input")),
    "attribute of the wrong type": _bytes(
        lambda m: m.graph.node[0].attribute.append(helper.make_attribute("pads", "x"))
    ),
    "group zero": _bytes(lambda m: setattr(next(a for a in m.graph.node[0].attribute if a.name == "group"), "i", 0)),
    "negative stride": _bytes(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("strides", [-1, 0]))),
    "name that is no text": _model().SerializeToString().replace(b"act", b"\xe4ct"),
    "external data missing": _bytes(_external("weights.bin")),
    "external data outside": _bytes(_external("../../../../etc/passwd")),
    "external data absolute": _bytes(_external("/etc/passwd")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_exits_4(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, report = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "r.json"
    source.write_bytes(HOSTILE[kind])
    assert main([str(source), str(target), "--report", str(report)]) == 4
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: ")
    assert "what to do: " in streams.err
    assert "Traceback" not in streams.err
    assert len(streams.err.splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


def test_random_damage_never_ends_in_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flipped bytes: a clean refusal, or a graph that still computes the same."""
    random = np.random.default_rng(0)
    good = _model().SerializeToString()
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    codes = []
    for _ in range(60):
        data = bytearray(good)
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(0, 256)
        source.write_bytes(data)
        codes.append(main([str(source), str(target)]))
    assert set(codes) <= {0, 4}
    assert 4 in codes


def test_nan_and_inf_weights_are_no_reason_to_fail(tmp_path: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        tensor = _initializer(model, "one.weight")
        values = np.array(numpy_helper.to_array(tensor))
        values[3], values[4] = np.nan, np.inf
        tensor.CopyFrom(numpy_helper.from_array(values, "one.weight"))

    source = tmp_path / "in.onnx"
    source.write_bytes(_bytes(poison))
    assert main([str(source), str(tmp_path / "out.onnx")]) == 0


def test_a_zero_size_tensor_is_no_reason_to_fail(tmp_path: Path) -> None:
    model = _model()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 3), np.float32), "nothing"))
    source = tmp_path / "in.onnx"
    onnx.save(model, source)
    assert main([str(source), str(tmp_path / "out.onnx")]) == 0


@pytest.mark.parametrize("arguments", [[], ["in.onnx"], ["in.onnx", "out.onnx", "--fast"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_missing_input_and_folders_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.onnx"
    onnx.save(_model(), good)
    (tmp_path / "folder").mkdir()
    assert main([str(tmp_path / "no.onnx"), str(tmp_path / "out.onnx")]) == 2
    assert main([str(tmp_path / "folder"), str(tmp_path / "out.onnx")]) == 2
    assert main([str(good), str(tmp_path / "folder")]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_command_writes_model_and_report(tmp_path: Path) -> None:
    """A fresh interpreter, as a user starts it."""
    source, target, report = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "r.json"
    onnx.save(_model(), source)
    command = [sys.executable, "-m", "polar_deploy.surgery", str(source), str(target), "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "140"})
    assert "16 -> 14" in done.stdout
    assert "verified" in done.stdout
    assert done.stderr == ""
    onnx.checker.check_model(onnx.load(target), full_check=True)
    assert json.loads(report.read_text())["layers"][0]["out"] == [16, 14]


def test_json_goes_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(_model(), source)
    assert main([str(source), str(tmp_path / "out.onnx"), "--json", "--no-verify"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is False


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(_model(), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").exists()
    assert main([str(source), str(target)]) == 0
    assert not any(tensor.external_data for tensor in onnx.load(target, load_external_data=False).graph.initializer)
