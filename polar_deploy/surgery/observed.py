"""Shapes that onnx cannot infer, behind operators of other domains: seen by running the model once or twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.errors import ContentError, MachineError, PolarDeployError
from polar_deploy.surgery import detached as files
from polar_deploy.surgery.runtime import onnx_runtime
from polar_deploy.surgery.sizes import Sizes, input_shapes, vary
from polar_deploy.surgery.validation import not_inferred
from polar_deploy.surgery.verify import Trial, inputs_taken, try_inputs

if TYPE_CHECKING:
    import onnx

    from polar_deploy.surgery.detached import DetachedModel


def with_observed(detached: DetachedModel) -> DetachedModel:
    """The model with `value_info` for what onnx infers no shape of, where ONNX Runtime runs it; else as it is."""
    import onnx

    known = {value.name for value in (*detached.model.graph.value_info, *detached.model.graph.output)}
    names = [name for name in not_inferred(detached.model) if name not in known]
    if not names:
        return detached
    told = onnx.ModelProto()
    told.CopyFrom(detached.model)
    del told.graph.output[:]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        watched = replace(detached, model=told)
        files.write_files(watched, path)
        try:
            first, second = _two_runs(told, path)
        except (ContentError, MachineError):
            return detached
    model = onnx.ModelProto()
    model.CopyFrom(detached.model)
    for name in names:
        one, other = (trial.results.get(name) for trial in (first, second))
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and one.ndim == other.ndim:
            kind = onnx.helper.np_dtype_to_tensor_dtype(one.dtype)
            dims = _dims([one.shape, other.shape], first.attempt.sizes, second.attempt.sizes)
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, dims))
    return replace(detached, model=model)


def _two_runs(model: onnx.ModelProto, path: Path) -> tuple[Trial, Trial]:
    """At sizes that differ in every dimension that is free to."""
    run = onnx_runtime(path)
    first = inputs_taken(model, run)[0]

    def takes(sizes: Sizes) -> Trial:
        reasons: list[PolarDeployError] = []
        trial = try_inputs(model, run, first.attempt._replace(sizes=sizes), reasons)
        if trial is None:
            raise reasons[0]
        return trial

    other = vary(input_shapes(model), first.attempt.sizes, takes)
    return first, takes(other)


def _dims(shapes: list[tuple[int, ...]], one: Sizes, other: Sizes) -> list[int | str | None]:
    """What is the same in both runs is a number, what is a size of the input its symbol."""
    names = {(one[name], other[name]): name for name in one}
    return [a if a == b else names.get((a, b)) for a, b in zip(*shapes, strict=True)]
