"""Running a graph as it stands: in ONNX Runtime, or in onnx's reference where ONNX Runtime has no such operator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy import extras
from polar_deploy.errors import ContentError, OutOfMemoryError, first_line
from polar_deploy.ort_session import Level, open_session, session_options, translated
from polar_deploy.surgery.inputs import Value, Values
from polar_deploy.surgery.validation import opset_of

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from onnx.reference.op_run import OpRun

Run = Callable[[Values], Values]
Array = npt.NDArray[Any]
DEQUANTIZE = 19  # the opset since which onnx's reference knows DequantizeLinear
NOT_RUN = "pass --no-verify to write the cut graph without the proof"
BITS = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float4_e2m1fn": 4}  # of types with several numbers a byte
NATIVE = "biufOSU"  # kinds of numpy's own types; ONNX Runtime takes others as bytes only


def onnx_runtime(path: Path, *, exact_integers: bool = False) -> Run:
    """Runs the model in `path` in ONNX Runtime, as it stands.

    Args:
        exact_integers: optimise the graph, which takes kernels that do not overflow on x86 CPUs without VNNI, for all
            but QLinearMatMul, which has none (ONNX Runtime 1.32). Others there add products in pairs and cut off what
            does not fit into 16 bits; a cut graph has other pairs.

    Raises:
        MachineError: it is not installed.
        BeyondRuntimeError: it cannot run this graph.
        ContentError: it finds the graph invalid; when run, that these inputs do not fit.
        OutOfMemoryError: it got no memory for it.
    """
    level: Level = "all" if exact_integers else "none"
    todo = f"install it, {extras.install('ort')}, or pass --no-verify"
    options = session_options(threads=1, level=level, todo=todo)
    if exact_integers:
        options.add_session_config_entry("session.x64quantprecision", "1")
        # It makes graphs invalid that have signed pairs of opset 21 or later (ONNX Runtime 1.32).
        options.add_session_config_entry("optimization.disable_specified_optimizers", "QDQS8ToU8Transformer")
    with translated("ONNX Runtime refuses the graph", NOT_RUN):
        session = open_session(path, options)
    names = [value.name for value in session.get_outputs()]
    taken = {value.name for value in session.get_inputs()}
    is_native = not any(name in value.type for value in session.get_outputs() for name in ("bfloat16", "float8", *BITS))

    def run(inputs: Values) -> Values:
        given = {name: value for name, value in inputs.items() if name in taken}
        with translated("ONNX Runtime cannot run the graph", NOT_RUN):
            if is_native and all(_is_native(value) for value in given.values()):
                return dict(zip(names, session.run(names, given), strict=True))
            values = session.run_with_ort_values(names, {name: _to_ort(value) for name, value in given.items()})
            return dict(zip(names, map(_from_ort, values), strict=True))

    return run


def reference(model: onnx.ModelProto, reason: str) -> Run:
    """Runs `model` in onnx's reference implementation. `reason`: why not in another runtime.

    Raises:
        ContentError: it cannot run this graph; when run, that these inputs do not fit.
    """
    from onnx.reference import ReferenceEvaluator

    names = [value.name for value in model.graph.output]
    try:
        evaluator = ReferenceEvaluator(model, new_ops=_lacking(opset_of(model)))
    except Exception as error:  # the reference has no common class for its errors
        raise ContentError(f"no runtime takes the graph: {reason}", NOT_RUN) from error

    def run(inputs: Values) -> Values:
        try:
            results = evaluator.run(names, inputs)
        except MemoryError as error:
            raise OutOfMemoryError(f"onnx's reference cannot run the graph: {first_line(error)}", NOT_RUN) from error
        except ContentError:  # a limit was reached
            raise
        except Exception as error:
            raise ContentError(f"no runtime takes the graph: {reason}", NOT_RUN) from error
        return {
            name: np.asarray(result) if np.isscalar(result) else result
            for name, result in zip(names, results, strict=True)
        }

    return run


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float64; for `reference`, ONNX Runtime has no such layers."""
    import onnx

    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    del wide.graph.value_info[:]
    narrow = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16")}
    constants = [*wide.graph.initializer, *(a.t for node in wide.graph.node for a in node.attribute if a.HasField("t"))]
    for tensor in constants:
        if tensor.data_type in narrow:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for node in wide.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                attribute.i = onnx.TensorProto.DOUBLE
    return wide


def _lacking(opset: int) -> list[type[OpRun]]:
    """Operators of an opset that onnx's reference has in later ones only."""
    from onnx.reference.op_run import OpRun

    class DequantizeLinear(OpRun):
        op_domain = ""

        def _run(self, x: Array, scale: Array, zero: Array | None = None, axis: int = 1, **_: object) -> tuple[Array]:
            along = [-1 if at == axis % x.ndim else 1 for at in range(x.ndim)] if np.ndim(scale) else ()
            offset = 0.0 if zero is None else zero.astype(np.float64).reshape(along)
            return (np.asarray((x.astype(np.float64) - offset) * scale.reshape(along)).astype(scale.dtype),)

    return [DequantizeLinear] if opset < DEQUANTIZE else []


def _is_native(value: Value) -> bool:
    return not isinstance(value, np.ndarray) or (value.dtype.kind in NATIVE and not _is_foreign(value.dtype))


def _is_foreign(dtype: np.dtype[Any]) -> bool:
    """Whether a type is one of ml_dtypes', some of which say that they are of a kind of numpy's."""
    return dtype.isbuiltin != 1 and dtype.kind not in "SU"


def _to_ort(value: Value) -> Any:
    """An OrtValue; numbers of foreign types go as bytes."""
    import onnx
    import onnxruntime as ort

    if _is_native(value):
        return ort.OrtValue.ortvalue_from_numpy(value)
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    raw = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, kind)


def _from_ort(value: Any) -> Value:
    """What an OrtValue holds; numbers of foreign types are copied out of its memory."""
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.element_type()) if value.is_tensor() else np.dtype(np.float32)
    if not value.is_tensor() or not _is_foreign(dtype):
        return value.numpy()
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    size = -(-count * BITS.get(dtype.name, 8 * dtype.itemsize) // 8)
    kind = value.element_type()
    raw = onnx.TensorProto(dims=shape, data_type=kind, raw_data=ctypes.string_at(value.data_ptr(), size))
    return onnx.numpy_helper.to_array(raw)
