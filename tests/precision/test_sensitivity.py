"""The error of one layer alone: held against rounding by hand, and against what the whole network loses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from polar_deploy.precision import proof, sensitivity
from polar_deploy.precision.proof import Reference
from tests.support.classifiers import model
from tests.support.residual import SIZE, images, residual, run, written

MINMAX = {"calibration": {"method": "minmax"}, "max_layer_error": 10}
PATH = Path("a.onnx")


def test_error_of_a_layer_is_that_of_rounding_by_hand(tmp_path: Path) -> None:
    """The only layer of a network: 8 bits for what it reads, and 7 with a sign for its weights, a scale a row."""
    batch = images(proof.SAMPLES)
    weight = np.random.default_rng(0).normal(size=(4, 3 * SIZE * SIZE)).astype(np.float32)
    flatten = helper.make_node("Flatten", ["input"], ["flat"], name="flatten")
    gemm = helper.make_node("Gemm", ["flat", "weight"], ["logits"], name="fc", transB=1)
    network = model([flatten, gemm], {"weight": weight}, 4, SIZE)

    flat, step = batch.reshape(len(batch), -1), (batch.max() - batch.min()) / 255
    rows = np.abs(weight).max(axis=1, keepdims=True) / 64
    exact = flat @ weight.T
    found = (np.round(flat / step) * step) @ (np.round(weight / rows) * rows).T
    exact, found = (each - each.mean(axis=1, keepdims=True) for each in (exact, found))
    expected = np.linalg.norm(found - exact) / np.linalg.norm(exact)

    typed, _ = written(network, "ort-int8", tmp_path, batch, reduce_range=True, **MINMAX)
    reference = Reference.of(network, {"input": batch}, PATH)
    assert sensitivity.errors(network, typed, reference) == {"fc": pytest.approx(expected, rel=0.02)}


def test_what_a_convolution_writes_counts_as_well_where_no_layer_reads_it(tmp_path: Path) -> None:
    """By hand: 8 bits for what it reads and what it writes, 7 with a sign for its weights, a scale a channel."""
    batch = images(proof.SAMPLES)
    weight = (np.random.default_rng(0).normal(size=(4, 3)) * [[30], [1], [1], [1]]).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["convolved"], name="conv"),
        helper.make_node("Tanh", ["convolved"], ["bent"], name="tanh"),
        helper.make_node("ReduceMean", ["bent", "axes"], ["logits"], name="mean", keepdims=0),
    ]
    network = model(nodes, {"weight": weight[:, :, None, None], "axes": np.array([2, 3])}, 4, SIZE)

    def convolved(samples: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.einsum("nchw,oc->nohw", samples, weights)

    def stepped(values: np.ndarray, like: np.ndarray) -> np.ndarray:
        step = (like.max() - like.min()) / 255
        zero = np.round(-like.min() / step)
        return (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step

    def off(found: np.ndarray) -> float:
        logits, exact = (np.tanh(each).mean(axis=(2, 3)) for each in (found, convolved(batch, weight)))
        logits, exact = (each - each.mean(axis=1, keepdims=True) for each in (logits, exact))
        return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))

    rows = np.abs(weight).max(axis=1, keepdims=True) / 64
    read = convolved(stepped(batch, batch), np.round(weight / rows) * rows)
    whole = off(stepped(read, convolved(batch, weight)))
    typed, _ = written(network, "ort-int8", tmp_path, batch, reduce_range=True, **MINMAX)
    found = sensitivity.errors(network, typed, Reference.of(network, {"input": batch}, PATH))
    assert found == {"conv": pytest.approx(whole, rel=0.02)}
    assert abs(off(read) / whole - 1) > 0.1


def test_errors_of_single_layers_add_up_to_that_of_the_network(tmp_path: Path) -> None:
    """As squares do, nearly: roundings are independent."""
    network, batch = residual(), images(proof.SAMPLES)
    typed, _ = written(network, "ort-int8", tmp_path, batch, **MINMAX)
    errors = sensitivity.errors(network, typed, Reference.of(network, {"input": batch}, PATH))
    assert {"stem", "conv1", "conv2", "add1", "shortcut", "fc"} < errors.keys()
    assert not {"relu1", "flatten"} & errors.keys()  # they compute with nothing
    whole = proof.relative_error(run(typed, batch), run(network, batch))
    assert 0.5 < np.sqrt(sum(error**2 for error in errors.values())) / whole < 2


def test_a_sum_of_a_tensor_with_itself_is_looked_at(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 3 * SIZE * SIZE)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "weight"], ["row"], name="fc", transB=1),
        helper.make_node("Add", ["row", "row"], ["twice"], name="add"),
        helper.make_node("Gemm", ["twice", "last"], ["logits"], name="last", transB=1),
    ]
    network, batch = (
        model(nodes, {"weight": weight, "last": np.eye(4, dtype=np.float32)}, 4, SIZE),
        images(proof.SAMPLES),
    )
    typed, _ = written(network, "ort-int8", tmp_path, batch, **MINMAX)
    errors = sensitivity.errors(network, typed, Reference.of(network, {"input": batch}, PATH))
    assert errors.keys() == {"fc", "add", "last"}
    assert 0 < errors["add"] < 0.02


def test_alone_only_that_layer_reads_rounded_numbers(tmp_path: Path) -> None:
    network = residual()
    typed, _ = written(network, "ort-int8", tmp_path, images(4), **MINMAX)
    before = network.SerializeToString()
    layer = next(node for node in typed.graph.node if node.name == "conv2")
    alone = sensitivity.alone(network, typed, layer)
    onnx.checker.check_model(alone, full_check=True)
    rounded = {name for node in alone.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    readers = [node.name for node in alone.graph.node if rounded.intersection(node.input)]
    assert readers == ["conv2"]
    assert network.SerializeToString() == before


@pytest.mark.parametrize(
    ("logits", "exact", "error"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], 0),
        ([[6, 7, 8]], [[1, 2, 3]], 0),  # softmax sees no constant
        ([[1, -1], [0, 0]], [[1, -1], [1, -1]], np.sqrt(1 / 2)),
        ([[3.0]], [[2.0]], 0.5),  # one logit has no mean to take off
        ([[0, 0]], [[0, 0]], 0),
    ],
)
def test_relative_error(logits: list[list[float]], exact: list[list[float]], error: float) -> None:
    found = proof.relative_error(np.array(logits, np.float64), np.array(exact, np.float64))
    assert found == pytest.approx(error)
