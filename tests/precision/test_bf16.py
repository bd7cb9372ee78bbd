"""BF16 in the graph: exact rounding, casts only where an operator has no BF16, and the numbers of a real evaluation."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from polar_deploy.errors import ContentError
from polar_deploy.precision import bf16, graph
from tests.support.classifiers import classifier, model, saved

FLOAT, BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16


def converted(network: onnx.ModelProto, folder: Path, *, keep_io_types: bool = True) -> onnx.ModelProto:
    path = saved(network, folder / "a.onnx")
    result, _ = bf16.to_bf16(graph.load(path), path, None, keep_io_types=keep_io_types)
    onnx.checker.check_model(result, full_check=True)
    return result


def operators(network: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in network.graph.node]


def kinds(network: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, as ONNX's own inference has it."""
    network = onnx.shape_inference.infer_shapes(network)
    values = (*network.graph.input, *network.graph.value_info, *network.graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in network.graph.initializer}


def between(*nodes: onnx.NodeProto, **constants: np.ndarray) -> onnx.ModelProto:
    """The classifier with `nodes`, which read "r" and write "x", between its Relu and its pooling."""
    network = classifier()
    network.graph.node[2].input[0] = "x"
    for node in reversed(nodes):
        network.graph.node.insert(2, node)
    network.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return network


# --------------------------------------------------------------------------- rounding

ROUNDED = [  # FP32 bits, BF16 bits: IEEE 754, nearest, ties to even
    (0x3F800000, 0x3F80),  # 1
    (0x3F808000, 0x3F80),  # a tie: down to even
    (0x3F818000, 0x3F82),  # a tie: up to even
    (0x3F808001, 0x3F81),  # just above a tie
    (0x3F817FFF, 0x3F81),  # just below one
    (0xBF808001, 0xBF81),
    (0x3FFFFFFF, 0x4000),  # carries into the exponent
    (0x00008000, 0x0000),  # subnormal tie
    (0x00018000, 0x0002),
    (0x80000000, 0x8000),  # -0
    (0x7F7FFFFF, 0x7F7F),  # FP32's largest: stays finite
    (0xFF7FFFFF, 0xFF7F),
    (0x7F800000, 0x7F80),  # infinity stays
    (0xFF800000, 0xFF80),
    (0x7F800001, 0x7FC0),  # a NaN whose upper half would be infinity
    (0xFFFFFFFF, 0xFFFF),  # a NaN that would overflow
]


def constant_after(values: np.ndarray, folder: Path) -> np.ndarray:
    """What `converted` makes of a constant: BF16 bits."""
    network = between(helper.make_node("Add", ["r", "k"], ["x"], name="add"), k=values)
    stored = next(t for t in converted(network, folder).graph.initializer if t.name == "k")
    assert stored.data_type == BF16
    return np.frombuffer(stored.raw_data, "<u2")


def test_rounds_to_nearest_even(tmp_path: Path) -> None:
    wide, narrow = (np.array(column, kind) for column, kind in zip(zip(*ROUNDED, strict=True), "IH", strict=True))
    values = wide.view(np.float32).reshape(len(ROUNDED), 1, 1, 1)
    for value, expected in zip(values, narrow, strict=True):
        assert constant_after(value[None], tmp_path)[0] == expected, f"{value.view(np.uint32)}"


def test_rounds_as_ml_dtypes_does(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F000000, 8 * 64, dtype=np.uint32)
    values = bits.view(np.float32).reshape(1, 8, 8, 8)
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16).ravel()
    np.testing.assert_array_equal(constant_after(values, tmp_path), expected)


# --------------------------------------------------------------------------- types


