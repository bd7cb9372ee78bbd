#!/usr/bin/env bash
# ONNX has a place for sparse weights, sparse_initializer; of eight tools only ONNX Runtime runs what is there.
#
# Guessed: a pruned layer's weight may be stored as a sparse tensor, as the format has it since IR version 5: what does
#   not know it says so, and onnx's own checker and shape inference do know it.
# Seen: check_model passes the file and full_check refuses it, since shape inference takes the weight for one without
#   axes. onnx-ir drops the weight without a word: what it writes is not valid. onnx's version converter, its
#   reference evaluator and ONNX Runtime's quantize_dynamic refuse the file; OpenVINO and tract do not find the
#   weight. ONNX Runtime runs it.
# Versions: onnx 1.23.2, onnx-ir 1.1.0, onnxruntime 1.32.0, openvino 2026.4.1, tract 0.23.9, numpy 2.4.6, Python 3.11.
# For users of polar_deploy: keep zeros in dense weights: surgery cuts whole filters of zeros out of those. Sparse ones
#   it leaves alone, and names the layer: "its weight is a sparse tensor" (docs/surgery.md). Bundles refuse them.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnx-ir==1.1.0 onnxruntime==1.32.0 openvino==2026.4.1 tract==0.23.9 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging

import numpy as np
import onnx
import onnx.reference
import onnx.version_converter
import onnx_ir
import onnxruntime
import openvino
import tract
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

logging.disable(logging.WARNING)
random = np.random.default_rng(0)
weight = random.normal(size=(32, 16)).astype(np.float32)
weight[np.abs(weight) < 1.3] = 0
places = np.flatnonzero(weight)
sparse = helper.make_sparse_tensor(
    numpy_helper.from_array(weight.ravel()[places], "weight"), numpy_helper.from_array(places, "places"), weight.shape
)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "weight"], ["y"])],
    "pruned",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 16])],
    sparse_initializer=[sparse],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
onnx.save(model, "pruned.onnx")
x = random.normal(size=(2, 32)).astype(np.float32)


def through_onnx_ir():
    written = onnx_ir.to_proto(onnx_ir.from_proto(model))
    print("onnx-ir writes", len(written.graph.sparse_initializer) + len(written.graph.initializer), "weights")
    onnx.checker.check_model(written)


def in_onnx_runtime():
    session = onnxruntime.InferenceSession("pruned.onnx", providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": x})[0], x @ weight, atol=1e-5)


tools = {
    "onnx's checker": lambda: onnx.checker.check_model(model),
    "onnx's checker, full_check": lambda: onnx.checker.check_model(model, full_check=True),
    "onnx's version converter": lambda: onnx.version_converter.convert_version(model, 21),
    "onnx's reference evaluator": lambda: onnx.reference.ReferenceEvaluator(model),
    "onnx-ir, then onnx's checker": through_onnx_ir,
    "ONNX Runtime": in_onnx_runtime,
    "ONNX Runtime's quantize_dynamic": lambda: quantize_dynamic("pruned.onnx", "int8.onnx"),
    "OpenVINO": lambda: openvino.Core().read_model("pruned.onnx"),
    "tract": lambda: tract.onnx().load("pruned.onnx").into_model(),
}
taken = []
for name, tool in tools.items():
    try:
        tool()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"{name} refuses: {type(error).__name__}: {' '.join(lines)[:160]}")
    else:
        print(f"{name} takes it")
        taken.append(name)
assert taken == ["onnx's checker", "ONNX Runtime"]
PY
