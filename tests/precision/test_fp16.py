"""FP16 in the graph: every layer really has it, casts stand where they must, and the numbers are those of FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.errors import ContentError
from tests.precision import kinds
from tests.precision.kinds import KINDS
from tests.support.residual import constants, difference, element_types, evaluated, images, nodes, residual, written

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
LAYERS = ("stem", "conv1", "conv2", "conv3", "conv4", "shortcut", "fc")


@pytest.mark.parametrize(("io_dtype", "kind"), [("fp32", FLOAT), ("native", HALF)])
def test_layers_are_fp16_and_io_types_as_asked(io_dtype: str, kind: int, tmp_path: Path) -> None:
    typed, said = written(residual(), "rtx-fp16", tmp_path, io_dtype=io_dtype)
    assert said == {"io_dtype": io_dtype, "types": {"fp16": 7}, "high_precision_layers": [], "calibration": None}
    onnx.checker.check_model(typed, full_check=True)
    types = element_types(typed)
    for name in LAYERS:
        assert {types[each] for each in (*nodes(typed)[name].input, *nodes(typed)[name].output)} == {HALF}
    assert (types["input"], types["logits"]) == (kind, kind)
    casts = [node for node in typed.graph.node if node.op_type == "Cast"]
    assert len(casts) == (2 if io_dtype == "fp32" else 0)


def test_names_and_the_dynamic_batch_stay(tmp_path: Path) -> None:
    typed, _ = written(residual(), "rtx-fp16", tmp_path)
    assert nodes(residual()).keys() <= nodes(typed).keys()
    assert constants(typed).keys() == constants(residual()).keys()
    for value in (typed.graph.input[0], typed.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert evaluated(typed, images(3)).shape == (3, 4)


def test_numbers_are_those_of_fp32_to_fp16s_precision(tmp_path: Path) -> None:
    typed, _ = written(residual(), "rtx-fp16", tmp_path)
    apart = difference(evaluated(typed, images(4)), evaluated(residual(), images(4)))
    assert 1e-6 < apart < 5e-3  # 11 bits: 5e-4 a rounding; FP32 would be 1e-7 off


def test_weights_are_rounded_to_nearest(tmp_path: Path) -> None:
    typed, _ = written(residual(), "rtx-fp16", tmp_path)
    for name, value in constants(residual()).items():
        np.testing.assert_array_equal(constants(typed)[name], value.astype(np.float16))


def test_operators_that_want_fp32_get_casts(tmp_path: Path) -> None:
    """Resize's scales are FP32 by definition."""
    network = residual()
    resize = helper.make_node("Resize", ["relu0.out", "", "scales"], ["big"], name="resize", mode="nearest")
    network.graph.node.insert(2, resize)
    nodes(network)["conv1"].input[0] = "big"
    shrink = helper.make_node("AveragePool", ["conv2.out"], ["small"], name="s", kernel_shape=[2, 2], strides=[2, 2])
    network.graph.node.insert(6, shrink)
    nodes(network)["add1"].input[0] = "small"
    network.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    typed, said = written(network, "rtx-fp16", tmp_path)
    assert said["types"] == {"fp16": 7}
    assert element_types(typed)["scales"] == FLOAT
    assert difference(evaluated(typed, images(2)), evaluated(network, images(2))) < 5e-3


def test_constant_nodes_and_casts(tmp_path: Path) -> None:
    network = residual()
    half = helper.make_node("Constant", [], ["half"], name="half", value_float=0.5)
    scale = helper.make_node("Mul", ["relu0.out", "half"], ["scaled"], name="scale")
    there = helper.make_node("Cast", ["scaled"], ["whole"], name="there", to=TensorProto.INT32)
    back = helper.make_node("Cast", ["whole"], ["again"], name="back", to=FLOAT)
    for node in (back, there, scale, half):
        network.graph.node.insert(2, node)
    nodes(network)["conv1"].input[0] = "again"
    typed, said = written(network, "rtx-fp16", tmp_path)
    assert said["types"] == {"fp16": 7}
    assert element_types(typed)["again"] == HALF
    assert difference(evaluated(typed, images(2)), evaluated(network, images(2))) < 0.1  # rounding to whole numbers


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (1e6, r"constant 'conv3\.weight' of node 'conv3' \(operator Conv\) holds .*, and FP16 ends at 65504"),
        (1e-7, r"constant 'conv3\.weight' of node 'conv3' \(operator Conv\) is too small for FP16"),
    ],
)
def test_weights_that_fp16_cannot_hold(factor: float, says: str, tmp_path: Path) -> None:
    network = residual()
    tensor = next(each for each in network.graph.initializer if each.name == "conv3.weight")
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(ContentError, match=says):
        written(network, "rtx-fp16", tmp_path)
    assert not (tmp_path / "typed.onnx").exists()


def test_masks_are_numbers_in_fp16s_own_arithmetic(tmp_path: Path) -> None:
    """ONNX Runtime's CPU kernels, which the proof asks, compute in FP32 in between: there no sum becomes infinite."""
    network, batch = KINDS["attention_with_masks_beyond_fp16"](), kinds.images(2)
    typed, _ = written(network, "rtx-fp16", tmp_path)
    with np.errstate(over="ignore", invalid="raise"):
        assert difference(evaluated(typed, batch), evaluated(network, batch)) < 5e-3


@pytest.mark.parametrize("between", [(), ("Relu",)])
def test_quantities_that_fp16_cannot_hold_are_no_masks(between: tuple[str, ...], tmp_path: Path) -> None:
    """A factor of a million is one, be it added to something at once or not; and so is what is added to round."""
    network = residual()
    network.graph.initializer.append(numpy_helper.from_array(np.float32(1e6), "million"))
    network.graph.node.insert(2, helper.make_node("Mul", ["relu0.out", "million"], ["large"], name="large"))
    for name in between:
        network.graph.node.insert(3, helper.make_node(name, ["large"], ["larger"], name="larger"))
    network.graph.node.insert(
        4, helper.make_node("Add", ["larger" if between else "large", "relu0.out"], ["sum"], name="sum")
    )
    nodes(network)["conv1"].input[0] = "sum"
    with pytest.raises(ContentError):
        written(network, "rtx-fp16", tmp_path, images(4))
    assert not (tmp_path / "typed.onnx").exists()


def test_fp32_stays_as_it_is(tmp_path: Path) -> None:
    typed, said = written(residual(), "ort-fp32", tmp_path)
    assert said == {"io_dtype": "fp32", "types": {"fp32": 7}, "high_precision_layers": [], "calibration": None}
    assert typed == residual()


def test_external_data_moves_into_the_file(tmp_path: Path) -> None:
    from polar_deploy import precision, targets
    from polar_deploy.config import Build

    source, folder = tmp_path / "in" / "a.onnx", tmp_path / "out"
    source.parent.mkdir()
    onnx.save(residual(), source, save_as_external_data=True, location="a.data", size_threshold=0)
    for target in ("ort-fp32", "rtx-fp16"):
        precision.write(source, folder / "b.onnx", targets.parse(target), Build(), None)
        assert [path.name for path in folder.iterdir()] == ["b.onnx"]
        assert difference(evaluated(onnx.load(folder / "b.onnx"), images(1)), evaluated(residual(), images(1))) < 5e-3
