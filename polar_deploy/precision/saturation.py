"""Do a runtime's INT8 kernels overflow on this CPU? x86 without VNNI adds two products of bytes in 16 bits.

Its instruction, VPMADDUBSW, cuts what does not fit off at 32767; two products of 255 and 127 come to 64770. With
weights of 64 at most, 7 bits, all sums fit. ONNX Runtime's documentation ("Quantize ONNX models", on AVX2 and AVX-512
without VNNI) names this `reduce_range`, as PyTorch does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from polar_deploy.precision import graph, qdq
from polar_deploy.precision.proof import Kernels, Reference
from polar_deploy.precision.qdq import Scheme

LARGEST = 64  # 2 · 255 · 64 = 32640
_CHANNELS = 64
_OFF = 0.01  # kernels that overflow are off by half; others by less than one step of 255


@cache  # a latency table builds many networks for one target
def saturates(kernels: Kernels, scheme: Scheme) -> bool:
    """Whether a convolution or a matrix product of the largest bytes comes out too small, here."""
    typed = _largest_bytes(scheme)
    samples = {"x": np.ones((4, _CHANNELS, 2, 2), np.float32)}
    return Reference.of(typed, samples, Path("largest bytes")).error(typed, kernels) > _OFF


def _largest_bytes(scheme: Scheme) -> onnx.ModelProto:
    """A network of both, in which all activations are 255 and all weights 127 or -127."""
    signs = np.where(np.arange(_CHANNELS) % 2, -1, 1).astype(np.float32)
    matrix = np.tile(signs, (_CHANNELS, 1))
    constants = {"kernel": np.ascontiguousarray(matrix.T).reshape(_CHANNELS, _CHANNELS, 1, 1), "matrix": matrix}
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["convolved"], name="conv"),
        helper.make_node("GlobalAveragePool", ["x"], ["mean"], name="mean"),
        helper.make_node("Flatten", ["mean"], ["flat"], name="flat"),
        helper.make_node("MatMul", ["flat", "matrix"], ["product"], name="matmul"),
    ]
    shapes: dict[str, list[str | int]] = {
        "x": ["N", _CHANNELS, 2, 2],
        "convolved": ["N", _CHANNELS, 2, 2],
        "product": ["N", _CHANNELS],
    }
    x, *outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in shapes.items())
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    body = helper.make_graph(nodes, "largest_bytes", [x], outputs, weights)
    model = graph.inferred(helper.make_model(body, opset_imports=[helper.make_opsetid("", scheme.opset)], ir_version=9))
    largest = float(_CHANNELS)
    ranges = {"x": (0.0, 1.0), "convolved": (-largest, largest), "mean": (0.0, 1.0), "flat": (0.0, 1.0)}
    return qdq.quantised(model, model.graph.node, ranges | {"product": (-largest, largest)}, scheme)
