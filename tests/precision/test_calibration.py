"""Ranges of tensors: each method on numbers whose range is known beforehand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from polar_deploy.config import Calibration
from polar_deploy.errors import ContentError
from polar_deploy.precision import calibration

PATH = Path("a.onnx")


def doubler() -> onnx.ModelProto:
    """doubled = input + input, on [batch,1,16,16]."""
    edges = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, 16, 16]) for name in ("input", "out")]
    nodes = [helper.make_node("Add", ["input", "input"], ["doubled"]), helper.make_node("Relu", ["doubled"], ["out"])]
    graph = helper.make_graph(nodes, "g", edges[:1], edges[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def ranges(
    values: np.ndarray, method: str, percentile: float = 99.99, required: tuple[str, ...] = ()
) -> dict[str, tuple[float, float]]:
    images = values.astype(np.float32).reshape(-1, 1, 16, 16)
    how = Calibration(method=method, percentile=percentile)
    return calibration.ranges(doubler(), ["input", "doubled"], {"input": images}, how, PATH, required)


UNIFORM = np.random.default_rng(0).uniform(-1, 3, 400 * 256)
NORMAL = np.random.default_rng(0).normal(size=400 * 256)
SPIKED = NORMAL.copy()
SPIKED[12345] = 300  # one outlier: with it as the limit, all others share two of 127 steps


@pytest.mark.parametrize(
    ("values", "method", "percentile", "expected"),
    [
        (UNIFORM, "minmax", 99.0, (UNIFORM.min(), UNIFORM.max())),
        (SPIKED, "minmax", 99.0, (SPIKED.min(), 300)),
        (UNIFORM, "percentile", 90.0, (-1 + 4 * 0.05, 3 - 4 * 0.05)),
        (UNIFORM, "percentile", 100.0, (-1, 3)),
        (NORMAL, "percentile", 95.45, (-2, 2)),
        (np.maximum(NORMAL, 0), "percentile", 95.45, (0, 2)),
    ],
)
def test_known_ranges(values: np.ndarray, method: str, percentile: float, expected: tuple[float, float]) -> None:
    found = ranges(values, method, percentile)
    np.testing.assert_allclose(found["input"], expected, atol=0.03)
    np.testing.assert_allclose(found["doubled"], np.multiply(expected, 2), atol=0.06)


@pytest.mark.parametrize("rectified", [False, True])
def test_entropy_cuts_an_outlier_off_and_little_else(rectified: bool) -> None:
    values = np.maximum(SPIKED, 0) if rectified else SPIKED
    low, high = ranges(values, "entropy")["input"]
    assert 3 < high < 40  # the histogram's bins are 300 / 2048 wide, 128 of them are the least that is kept
    assert low == (0 if rectified else pytest.approx(SPIKED.min(), abs=1e-6))
    unspiked = np.maximum(NORMAL, 0) if rectified else NORMAL
    assert 3 < ranges(unspiked, "entropy")["input"][1] <= unspiked.max() * 1.001


def test_extremes_of_all_batches_count() -> None:
    """More images than are held at once, the extremes in the first and in the last one."""
    values = np.zeros(3000 * 256)
    values[0], values[-1] = -7, 5
    found = ranges(values, "minmax")
    assert found == {"input": (-7, 5), "doubled": (-14, 10)}


def test_constant_tensor_has_a_range() -> None:
    for method in ("minmax", "percentile", "entropy"):
        low, high = ranges(np.zeros(256), method)["input"]
        assert (low, high) == (0, 0)


def test_overflow_inside_names_tensor_and_node() -> None:
    with pytest.raises(
        ContentError, match=r"a\.onnx: tensor 'doubled' of node 'doubled' \(operator Add\) is NaN or inf"
    ):
        ranges(np.full(256, 3e38), "minmax", required=("doubled",))


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_what_overflows_and_is_not_required_has_no_range(method: str) -> None:
    assert list(ranges(np.full(256, 3e38), method, required=("input",))) == ["input"]
