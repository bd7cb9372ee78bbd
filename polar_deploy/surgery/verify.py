"""The proof: both graphs run on the same random inputs at two batch sizes, and must agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from polar_deploy.errors import ContentError, MachineError
from polar_deploy.surgery.model import concrete_inputs, first_line

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

Arrays = dict[str, npt.NDArray[Any]]
Run = Callable[[Arrays], Arrays]
BATCHES = (1, 3)
JUDGED = 4  # inputs of each batch size that decide whether a difference above the tolerance is rounding
TOLERANCE = {"FLOAT": 1e-5, "FLOAT16": 5e-3, "BFLOAT16": 4e-2, "DOUBLE": 1e-12}
NOT_RUN = "pass --no-verify to write the cut graph without the proof"
REPORT = "please report this graph as a bug of polar_deploy.surgery"
# What ONNX Runtime says of valid graphs that it cannot run: no kernel for a type, custom operators, a newer opset,
# names that it wants to be unique.
BEYOND = (
    *("NOT_IMPLEMENTED", "No Op registered", "not a registered", "guarantees* support", "IR version"),
    "same node name",
)


@dataclass(frozen=True)
class Proof:
    """How far two graphs were found apart: the largest difference of an output, as a share of its largest value."""

    difference: float
    tolerance: float
    runtime: str


def verify(model: onnx.ModelProto, before: Path, after: Path) -> Proof:
    """Compares two graphs with the same inputs and outputs. `model`: the one before, with or without its weights.

    Where they differ by more than the tolerance of their data type, both are compared with a float64 reference: the
    cut may be up to twice as far from it as the graph before.

    Raises:
        MachineError: ONNX Runtime is not installed.
        ContentError: the graphs differ, or neither ONNX Runtime nor onnx's reference can run them.
    """
    run_before, runtime = _runner(before)
    run_after, other = _runner(after)
    if other != runtime:
        raise ContentError(f"the cut graph needs {other} to run, the one before {runtime}", REPORT)
    tolerance = _tolerance(model)
    worst = 0.0
    for batch in BATCHES:
        inputs = random_inputs(model, batch)
        worst = max(worst, largest_difference(run_before(inputs), run_after(inputs)))
    if worst > tolerance:
        try:
            was, now = _errors(model, before, (run_before, run_after))
        except ContentError as error:
            raise ContentError(
                f"outputs differ by {worst:.2g} of their scale (allowed {tolerance:g}), and there is no float64 result "
                f"that tells whether this is rounding: {error.what}",
                NOT_RUN,
            ) from error
        if not now <= 2 * was:
            raise ContentError(
                f"the cut changed the function: outputs differ by {worst:.2g} of their scale (allowed {tolerance:g}); "
                f"from float64 the graph was {was:.2g} apart and is now {now:.2g}",
                REPORT,
            )
    return Proof(worst, tolerance, runtime)


def random_inputs(model: onnx.ModelProto, batch: int, seed: int = 0) -> Arrays:
    """Normally distributed inputs, the same ones for the same arguments; 0 or 1 for integers and truth values."""
    import onnx

    generator = np.random.default_rng((batch, seed))
    shapes = concrete_inputs(model, batch)
    inputs: Arrays = {}
    for value in model.graph.input:
        if value.name in shapes:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            numbers = _normal(generator, shapes[value.name], value.name)
            whole = np.issubdtype(dtype, np.integer) or dtype == np.bool_
            inputs[value.name] = (numbers > 0 if whole else numbers).astype(dtype)
    return inputs


def _normal(generator: np.random.Generator, shape: tuple[int, ...], name: str) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(generator.standard_normal(shape))
    except (MemoryError, ValueError) as error:
        raise ContentError(f"input {name} of shape {list(shape)} is too large to try the cut on", NOT_RUN) from error


def largest_difference(expected: Arrays, found: Arrays) -> float:
    """Over all outputs: the largest absolute difference divided by the largest expected value, where that is finite."""
    worst = 0.0
    for name, one in expected.items():
        a, b = one.astype(np.float64), found[name].astype(np.float64)
        finite = np.isfinite(a)
        if a.shape != b.shape or not np.isfinite(b[finite]).all():
            return float("inf")
        if finite.any():
            scale = float(np.abs(a[finite]).max()) or 1.0
            worst = max(worst, float(np.abs(a - b)[finite].max()) / scale)
    return worst


def _tolerance(model: onnx.ModelProto) -> float:
    """That of the coarsest floating-point type among the constants, inputs and outputs."""
    import onnx

    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    names = {onnx.TensorProto.DataType.Name(number) for number in types}
    return max((TOLERANCE[name] for name in names & TOLERANCE.keys()), default=TOLERANCE["FLOAT"])


def _runner(path: Path) -> tuple[Run, str]:
    """Runs the model in `path` in ONNX Runtime, as it stands; in onnx's reference where ONNX Runtime cannot."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MachineError(
            "onnxruntime is not installed, so the cut cannot be verified",
            "install polar-deploy[ort], or pass --no-verify",
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has no common class for its errors
        if not any(text in str(error) for text in BEYOND):
            raise ContentError(f"ONNX Runtime refuses the graph: {first_line(error)}", NOT_RUN) from error
        return _reference(_load(path), first_line(error)), "onnx.reference"
    names = [value.name for value in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        try:
            return dict(zip(names, session.run(names, inputs), strict=True))
        except Exception as error:
            raise ContentError(f"ONNX Runtime cannot run the graph: {first_line(error)}", NOT_RUN) from error

    return run, "onnxruntime"


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load_model(path, format="protobuf")


def _reference(model: onnx.ModelProto, reason: str) -> Run:
    """Runs `model` in onnx's reference implementation."""
    from onnx.reference import ReferenceEvaluator

    names = [value.name for value in model.graph.output]
    try:
        evaluator = ReferenceEvaluator(model)
    except Exception as error:
        raise ContentError(f"the cut cannot be verified, no runtime takes the graph: {reason}", NOT_RUN) from error

    def run(inputs: Arrays) -> Arrays:
        try:
            results = evaluator.run(names, inputs)
        except Exception as error:
            raise ContentError(f"the cut cannot be verified, no runtime takes the graph: {reason}", NOT_RUN) from error
        return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}

    return run


def _errors(model: onnx.ModelProto, before: Path, runs: tuple[Run, Run]) -> tuple[float, float]:
    """How far both graphs are from the float64 result at most, over inputs enough for chance to level out."""
    exact = _reference(_in_double(_load(before)), "float64")
    worst = [0.0, 0.0]
    for batch, seed in product(BATCHES, range(JUDGED)):
        inputs = random_inputs(model, batch, seed)
        wide = {name: value.astype(np.float64) if _is_real(value) else value for name, value in inputs.items()}
        truth = exact(wide)
        worst = [max(one, largest_difference(truth, run(inputs))) for one, run in zip(worst, runs, strict=True)]
    return worst[0], worst[1]


def _is_real(values: npt.NDArray[Any]) -> bool:
    """Whether they are floating-point numbers; BF16 is of no kind that numpy knows."""
    return values.dtype.kind in "fV"


def _in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that computes in float64."""
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
