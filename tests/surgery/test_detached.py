"""Weights beside the graph: in one file or in a file of external data, of every precision, never held twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy.surgery import compress, compress_file, detached
from tests.surgery.graphs import Net, assert_same, weight


def _wide(width: int = 64, opset: int = 17) -> onnx.ModelProto:
    """A chain whose weights are large enough to lie beside the graph; half of the inner channels are closed."""
    net = Net(channels=4, opset=opset)
    x = net.gate(net.relu(net.conv("input", width, "one"), "act"), range(0, width, 2), "gate")
    return net.model(net.head(net.relu(net.conv(x, width, "two"), "act2")))


def _save_external(model: onnx.ModelProto, path: Path) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=16)


def test_a_model_comes_out_of_storage_as_it_went_in() -> None:
    model = _wide()
    taken = detached.detach_weights(model)
    assert set(taken.arrays) == {"one.weight", "two.weight"}
    assert sum(len(tensor.raw_data) for tensor in taken.model.graph.initializer) < 2 * 4096
    assert detached.to_model(taken) == model


def test_external_data_stays_external(tmp_path: Path) -> None:
    model = _wide()
    _save_external(model, tmp_path / "in.onnx")
    places_as_text = (str(tmp_path / "in.onnx"), str(tmp_path / "out" / "out.onnx"))
    report = compress_file(*places_as_text, report=str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["verified"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["out.onnx", "out.onnx.data"]
    shell = onnx.load(tmp_path / "out" / "out.onnx", load_external_data=False)
    places = {t.name: t.external_data[0].value for t in shell.graph.initializer if t.external_data}
    assert places == {"one.weight": "out.onnx.data", "two.weight": "out.onnx.data"}
    onnx.checker.check_model(str(tmp_path / "out" / "out.onnx"), full_check=True)
    smaller = onnx.load(tmp_path / "out" / "out.onnx")
    assert weight(smaller, "two").shape == (64, 32, 3, 3)
    assert_same(model, smaller)


def test_the_same_place_can_be_written_again(tmp_path: Path) -> None:
    """Also onto itself: the weights are mapped from the very file that is replaced."""
    model = _wide()
    _save_external(model, tmp_path / "in.onnx")
    compress_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    first = [(tmp_path / name).read_bytes() for name in ("out.onnx", "out.onnx.data")]
    compress_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    compress_file(tmp_path / "out.onnx", tmp_path / "out.onnx")
    assert first == [(tmp_path / name).read_bytes() for name in ("out.onnx", "out.onnx.data")]


def test_small_tensors_and_constant_nodes_in_external_data(tmp_path: Path) -> None:
    net = Net(channels=4)
    x = net.conv("input", 8, "one")
    net.nodes.append(helper.make_node("Constant", [], ["mask"], name="mask"))
    values = numpy_helper.from_array(np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32).reshape(8, 1, 1), "value")
    net.nodes[-1].attribute.append(helper.make_attribute("value", values))
    x = net.node("Mul", ["mask", x], "gate")
    model = net.model(net.conv(x, 4, "two"))
    onnx.save(
        model, tmp_path / "in.onnx", save_as_external_data=True, location="d", size_threshold=0, convert_attribute=True
    )
    compress_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert weight(onnx.load(tmp_path / "out.onnx"), "one").shape[0] == 6


@pytest.mark.parametrize("kind", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_other_precisions(kind: str) -> None:
    """Weights keep their type and, bit for bit, their values; what is in double or BF16 is proven by onnx."""
    model = _wide(32, opset=22)
    number = onnx.TensorProto.DataType.Value(kind)
    dtype = helper.tensor_dtype_to_np_dtype(number)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = number
    surgery = compress(model)
    onnx.checker.check_model(surgery.model, full_check=True)
    assert surgery.report["verified"]
    assert weight(surgery.model, "one").dtype == dtype
    assert weight(surgery.model, "one").tobytes() == weight(model, "one")[1::2].tobytes()
    assert weight(surgery.model, "two").tobytes() == weight(model, "two")[:, 1::2].tobytes()


def test_tensors_of_four_bits_and_of_text_are_left_alone() -> None:
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), [1], "gate")
    model = net.model(net.conv(x, 4, "two"))
    model.graph.initializer.append(helper.make_tensor("four", onnx.TensorProto.INT4, [3], [1, -2, 3]))
    model.graph.initializer.append(helper.make_tensor("text", onnx.TensorProto.STRING, [2], [b"a", b"b"]))
    assert weight(compress(model).model, "one").shape[0] == 5


def test_the_same_bytes_whatever_the_order_of_sets(tmp_path: Path) -> None:
    net = Net(channels=4)
    x = net.relu(net.conv("input", 64, "one"), "act")
    parts = [net.gate(net.conv(x, 64, f"branch{i}"), range(i, 64, 3), f"gate{i}") for i in range(4)]
    joined = net.node("Concat", parts, "concat", axis=1)
    net.width[joined] = 256
    onnx.save(net.model(net.head(net.conv(joined, 64, "last"))), tmp_path / "in.onnx")
    written = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "polar_deploy.surgery", "in.onnx", "out.onnx", "--report", "out.json"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        written.append([(tmp_path / name).read_bytes() for name in ("out.onnx", "out.json")])
    assert written[0] == written[1]


MEMORY = """
import resource, sys
from pathlib import Path
import onnx, onnx.shape_inference
from polar_deploy.surgery import compress_file, count, report, rounds, detached, verify, ops
ops.table()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compress_file(Path("in.onnx"), Path("out.onnx"), verify=False)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_stays_below_three_times_the_model(tmp_path: Path) -> None:
    """Nothing but two layers is cut, so that the result is nearly as large as the model."""
    net = Net(channels=4)
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [1], "gate")
    x = net.conv(x, 1024, "two")
    for index in range(3):
        x = net.relu(net.conv(x, 1024, f"wide{index}"), f"act{index}")
    onnx.save(net.model(net.head(x)), tmp_path / "in.onnx")
    size = (tmp_path / "in.onnx").stat().st_size
    assert size > 100e6
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 3 * size
