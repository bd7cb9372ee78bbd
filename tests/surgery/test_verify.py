"""The proof tells equal from different, and says so when it cannot be made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from polar_deploy.errors import ContentError, MachineError
from polar_deploy.surgery import compress, inputs, runtime, verify
from polar_deploy.surgery.__main__ import main
from polar_deploy.surgery.runtime import Run
from tests.surgery.graphs import Net, weight


def _model() -> onnx.ModelProto:
    net = Net()
    x = net.gate(net.relu(net.conv("input", 8, "one"), "act"), [1, 2], "gate")
    return net.model(net.head(net.conv(x, 4, "two")))


def _in(dtype: type) -> onnx.ModelProto:
    """The same model in another precision."""
    model = _model()
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


def _prove(folder: Path, before: onnx.ModelProto, after: onnx.ModelProto) -> verify.Proof:
    onnx.save(before, folder / "before.onnx")
    onnx.save(after, folder / "after.onnx")
    return verify.verify(before, folder / "before.onnx", folder / "after.onnx")


def test_a_changed_weight_is_found(tmp_path: Path) -> None:
    model = _model()
    other = onnx.ModelProto()
    other.CopyFrom(model)
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == "two.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1e-3), "two.bias"))
    with pytest.raises(ContentError, match="changed the function"):
        _prove(tmp_path, model, other)


def test_rounding_above_the_tolerance_is_judged_by_float64(tmp_path: Path) -> None:
    """Terms that cancel: another order of summation differs by more than 1e-5, and is no worse."""
    net = Net(size=4)
    model = net.model(net.conv(net.conv("input", 64, "one", kernel=1), 4, "two", kernel=1))
    random = np.random.default_rng(0)
    one = np.repeat(random.standard_normal((32, 3, 1, 1)), 2, axis=0).astype(np.float32)
    two = np.repeat(random.standard_normal((4, 32, 1, 1)) * 1e4, 2, axis=1).astype(np.float32)
    two[:, 1::2] *= -1
    two += random.standard_normal(two.shape).astype(np.float32)
    graphs = []
    for rows in (random.permutation(64), np.arange(64)):
        graph = onnx.ModelProto()
        graph.CopyFrom(model)
        values = {"one.weight": one[rows], "two.weight": two[:, rows], "one.bias": np.zeros(64, np.float32)}
        for tensor in graph.graph.initializer:
            if tensor.name in values:
                tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
        graphs.append(graph)
    proof = _prove(tmp_path, *graphs)
    assert proof.difference > proof.tolerance == 1e-5


def _apart(a_channel: float, a_pixel: float) -> list[onnx.ModelProto]:
    """Two graphs for pictures of any size that differ by so much, and by so much times the number of elements."""
    graphs = []
    for factor in (0.0, 1.0):
        net = Net()
        net.inputs = [helper.make_tensor_value_info("input", 1, ["batch", 3, "height", "width"])]
        size = net.node("Cast", [net.node("Size", ["input"], "size")], "number", to=onnx.TensorProto.FLOAT)
        more = net.node("Mul", [size, net.constant("pixel", np.float32(factor * a_pixel))], "grown")
        more = net.node("Add", [more, net.constant("channel", np.float32(factor * a_channel))], "more")
        graphs.append(net.model(net.node("Add", [net.conv("input", 4, "one"), more], "sum")))
    return graphs


def _no_float64(*_: object) -> Run:
    raise ContentError("no such operator", "")


def test_where_float64_cannot_tell_smaller_pictures_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "reference", _no_float64)
    proof = _prove(tmp_path, *_apart(0, 1e-9))  # 4e-4 of a batch of 224 pixels a side, 1e-5 at 32
    assert proof.difference > proof.tolerance == 1e-5


@pytest.mark.parametrize("grows", [1e-7, 1e-6])
def test_what_is_too_large_for_rounding_stays_undecided(
    grows: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "reference", _no_float64)
    with pytest.raises(verify.UndecidedError, match="there is no float64 result"):
        _prove(tmp_path, *_apart(0, grows))


def test_float64_has_a_limit_on_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx's reference takes hours for deformable convolutions of large pictures; then smaller ones decide, too."""
    monkeypatch.setattr(verify, "JUDGE_SECONDS", 0.001)
    assert _prove(tmp_path, *_apart(0, 1e-9)).difference > 1e-5
    with pytest.raises(verify.UndecidedError, match=r"rounding: onnx's reference takes longer than 0\.001 s"):
        _prove(tmp_path, *_apart(0, 1e-7))


