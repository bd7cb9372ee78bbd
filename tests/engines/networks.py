"""Tiny ONNX classifiers, and engines whose times are known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.engines import Array, Timer


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


def saved(network: onnx.ModelProto, path: Path) -> Path:
    onnx.save(network, path)
    return path


class TimedEngine:
    """Takes the milliseconds that `times` says; its twins take `twin` times as long, or what `twins` says in turn."""

    input_shape = (3, 8, 8)
    batches = (1, None)

    def __init__(self, times: Iterator[float], twins: Iterator[float] | None = None) -> None:
        self.times, self.twins = times, twins
        self.samples: list[int] = []  # inferences of each sample

    def infer(self, images: Array) -> Array:
        return np.zeros((len(images), 2), np.float32)

    def timer(self, images: Array) -> Timer:
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

    input_shape = (3, 8, 8)
    batches = (1, None)

    def __init__(self, loops: int) -> None:
        self.loops = loops

    def infer(self, images: Array) -> Array:
        return np.zeros((len(images), 2), np.float32)

    def timer(self, images: Array) -> Timer:
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
