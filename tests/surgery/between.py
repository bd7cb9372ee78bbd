"""Graphs with something between two layers, and what is left of the first layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tests.surgery.graphs import CLOSED, TOLERANCE, Net, names, weight

Build = Callable[[Net, str], str]


def between(
    build: Build, *, width: int = 6, closed: Sequence[int] = CLOSED, opset: int = 17, size: int = 8, kernel: int = 1
) -> onnx.ModelProto:
    """Conv `one`, a gate that closes `closed`, what `build` makes of that, Conv `two`."""
    net = Net(opset=opset, size=size)
    x = build(net, net.gate(net.conv("input", width, "one"), closed, "gate"))
    return net.model(net.conv(x, 4, "two", kernel=kernel))


def node(net: Net, operator: str, x: str, name: str, width: int, *extra: object, **attributes: object) -> str:
    """A node with constant inputs behind the first (None: absent), whose result has `width` channels."""
    inputs = [
        "" if values is None else net.constant(f"{name}.{i}", np.asarray(values)) for i, values in enumerate(extra)
    ]
    net.node(operator, [x, *inputs], name, **attributes)
    net.width[name] = width
    return name


def remains(before: onnx.ModelProto, after: onnx.ModelProto, layer: str = "one") -> list[int]:
    """Which filters of a layer are left, by their numbers before; -1 for one that was made zero and keeps its place."""
    if layer not in names(after):
        return []
    old, new = weight(before, layer), weight(after, layer)
    return [
        next((i for i, row in enumerate(old) if np.array_equal(row, kept)), -1) if np.any(kept) else -1 for kept in new
    ]


def constant_input(model: onnx.ModelProto, name: str = "tested", index: int = 1) -> Any:
    """What a node is told by a constant input, in lists."""
    return weight(model, name, index).tolist()


def with_free_size(model: onnx.ModelProto) -> onnx.ModelProto:
    """Height and width of the input become dynamic."""
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return model


def assert_same_at(before: onnx.ModelProto, after: onnx.ModelProto, *shape: int) -> None:
    """Both compute the same for an input of that shape."""
    data = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    results = []
    for model in (before, after):
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"input": data})[0])
    assert results[0].shape == results[1].shape
    assert float(np.abs(results[0] - results[1]).max()) <= TOLERANCE * float(np.abs(results[0]).max())