def test_where_float64_tells_smaller_pictures_are_not_asked(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="changed the function"):
        _prove(tmp_path, *_apart(0, 1e-9))


def test_what_differs_in_smaller_pictures_too_is_found(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="changed the function"):
        _prove(tmp_path, *_apart(1e-3, 0))


def test_what_only_the_runtime_computes_otherwise_is_undecided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer kernels saturate on some processors, and then the order of channels counts."""
    real, calls = verify.onnx_runtime, list[Path]()

    def saturating(path: Path) -> Run:
        run = real(path)
        calls.append(path)
        return run if len(calls) == 1 else lambda values: {name: 0.9 * x for name, x in run(values).items()}

    monkeypatch.setattr(verify, "onnx_runtime", saturating)
    with pytest.raises(verify.UndecidedError, match="both graphs agree in float64"):
        _prove(tmp_path, _model(), _model())


def test_signed_pairs_of_new_opsets_load_where_integers_are_exact(tmp_path: Path) -> None:
    """ONNX Runtime's optimiser moves the pair behind the Slice and makes it unsigned, all but an attribute."""
    net = Net(channels=2, opset=21)
    scale, zero = net.constant("scale", np.float32(0.5)), net.constant("zero", np.zeros((), np.int8))
    ends = [net.constant(name, np.array([value])) for name, value in (("from", 0), ("to", 1), ("along", 1))]
    x = net.node("DequantizeLinear", [net.node("QuantizeLinear", ["input", scale, zero], "q"), scale, zero], "dq")
    part = net.node("Slice", [x, *ends], "part")
    net.width["y"] = 1
    choice = [net.constant("true", np.array(True)), part, net.constant("no", np.float32(0))]
    onnx.save(net.model(net.node("Where", choice, "y")), tmp_path / "pairs.onnx")
    values = {"input": np.full((1, 2, 8, 8), 1.3, np.float32)}
    found = runtime.onnx_runtime(tmp_path / "pairs.onnx", exact_integers=True)(values)["y"]
    np.testing.assert_array_equal(found, np.full((1, 1, 8, 8), 1.5, np.float32))


@pytest.mark.parametrize(("opset", "axis"), [(10, None), (13, None), (13, 0), (13, 1), (19, 1)])
def test_float64_judges_what_old_opsets_dequantize(opset: int, axis: int | None) -> None:
    """onnx's reference knows DequantizeLinear since opset 19 only."""
    size = 1 if axis is None else (2, 3)[axis]
    scale, zero = np.arange(1, size + 1) / 8, np.arange(size, dtype=np.int8)
    constants = [
        numpy_helper.from_array(x if axis is not None else x.reshape(()), name)
        for x, name in ((scale, "scale"), (zero, "zero"))
    ]
    attributes = {} if axis is None else {"axis": axis}
    node = helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["y"], **attributes)
    ends = [helper.make_tensor_value_info(name, kind, [2, 3]) for name, kind in (("x", 3), ("y", 11))]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    x = np.array([[-128, 0, 1], [2, 3, 127]], np.int8)
    shape = [(), (2, 1), (1, 3)][0 if axis is None else axis + 1]
    expected = (x - zero.reshape(shape).astype(np.float64)) * scale.reshape(shape)
    found = runtime.reference(model, "")({"x": x})["y"]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float64


def test_double_is_proven_in_onnx_reference() -> None:
    """ONNX Runtime has no Conv in double on a CPU."""
    report = compress(_in(np.float64)).report
    assert (report["verified"], report["runtime"], report["tolerance"]) == (True, "onnx.reference", 1e-12)
    assert report["difference"] <= 1e-12


def test_half_precision_stays_half_precision() -> None:
    surgery = compress(_in(np.float16))
    assert weight(surgery.model, "one").dtype == np.float16
    assert weight(surgery.model, "one").shape[0] == 6
    assert surgery.report["tolerance"] == 5e-3


def test_an_operator_that_no_runtime_has_cannot_be_proven() -> None:
    """It is an error to write such a cut, unless that is asked for."""
    net = Net()
    x = net.gate(net.conv("input", 6, "one"), [1], "gate")
    model = net.model(net.node("Strange", [net.conv(x, 4, "two")], "out", domain="com.example"))
    with pytest.raises(ContentError, match="no runtime") as error:
        compress(model)
    assert "--no-verify" in error.value.todo
    for surgery in (compress(model, verify=False), compress(model, allow_unverified=True)):
        assert weight(surgery.model, "one").shape[0] == 5
        assert surgery.report["verified"] is False
    assert "no runtime" in surgery.report["unverified"]


