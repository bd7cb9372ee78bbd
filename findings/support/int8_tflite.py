"""INT8 networks as .tflite files, written with LiteRT's own schema, and what vela says that they cost."""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

SCALE, WEIGHT_SCALE = 0.05, 0.002  # of all activations, and of all weights
OPTIONS = {"CONV_2D": "Conv2D", "DEPTHWISE_CONV_2D": "DepthwiseConv2D", "FULLY_CONNECTED": "FullyConnected"}
OPTIONS |= {"ADD": "Add", "MUL": "Mul", "QUANTIZE": "Quantize", "MAX_POOL_2D": "Pool2D"}
OPTIONS |= {"CONCATENATION": "Concatenation"}
VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "ADD": 2, "MUL": 2, "QUANTIZE": 1}
VERSIONS |= {"MAX_POOL_2D": 2, "CONCATENATION": 2}


class Network:
    """A network of one input; a method adds a layer and returns the tensor that it makes (NHWC)."""

    def __init__(self, seed=0):
        self._random = np.random.default_rng(seed)
        self._model, self._graph = schema.ModelT(), schema.SubGraphT()
        self._model.version, self._model.operatorCodes = 3, []
        self._model.buffers, self._model.subgraphs = [schema.BufferT()], [self._graph]
        self._graph.tensors, self._graph.operators = [], []

    def input(self, size, channels):
        return self._tensor([1, size, size, channels])

    def vector(self, channels):
        return self._tensor([1, channels])

    def floats(self, channels):
        return self._tensor([1, channels], kind="FLOAT32", scale=None)

    def conv(self, x, channels, kernel=3, stride=1):
        *_, size, _, width = self._graph.tensors[x].shape
        weight, size = self._weight([channels, kernel, kernel, width], channels), -(-size // stride)
        settings = {**_STRIDES, "strideW": stride, "strideH": stride}
        return self._layer("CONV_2D", [x, weight, self._bias(channels)], [1, size, size, channels], **settings)

    def pool(self, x, kernel, stride):
        """The largest of kernel x kernel pixels."""
        *_, size, _, channels = self._graph.tensors[x].shape
        settings = {"filterWidth": kernel, "filterHeight": kernel, "strideW": stride, "strideH": stride, "padding": 0}
        size = -(-size // stride)
        return self._layer("MAX_POOL_2D", [x], [1, size, size, channels], **settings)

    def pad(self, x, before, after):
        """Channels of zeros before and after those of x."""
        *_, size, _, channels = self._graph.tensors[x].shape
        parts = [(before, None), (channels, x), (after, None)]
        zeros = [
            self._tensor([1, size, size, width], np.zeros([1, size, size, width], np.int8)) if part is None else part
            for width, part in parts
            if width
        ]
        return self._layer("CONCATENATION", zeros, [1, size, size, before + channels + after], axis=3)

    def depthwise(self, x, kernel=3):
        shape = self._graph.tensors[x].shape
        weight = self._weight([1, kernel, kernel, shape[-1]], shape[-1], axis=3)
        inputs = [x, weight, self._bias(shape[-1])]
        return self._layer("DEPTHWISE_CONV_2D", inputs, shape, depthMultiplier=1, **_STRIDES)

    def dense(self, x, weight):
        """weight: int8 [outputs, inputs]."""
        inputs = [x, self._tensor(weight.shape, weight, scale=[WEIGHT_SCALE]), self._bias(len(weight), scales=1)]
        return self._layer("FULLY_CONNECTED", inputs, [1, len(weight)])

    def add(self, left, right):
        return self._layer("ADD", [left, right], self._graph.tensors[left].shape)

    def gate(self, x, mask):
        """Multiply the channels by a constant; mask: int8 [channels]."""
        shape = self._graph.tensors[x].shape
        return self._layer("MUL", [x, self._tensor([1, 1, 1, shape[-1]], mask, scale=[1.0])], shape)

    def quantize(self, x):
        """To int8 in steps of 1."""
        return self._layer("QUANTIZE", [x], self._graph.tensors[x].shape, scale=1.0)

    def save(self, path, output):
        """Write the file, and run it once in LiteRT: it is a valid one."""
        self._graph.inputs, self._graph.outputs = [0], [output]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        Path(path).write_bytes(bytes(builder.Output()))
        interpreter = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
        interpreter.allocate_tensors()
        interpreter.invoke()

    def _weight(self, shape, channels, axis=0):
        values = np.clip(25 * self._random.normal(size=shape), -127, 127).astype(np.int8)
        return self._tensor(shape, values, scale=[WEIGHT_SCALE] * channels, axis=axis)

    def _bias(self, channels, scales=None):
        scale = [SCALE * WEIGHT_SCALE] * (scales or channels)
        return self._tensor([channels], np.zeros(channels, np.int32), kind="INT32", scale=scale)

    def _tensor(self, shape, values=None, kind="INT8", scale=(SCALE,), axis=0):
        tensor = schema.TensorT()
        tensor.name, tensor.shape = f"tensor{len(self._graph.tensors)}", list(shape)
        tensor.type, tensor.buffer = getattr(schema.TensorType, kind), 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            self._model.buffers.append(buffer)
            tensor.buffer = len(self._model.buffers) - 1
        if scale is not None:
            steps = schema.QuantizationParametersT()
            steps.scale, steps.zeroPoint = np.array(scale, np.float32), np.zeros(len(scale), np.int64)
            steps.quantizedDimension = axis
            tensor.quantization = steps
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _layer(self, operator, inputs, shape, scale=SCALE, **settings):
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, operator)
        code.version = VERSIONS[operator]
        self._model.operatorCodes.append(code)
        layer, kind = schema.OperatorT(), f"{OPTIONS[operator]}Options"
        layer.opcodeIndex, layer.inputs = len(self._model.operatorCodes) - 1, inputs
        layer.outputs = [self._tensor(shape, scale=[scale])]
        layer.builtinOptions = getattr(schema, f"{kind}T")()
        layer.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        for name, value in settings.items():
            setattr(layer.builtinOptions, name, value)
        self._graph.operators.append(layer)
        return layer.outputs[0]


_STRIDES = {"strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1, "padding": 0}  # padding 0: SAME


def cycles(path, accelerator):
    """vela's estimate of all cycles of an inference."""
    vela = Path(sys.executable).with_name("vela")
    with tempfile.TemporaryDirectory() as folder:
        command = [vela, path, "--accelerator-config", accelerator, "--output-dir", folder]
        subprocess.run(command, check=True, capture_output=True)
        (summary,) = Path(folder).glob("*summary*.csv")
        with summary.open() as file:
            return float(next(csv.DictReader(file))["cycles_total"])