def test_every_float_is_bf16_between_the_edges(tmp_path: Path) -> None:
    result = converted(classifier(), tmp_path)
    found = kinds(result)
    assert found.pop("input") == FLOAT
    assert found.pop("logits") == FLOAT
    assert set(found.values()) == {BF16}
    assert operators(result) == ["Cast", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm", "Cast"]


def test_native_edges_need_no_cast(tmp_path: Path) -> None:
    result = converted(classifier(), tmp_path, keep_io_types=False)
    assert set(kinds(result).values()) == {BF16}
    assert operators(result) == operators(classifier())
    assert [value.name for value in (*result.graph.input, *result.graph.output)] == ["input", "logits"]


def test_names_and_the_dynamic_batch_stay(tmp_path: Path) -> None:
    result = converted(classifier(), tmp_path)
    assert [node.name for node in result.graph.node][1:-1] == [node.name for node in classifier().graph.node]
    batches = [
        value.type.tensor_type.shape.dim[0].dim_param for value in (result.graph.input[0], result.graph.output[0])
    ]
    assert batches == ["batch", "batch"]


def test_opset_has_bf16_for_conv(tmp_path: Path) -> None:
    """ONNX's schema, and not what the converter thinks of it."""
    version = converted(classifier(), tmp_path).opset_import[0].version
    assert "tensor(bfloat16)" in onnx.defs.get_schema("Conv", version).inputs[0].types


@pytest.mark.parametrize(
    ("nodes", "constants", "casts", "fp32"),
    [
        # ONNX gives no BF16 to Celu and Shrink: FP32 between two casts
        ([("Celu", ["r"], ["x"])], {}, 2, {"r/fp32", "x/made"}),
        # twice the same tensor: cast once
        (
            [("Celu", ["r"], ["y"]), ("Shrink", ["r"], ["z"]), ("Add", ["y", "z"], ["x"])],
            {},
            3,
            {"r/fp32", "y/made", "z/made"},
        ),
        # Resize reads BF16, but its scales are FP32 in every opset: exact, and no cast
        ([("Resize", ["r", "", "scales"], ["x"])], {"scales": np.array([1, 1, 1.1, 1.1], np.float32)}, 0, {"scales"}),
        # a constant that one wants in FP32 and another in BF16: the exact one is a copy
        (
            [("Celu", ["k"], ["y"]), ("Add", ["r", "k"], ["z"]), ("Add", ["y", "z"], ["x"])],
            {"k": np.full((1, 8, 8, 8), 1.001, np.float32)},
            1,
            {"k/fp32", "y/made"},
        ),
        ([("Cast", ["r"], ["i"], {"to": TensorProto.INT32}), ("Cast", ["i"], ["x"], {"to": FLOAT})], {}, 0, set()),
        (
            [("Shape", ["r"], ["s"]), ("ConstantOfShape", ["s"], ["zero"]), ("Add", ["r", "zero"], ["x"])],
            {},
            0,
            set(),
        ),
        ([("Clip", ["r", "zero", "six"], ["x"])], {"zero": np.float32(0), "six": np.float32(6)}, 0, set()),
        (
            [("Concat", ["r", "r"], ["y"], {"axis": 2}), ("MaxPool", ["y"], ["x"], {"kernel_shape": [2, 1]})],
            {},
            0,
            set(),
        ),
    ],
)
@pytest.mark.filterwarnings("error:overflow")
def test_casts_stand_where_an_operator_has_no_bf16(
    nodes: list[tuple], constants: dict[str, np.ndarray], casts: int, fp32: set[str], tmp_path: Path
) -> None:
    made = [
        helper.make_node(node[0], node[1], node[2], name=f"n{index}", **(node[3] if len(node) > 3 else {}))
        for index, node in enumerate(nodes)
    ]
    network = between(*made, **constants)
    before = operators(network).count("Cast")
    result = converted(network, tmp_path)
    assert operators(result).count("Cast") - before - 2 == casts  # at the input and the output
    assert {name for name, kind in kinds(result).items() if kind == FLOAT} == fp32 | {"input", "logits"}
    for tensor in result.graph.initializer:
        if tensor.data_type == FLOAT:
            original = constants[tensor.name.removesuffix("/fp32")]
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), original)
    run(result)


def test_control_flow_is_refused(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["r"], ["y"])], "body", [], [helper.make_tensor_value_info("y", FLOAT, None)]
    )
    choice = helper.make_node("If", ["flag"], ["x"], name="choice", then_branch=body, else_branch=body)
    with pytest.raises(ContentError, match=r"a\.onnx: node 'choice' \(operator If\) has a body"):
        converted(between(choice, flag=np.array(True)), tmp_path)


# --------------------------------------------------------------------------- numbers


def run(network: onnx.ModelProto, images: int = 3) -> np.ndarray:
    values = np.random.default_rng(1).normal(size=(images, 3, 8, 8)).astype(np.float32)
    (logits,) = ReferenceEvaluator(network).run(None, {"input": values})
    return np.asarray(logits, np.float64)


def test_logits_are_those_of_fp32_to_bf16s_precision(tmp_path: Path) -> None:
    exact, found = run(classifier()), run(converted(classifier(), tmp_path))
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 2e-2  # BF16 has 8 bits, 0.2 % a rounding; and not the same numbers by chance


def test_residual_network(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {"a": rng.normal(size=(8, 3, 3, 3)), "b": rng.normal(size=(8, 8, 3, 3)) / 9, "w": rng.normal(size=(8, 5))}
    nodes = [
        helper.make_node("Conv", ["input", "a"], ["c1"], name="c1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "b"], ["c2"], name="c2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r1"], ["s"], name="s"),
        helper.make_node("GlobalAveragePool", ["s"], ["p"], name="p"),
        helper.make_node("Flatten", ["p"], ["f"], name="f"),
        helper.make_node("MatMul", ["f", "w"], ["logits"], name="m"),
    ]
    network = model(nodes, {name: value.astype(np.float32) for name, value in weights.items()}, 5, 8)
    result = converted(network, tmp_path)
    assert {name for name, kind in kinds(result).items() if kind == FLOAT} == {"input", "logits"}
    exact, found = run(network), run(result)
    assert np.abs(found - exact).max() / np.abs(exact).max() < 3e-2


def test_tensors_with_the_names_of_casts_stay_what_they_are(tmp_path: Path) -> None:
    """Celu knows no BF16, so that casts stand around it; two constants and a node have their names already."""
    ones, twos = np.ones((1, 3, 8, 8), np.float32), np.full((1, 3, 8, 8), 2, np.float32)
    nodes = [
        helper.make_node("Add", ["input", "input/bf16"], ["a"], name="a/fp32/cast"),
        helper.make_node("Celu", ["a"], ["e"], name="celu"),
        helper.make_node("Mul", ["e", "a/fp32"], ["m"], name="mul"),
        helper.make_node("ReduceSum", ["m", "axes"], ["logits"], name="sum", keepdims=0),
    ]
    constants = {"input/bf16": ones, "a/fp32": twos, "axes": np.array([2, 3])}
    network = model(nodes, constants, 3, 8)
    batch = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    exact, found = (
        ReferenceEvaluator(each).run(None, {"input": batch})[0] for each in (network, converted(network, tmp_path))
    )
    np.testing.assert_allclose(found, exact, rtol=0.03, atol=0.5)