def test_what_cannot_be_proven_and_was_not_changed_comes_back() -> None:
    net = Net()
    model = net.model(net.node("Strange", ["input"], "out", domain="com.example"))
    surgery = compress(model)
    assert surgery.model == model
    assert surgery.report["verified"] is False
    assert "no runtime" in surgery.report["unverified"]


def test_not_finite_before_is_not_compared() -> None:
    expected = {"y": np.array([1.0, np.nan, np.inf])}
    assert verify.largest_difference(expected, {"y": np.array([1.0, 0, 0])}) == 0
    assert verify.largest_difference(expected, {"y": np.array([np.nan, 0, 0])}) == np.inf
    assert verify.largest_difference({"y": np.array([4.0, 2])}, {"y": np.array([4.0, 1])}) == 0.25


def test_without_onnxruntime_exit_3_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(_model(), source)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MachineError):
        compress(_model())
    assert main([str(source), str(target)]) == 3
    assert "'.[ort]'" in capsys.readouterr().err
    assert not target.exists()
    assert main([str(source), str(target), "--no-verify"]) == 0


def test_inputs_of_other_kinds() -> None:
    values = [
        helper.make_tensor_value_info("s", 1, []),
        helper.make_tensor_value_info("i", 7, ["n", 2]),
        helper.make_tensor_value_info("b", 9, ["n", 2]),
        helper.make_tensor_value_info("r", 7, []),
    ]
    model = helper.make_model(helper.make_graph([], "g", values, []))
    made = inputs.make(model, next(inputs.attempts(model, 3)))
    assert (made["s"].dtype, made["s"].shape) == (np.float32, ())
    assert made["i"].dtype == np.int64
    assert set(np.unique(made["i"])) <= {0, 1}
    assert made["b"].dtype == np.bool_
    assert made["b"].shape == (3, 2)
    assert isinstance(made["r"], np.ndarray)


@pytest.mark.parametrize("kind", [onnx.TensorProto.INT64, onnx.TensorProto.FLOAT])
def test_inputs_that_follow_from_the_shape_of_the_result(kind: int) -> None:
    """The depth of OneHot is the size of the axis that it adds; AffineGrid is told batch, channels, height, width."""
    ends = [helper.make_tensor_value_info("i", 7, ["n", 2]), helper.make_tensor_value_info("depth", kind, [])]
    ends += [helper.make_tensor_value_info("values", 1, [2]), helper.make_tensor_value_info("theta", 1, ["n", 2, 3])]
    ends.append(helper.make_tensor_value_info("size", 7, [4]))
    nodes = [helper.make_node("OneHot", ["i", "depth", "values"], ["hot"], axis=1)]
    nodes.append(helper.make_node("AffineGrid", ["theta", "size"], ["grid"]))
    told = [helper.make_tensor_value_info("hot", 1, ["n", 5, 2])]
    told.append(helper.make_tensor_value_info("grid", 1, ["n", 4, 6, 2]))
    model = helper.make_model(helper.make_graph(nodes, "g", ends, told), opset_imports=[helper.make_opsetid("", 20)])
    made = inputs.make(model, inputs.Attempt({"n": 3}, "role"))
    assert made["depth"] == 5
    assert made["size"].tolist() == [3, 1, 4, 6]


def test_what_no_inputs_are_found_for_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime loads it, so that it is no invalid model; the cut is to be had without a proof."""
    net = Net(size=70)
    bounds = ("first", "last", "axis")
    net.inputs += [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1]) for name in bounds]
    x = net.conv(net.gate(net.conv("input", 6, "one"), [1], "gate"), 6, "middle")
    x = net.node("Slice", [x, *bounds], "part")
    x = net.node("MatMul", [x, net.constant("matrix", np.ones((50, 4), np.float32))], "product")  # 50 of the width
    source, target, report = (tmp_path / name for name in ("in.onnx", "out.onnx", "r.json"))
    net.width[x] = 6
    onnx.save(net.model(net.conv(x, 4, "two", kernel=1)), source)
    assert main([str(source), str(target), "--report", str(report)]) == 0
    assert onnx.load(target) == onnx.load(source)
    told = json.loads(report.read_text())
    assert told["verified"] is False
    assert "no inputs were found" in told["as_it_is"] == told["unverified"]
    assert "no inputs were found" in " ".join(capsys.readouterr().out.split())
    assert main([str(source), str(target), "--allow-unverified"]) == 0
    assert weight(onnx.load(target), "one").shape[0] == 5
