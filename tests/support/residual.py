"""A residual classifier with all that the precisions treat apart, and what its graph says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from polar_deploy import engines, precision, targets
from polar_deploy.config import Build
from tests.support.classifiers import model, saved

SIZE, CLASSES = 8, 4


def residual(seed: int = 0) -> onnx.ModelProto:
    """[batch,3,8,8]: stem; a block with an identity shortcut; one with a convolution there; pooling; Gemm."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}

    def conv(name: str, source: str, into: int, out: int, size: int = 3, stride: int = 1) -> str:
        weights[f"{name}.weight"] = rng.normal(0, 1 / np.sqrt(into * size * size), (out, into, size, size))
        weights[f"{name}.bias"] = rng.normal(0, 0.1, out)
        pads, strides = [size // 2] * 4, [stride] * 2
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"{name}.out"], name=name, pads=pads, strides=strides))
        return f"{name}.out"

    def relu(name: str, source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{name}.out"], name=name))
        return f"{name}.out"

    def add(name: str, *sources: str) -> str:
        nodes.append(helper.make_node("Add", sources, [f"{name}.out"], name=name))
        return f"{name}.out"

    x = relu("relu0", conv("stem", "input", 3, 8))
    y = conv("conv2", relu("relu1", conv("conv1", x, 8, 8)), 8, 8)
    x = relu("relu2", add("add1", y, x))
    y = conv("conv4", relu("relu3", conv("conv3", x, 8, 16, stride=2)), 16, 16)
    x = relu("relu4", add("add2", y, conv("shortcut", x, 8, 16, 1, stride=2)))
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pool.out"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pool.out"], ["flat"], name="flatten"))
    weights["fc.weight"], weights["fc.bias"] = rng.normal(size=(CLASSES, 16)), rng.normal(size=CLASSES)
    nodes.append(helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], name="fc", transB=1))
    return model(nodes, {name: value.astype(np.float32) for name, value in weights.items()}, CLASSES, SIZE)


def images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


def written(
    network: onnx.ModelProto, target: str, folder: Path, batch: np.ndarray | None = None, /, **options: Any
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """What `precision.write` makes of a network, calibrated on a batch of its one input, and what it says of it."""
    source = saved(network, folder / "source.onnx")
    kernels = engines.kernels(targets.parse(target))
    samples = None if batch is None else {network.graph.input[0].name: batch}
    said = precision.write(source, folder / "typed.onnx", targets.parse(target), Build(**options), samples, kernels)
    return onnx.load(folder / "typed.onnx"), said.as_json()


def evaluated(network: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    """Logits by ONNX's own evaluator, which computes in the types that the graph has."""
    kind = helper.tensor_dtype_to_np_dtype(network.graph.input[0].type.tensor_type.elem_type)
    return ReferenceEvaluator(network).run(None, {"input": batch.astype(kind)})[0].astype(np.float64)


def run(network: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    """Logits by ONNX Runtime, which computes pairs in integers where it can fuse them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": batch})[0].astype(np.float64)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def constants(network: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}


def nodes(network: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in network.graph.node}


def element_types(network: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, by ONNX's own inference."""
    inferred = onnx.shape_inference.infer_shapes(network, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def behind(network: onnx.ModelProto, name: str) -> list[str | None]:
    """What makes each input of a node: "DequantizeLinear" for a rounded one, None for a constant or the graph's."""
    made = {output: node.op_type for node in network.graph.node for output in node.output}
    return [made.get(each) for each in nodes(network)[name].input]
