"""The proof: both graphs run on the same random inputs at two batch sizes, and must agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy import onnx_files
from polar_deploy.errors import ContentError, OutOfMemoryError, PolarDeployError
from polar_deploy.limits import processor_time
from polar_deploy.ort_session import BeyondRuntimeError
from polar_deploy.surgery import inputs
from polar_deploy.surgery.runtime import NOT_RUN, in_float64, onnx_runtime, reference
from polar_deploy.surgery.sizes import input_shapes, symbols

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from polar_deploy.surgery.inputs import Attempt, Value, Values
    from polar_deploy.surgery.runtime import Run

BATCHES = (1, 3)
SMALLER = (32, 64)  # of sizes that are open
MOST_ROUNDING = 100  # tolerances that two graphs may differ by and still be found the same by smaller inputs
JUDGED = 4  # inputs of each batch size that decide whether a difference above the tolerance is rounding
JUDGE_SECONDS = 120.0  # of processor time; onnx's reference computes some operators pixel by pixel, in Python
MOST_ATTEMPTS = 1000  # at inputs that a model takes
MOST_OUT_OF_MEMORY = 5  # of them; each may take as long as filling the memory does
TOLERANCE = {"FLOAT": 1e-5, "FLOAT16": 5e-3, "BFLOAT16": 4e-2, "DOUBLE": 1e-12}
FLIPS = 1e-4  # share of integers and truth values that may differ in float64, where weights were rounded once more
ARITHMETIC = "ONNX Runtime's own arithmetic differs, as where integers saturate in processors without VNNI"
REPORT = "please report this graph as a bug of polar_deploy.surgery"


class NotVerifiedError(ContentError):
    """The proof cannot be made: no runtime takes the graph."""


class UndecidedError(NotVerifiedError):
    """ONNX Runtime takes the graph, and still it does not come out whether the cut is right: no inputs were found that
    the graph takes, or its results jump with the last digit of a number."""


@dataclass(frozen=True)
class Trial:
    """Inputs that a graph takes, and its results."""

    attempt: Attempt
    values: Values
    results: Values


@dataclass(frozen=True)
class Proof:
    """How far two graphs were found apart: the largest difference of an output, as a share of its largest value."""

    difference: float
    tolerance: float | None
    runtime: str


def verify(model: onnx.ModelProto, before: Path, after: Path) -> Proof:
    """Compares two graphs with the same inputs and outputs. `model`: the one before, with or without its weights.

    Where they differ by more than the tolerance of their data type, INT8 weights are multiplied by kernels that do not
    overflow. Else both are compared with a float64 reference: the cut may be up to twice as far from it as the graph
    before. Integers and truth values that are told from computed numbers jump; there, both graphs have to say the same
    when they compute in float64. What that leaves open, smaller inputs may show to be rounding.

    Raises:
        MachineError: ONNX Runtime is not installed.
        NotVerifiedError: neither ONNX Runtime nor onnx's reference can run them.
        UndecidedError: one of them can, and that does not tell.
        ContentError: the graphs differ, or ONNX Runtime finds the one before invalid.
    """
    runs, runtime = _runners(before, after)
    tolerance, worst = _tolerance(model), 0.0
    taken = inputs_taken(model, runs[0])
    for trial in taken:
        worst = max(worst, largest_difference(trial.results, _after_cut(runs[1], trial.values)))
    if worst > tolerance:
        again = max(largest_difference(trial.results, runs[0](trial.values)) for trial in taken)
        if again > tolerance:
            raise UndecidedError("the cut cannot be verified, the graph draws numbers at random", NOT_RUN)
        if runtime == "onnxruntime" and _holds_bytes(model):
            exact = _of_exact_integers(before, after, taken)
            if exact <= tolerance:
                return Proof(exact, tolerance, runtime)
        case = _Case(model, before, after, runs, [trial.attempt for trial in taken], tolerance)
        try:
            _judge(case, worst)
        except UndecidedError:
            if worst > MOST_ROUNDING * tolerance or not _is_same_of_less(case):
                raise
    return Proof(worst, tolerance, runtime)


def _after_cut(run: Run, values: Values) -> Values:
    try:
        return run(values)
    except ContentError as error:
        raise ContentError(f"the cut graph does not run where the one before does: {error.what}", REPORT) from error


def largest_difference(expected: Values, found: Values) -> float:
    """Over all outputs: the largest absolute difference divided by the largest expected value, where that is finite."""
    pairs = [pair for name, value in expected.items() for pair in _pairs(value, found[name])]
    return max((_difference(a, b) for a, b in pairs), default=0.0)


def _pairs(a: Value, b: Value) -> Iterator[tuple[Value, Value]]:
    """The tensors in two values that belong together; what has no counterpart beside None."""
    if isinstance(a, dict) and isinstance(b, dict):
        a, b = [a.get(key) for key in a.keys() | b.keys()], [b.get(key) for key in a.keys() | b.keys()]
    if isinstance(a, list) and isinstance(b, list):
        for index in range(max(len(a), len(b))):
            yield from _pairs(*(each[index] if index < len(each) else None for each in (a, b)))
    else:
        yield a, b


def _difference(one: Value, other: Value) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    a, b = np.asarray(one), np.asarray(other)
    if a.dtype.kind in "OSU" or a.shape != b.shape:
        return 0.0 if a.shape == b.shape and bool(np.all(a == b)) else float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a)
    if not np.isfinite(b[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(a[finite]).max()) or 1.0
    return float(np.abs(a - b)[finite].max()) / scale


def _tolerance(model: onnx.ModelProto) -> float:
    """That of the coarsest floating-point type among the constants, inputs and outputs."""
    import onnx

    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    names = {onnx.TensorProto.DataType.Name(number) for number in types}
    return max((TOLERANCE[name] for name in names & TOLERANCE.keys()), default=TOLERANCE["FLOAT"])


def _of_exact_integers(before: Path, after: Path, taken: Sequence[Trial]) -> float:
    """The largest difference by kernels that do not overflow; infinite where ONNX Runtime cannot optimise a graph."""
    try:
        first, second = (onnx_runtime(path, exact_integers=True) for path in (before, after))
        return max(largest_difference(first(trial.values), second(trial.values)) for trial in taken)
    except ContentError:
        return float("inf")


def _holds_bytes(model: onnx.ModelProto) -> bool:
    import onnx

    return any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)


def _runners(before: Path, after: Path) -> tuple[tuple[Run, Run], str]:
    """Both graphs in one and the same runtime."""
    try:
        first = onnx_runtime(before)
    except BeyondRuntimeError as error:
        return _references(before, after, error), "onnx.reference"
    try:
        return (first, onnx_runtime(after)), "onnxruntime"
    except ContentError as error:
        raise ContentError(f"the cut graph does not load where the one before does: {error.what}", REPORT) from error


def _references(before: Path, after: Path, why: ContentError) -> tuple[Run, Run]:
    try:
        first, second = (reference(onnx_files.read(path, check=False), why.what) for path in (before, after))
        return first, second
    except ContentError as error:
        raise NotVerifiedError(f"the cut cannot be verified, {error.what}", NOT_RUN) from error


def inputs_taken(model: onnx.ModelProto, run: Run, most: int = MOST_ATTEMPTS) -> list[Trial]:
    """Inputs that the model takes, one for each batch size that it takes.

    Args:
        most: attempts before it is given up.

    Raises:
        UndecidedError: none were found, which may be for want of the right sizes or indices.
        NotVerifiedError: none were found, and no input holds such.
        OutOfMemoryError: none were found, and the first ones took more memory than there is.
    """
    first, *others = BATCHES
    leading, open_sizes = symbols(input_shapes(model))
    reasons: list[PolarDeployError] = []
    tried: set[int] = set()
    for attempt in islice(inputs.attempts(model, first), most):
        tried.update(attempt.sizes[name] for name in open_sizes)
        found = try_inputs(model, run, attempt, reasons)
        if found or sum(isinstance(reason, OutOfMemoryError) for reason in reasons) == MOST_OUT_OF_MEMORY:
            break
    if found is None and isinstance(reasons[0], OutOfMemoryError):  # the likeliest inputs come first
        raise reasons[0]
    if found is None:
        kind = UndecidedError if inputs.hold_sizes(model) else NotVerifiedError
        sizes = (
            f" ({len(tried)} sizes from {min(tried)} to {max(tried)} tried for {', '.join(open_sizes)})"
            if tried
            else ""
        )
        what = f"the cut cannot be verified, no inputs were found that the graph takes{sizes}: {reasons[0].what}"
        raise kind(what, NOT_RUN)
    more = [found.attempt._replace(sizes=found.attempt.sizes | dict.fromkeys(leading, batch)) for batch in others]
    return [found, *(trial for attempt in more if (trial := try_inputs(model, run, attempt, reasons)) is not None)]


def try_inputs(model: onnx.ModelProto, run: Run, attempt: Attempt, reasons: list[PolarDeployError]) -> Trial | None:
    """One run; None where the model does not take these inputs, the reason is added to `reasons` then."""
    try:
        values = inputs.make(model, attempt)
        return Trial(attempt, values, run(values))
    except (ContentError, OutOfMemoryError) as error:  # with other inputs it may take less
        reasons.append(error)
        return None


@dataclass(frozen=True)
class _Case:
    """Two graphs that were found apart, and the inputs that they take."""

    model: onnx.ModelProto
    before: Path
    after: Path
    runs: tuple[Run, Run]
    attempts: list[Attempt]
    tolerance: float

    def inputs(self) -> Iterator[Values]:
        """Enough for chance to level out."""
        for attempt in self.attempts:
            for seed in range(JUDGED):
                yield inputs.make(self.model, attempt, seed)


def _is_same_of_less(case: _Case) -> bool:
    """Whether both agree to the tolerance about smaller inputs, where they take such: rounding shrinks with the number
    of terms of a sum, and what a wrong cut changes stays."""
    open_sizes = symbols(input_shapes(case.model))[1]
    for size in SMALLER if open_sizes else ():
        if size >= min(attempt.sizes[name] for attempt in case.attempts for name in open_sizes):
            break
        less = [attempt._replace(sizes=attempt.sizes | dict.fromkeys(open_sizes, size)) for attempt in case.attempts]
        try:
            trials = [(values, case.runs[0](values)) for values in replace(case, attempts=less).inputs()]
        except ContentError:
            continue  # it takes other sizes
        if not any(isinstance(x, np.ndarray) and not x.size for _, results in trials for x in results.values()):
            found = (largest_difference(results, _after_cut(case.runs[1], values)) for values, results in trials)
            return max(found) <= case.tolerance
    return False


def _judge(case: _Case, worst: float) -> None:
    """Raises ContentError where a difference is more than rounding, UndecidedError where that does not come out."""
    apart = f"outputs differ by {worst:.2g} of their scale (allowed {case.tolerance:g})"
    try:
        with processor_time(JUDGE_SECONDS, "onnx's reference"):
            exact = reference(in_float64(onnx_files.read(case.before, check=False)), "float64")
            was, now = 0.0, 0.0
            for values in case.inputs():
                truth = exact(_widened(values))
                was, now = (
                    max(worst, largest_difference(truth, run(values)))
                    for worst, run in zip((was, now), case.runs, strict=True)
                )
            if now <= 2 * was:
                return
            same, jump = _in_float64(case, exact)
    except ContentError as error:
        raise UndecidedError(
            f"{apart}, and there is no float64 result that tells whether this is rounding: {error.what}", NOT_RUN
        ) from error
    if jump:
        return
    if same:
        raise UndecidedError(f"{apart}, and both graphs agree in float64: {ARITHMETIC}", NOT_RUN)
    raise ContentError(
        f"the cut changed the function: {apart}; from float64 the graph was {was:.2g} apart and is now {now:.2g}",
        REPORT,
    )


def _in_float64(case: _Case, exact: Run) -> tuple[bool, bool]:
    """Whether both graphs say the same when they compute in float64; and whether integers or truth values are among
    that, which jump."""
    cut = reference(in_float64(onnx_files.read(case.after, check=False)), "float64")
    jumps = False
    for values in case.inputs():
        expected, found = exact(_widened(values)), cut(_widened(values))
        for a, b in [pair for name, value in expected.items() for pair in _pairs(value, found[name])]:
            whole = isinstance(a, np.ndarray) and a.dtype.kind in "biu" and np.shape(a) == np.shape(b)
            jumps |= whole
            if np.mean(a != b) > FLIPS if whole else _difference(a, b) > case.tolerance:
                return False, False
    return True, jumps


def _widened(values: Values) -> Values:
    return {name: value.astype(np.float64) if _is_real(value) else value for name, value in values.items()}


def _is_real(values: Any) -> bool:
    """Whether they are floating-point numbers; BF16 is of no kind that numpy knows."""
    return isinstance(values, np.ndarray) and values.dtype.kind in "fV"
