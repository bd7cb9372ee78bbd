"""The user's own task: a "package.module:function" that returns a `Task`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from polar_deploy.data.names import call_reference, signature_of
from polar_deploy.errors import ContentError
from polar_deploy.tasks.metric import Metric
from polar_deploy.tasks.task import Task
from polar_deploy.tensors import TensorSpec

_PARTS = {"loss": "outputs, batch", "distill": "outputs, teacher", "monitor": "outputs, batch", "data": ""}


@lru_cache(maxsize=1)  # defaults and the run itself ask for the same one
def load(reference: str, data_dir: Path | None) -> Task:
    """`function(data_dir=data_dir)`, checked.

    Raises:
        UsageError: there is no such function.
        ContentError: it failed, or what it returned is no sound Task.
    """
    task = call_reference(reference, data_dir=data_dir)
    if not isinstance(task, Task):
        raise ContentError(
            f"'{reference}' returned a {type(task).__name__}, not a Task", "return polar_deploy.tasks.Task"
        )
    for kind, specs in (("inputs", task.inputs), ("outputs", task.outputs)):
        _require_specs(f"'{reference}': {kind}", specs, varies=kind == "outputs")
    for name, arguments in _PARTS.items():
        if getattr(task, name) is not None:
            _require_signature(reference, name, getattr(task, name), arguments)
    metric: object = task.metric
    if metric is not None and not isinstance(metric, Metric):
        problem = f"'{reference}': metric is a {type(metric).__name__}, not a Metric"
        raise ContentError(problem, "return an instance of a subclass of polar_deploy.tasks.Metric, or None")
    return task


def _require_specs(place: str, specs: object, *, varies: bool) -> None:
    right = 'write {"name": TensorSpec((3, 64, 64))}: the shape of one sample, without the batch'
    if not isinstance(specs, Mapping) or not specs:
        raise ContentError(f"{place} is a {type(specs).__name__}, and no dictionary of one or more", right)
    items: list[tuple[object, object]] = list(specs.items())
    for name, spec in items:
        if not isinstance(name, str) or not name.isidentifier():
            raise ContentError(f"{place} has the name {name!r}", "use letters, digits and '_'")
        if not isinstance(spec, TensorSpec):
            raise ContentError(f"{place}: {name} is a {type(spec).__name__}, not a TensorSpec", right)
        if not all((size is None and varies) or (type(size) is int and size > 0) for size in spec.shape):
            raise ContentError(
                f"{place}: {name} has the shape {list(spec.shape)}", "give every axis its length, 1 or more"
            )


def _require_signature(reference: str, name: str, function: object, arguments: str) -> None:
    right = f"`def {name}({arguments}):`"
    if not callable(function):
        raise ContentError(
            f"'{reference}': {name} is a {type(function).__name__}, not a function", f"define it as {right}"
        )
    signature = signature_of(function)
    if signature is None:
        return
    try:
        signature.bind(*filter(None, arguments.split(", ")))
    except TypeError as error:
        problem = f"'{reference}': {name} is defined with {signature}, but is called with ({arguments})"
        raise ContentError(problem, f"define it as {right}") from error
