"""Tiny ONNX classifiers, and engines whose times are known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.engines import Array, Timer
from polar_deploy.tensors import Arrays, TensorSpec, count


def classifier(channels: int = 8, classes: int = 4, size: int = 8, *, seed: int = 0) -> onnx.ModelProto:
    """Conv 3x3 - Relu - GlobalAveragePool - Flatten - Gemm on [batch,3,size,size]."""
    rng = np.random.default_rng(seed)
    weights = {
        "conv.weight": rng.normal(size=(channels, 3, 3, 3)),
        "conv.bias": rng.normal(size=channels),
        "fc.weight": rng.normal(size=(classes, channels)),
        "fc.bias": rng.normal(size=classes),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight", "conv.bias"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "fc.weight", "fc.bias"], ["logits"], name="fc", transB=1),
    ]
    return model(nodes, {name: value.astype(np.float32) for name, value in weights.items()}, classes, size)


def model(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], classes: int, size: int, domains: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """A model with `input` [batch,3,size,size] and `logits` [batch,classes]."""
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def two_inputs() -> onnx.ModelProto:
    """image float [B,2,3], row int64 [B] -> picked [B,3]: that row of each image; found bool [B,2]: whose row's sum
    is above 20."""
    nodes = [
        helper.make_node("Unsqueeze", ["row", "last"], ["index"], name="index"),
        helper.make_node("GatherND", ["image", "index"], ["picked"], name="pick", batch_dims=1),
        helper.make_node("ReduceSum", ["image", "two"], ["sums"], name="sum", keepdims=0),
        helper.make_node("Greater", ["sums", "bound"], ["found"], name="compare"),
    ]
    float_, int_, bool_ = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
    graph = helper.make_graph(
        nodes,
        "two",
        [
            helper.make_tensor_value_info("image", float_, ["batch", 2, 3]),
            helper.make_tensor_value_info("row", int_, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("picked", float_, ["batch", 3]),
            helper.make_tensor_value_info("found", bool_, ["batch", 2]),
        ],
        [
            helper.make_tensor("last", int_, [1], [1]),
            helper.make_tensor("two", int_, [1], [2]),
            helper.make_tensor("bound", float_, [], [20.0]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def saved(network: onnx.ModelProto, path: Path) -> Path:
    onnx.save(network, path)
    return path


class TimedEngine:
    """Takes the milliseconds that `times` says; its twins take `twin` times as long, or what `twins` says in turn."""

    inputs: ClassVar = {"input": TensorSpec((3, 8, 8))}
    outputs: ClassVar = {"logits": TensorSpec((2,))}
    batches = (1, None)

    def __init__(self, times: Iterator[float], twins: Iterator[float] | None = None) -> None:
        self.times, self.twins = times, twins
        self.samples: list[int] = []  # inferences of each sample

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        return {"logits": np.zeros((count(inputs), 2), np.float32)}

    def timer(self, inputs: Arrays) -> Timer:
        def milliseconds(inferences: int) -> float:
            self.samples.append(inferences)
            return next(self.times)

        return milliseconds

    def duplicate(self) -> TimedEngine:
        return TimedEngine(self.twins or self.times)

    def conditions(self) -> None:
        return None


class BusyEngine:
    """Really keeps the CPU busy for `loops` rounds of a loop; its twins likewise."""

    inputs: ClassVar = {"input": TensorSpec((3, 8, 8))}
    outputs: ClassVar = {"logits": TensorSpec((2,))}
    batches = (1, None)

    def __init__(self, loops: int) -> None:
        self.loops = loops

    def infer(self, inputs: Arrays) -> dict[str, Array]:
        return {"logits": np.zeros((count(inputs), 2), np.float32)}

    def timer(self, inputs: Arrays) -> Timer:
        def milliseconds(inferences: int) -> float:
            start = time.perf_counter_ns()
            for _ in range(inferences * self.loops):
                pass
            return (time.perf_counter_ns() - start) / inferences / 1e6

        return milliseconds

    def duplicate(self) -> BusyEngine:
        return BusyEngine(self.loops)

    def conditions(self) -> None:
        return None


def noisy(milliseconds: float, seed: int, noise: float = 0.05, burst: float = 0.05) -> Iterator[float]:
    """Times that scatter by `noise`; a share `burst` of them takes two to ten times as long."""
    rng = np.random.default_rng(seed)
    while True:
        slow = rng.uniform(2, 10) if rng.random() < burst else 1.0
        yield milliseconds * slow * float(np.exp(rng.normal(0, noise)))


def steady(milliseconds: float) -> Iterator[float]:
    while True:
        yield milliseconds
