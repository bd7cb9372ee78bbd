"""Tasks: data, loss, metric and what a network takes and gives, under one name. Nothing here needs torch to be read.

A task is a `Task` (task.py), made of

- `inputs` and `outputs`: name -> `TensorSpec(shape of one sample, dtype)`, of any number, shape and type. The batch is
  the first axis of each, and the only one that varies. These names are those of the ONNX graphs, engines and bundles.
- `data`: a function that gives a `Data` of two `Samples`, `train` and `test`. `Samples.read(rows, draw)` gives
  (inputs, targets), two dictionaries of arrays [B, …]; targets are whatever loss and metric want, such as labels [B],
  masks [B, H, W], or boxes [B, M, 4] filled up with boxes of label -1. `draw` is a numpy generator to augment by for a
  training batch, and None else.
- `loss(outputs, batch)`: tensors by name, and a `Batch` (inputs, targets), to a scalar.
- `metric`: a `Metric`. `statistics(outputs, targets)` keeps K numbers of each sample, [B, K]; `score(totals)` makes
  scores [R] of sums [R, K], higher is better. Both networks' statistics, the interval of their difference, the score
  of each class (`by_class`) and the worst samples follow from that. What is no function of a sum overrides
  `scores(statistics, weights)`: mean average precision keeps each image's detections and boxes in a row of K numbers,
  and ranks those of all images, each as often as its weight says. `None`: outputs are compared, and nothing decided.
- `distill(outputs, teacher)`: what the full network teaches, or None. `losses.divergence` suits logits
  [B, classes, …], `losses.scaled_mse` anything.

What a network computes and what is made of it may differ: a detector's graph gives boxes and scores for all anchors,
its metric decodes and suppresses them in numpy, as a device does behind the engine.

A built-in task is a module of this package, named in `BUILT_IN`: `DATA` is the data set where none is named ("": one
has to be), `defaults(settings)` says what suits a data set, `make(settings)` gives the `Task`, and `PACKAGES`, if it
is there, says what has to be installed for it. The user's is a "package.module:function" that is called with
`data_dir=` and returns a `Task`.

Networks are a "package.module:function" too, called with `classes=` where the task has classes, else without
arguments; models by name are classifiers, unless `polar_deploy.models` knows them for another task. A forward gets the
inputs in their order and returns a tensor, a tuple in the outputs' order, or a dictionary by their names. What else
such a dictionary has, an auxiliary head for example, the loss gets in training, and is no output.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from polar_deploy.data.names import is_reference, unknown
from polar_deploy.errors import UsageError
from polar_deploy.tasks import own
from polar_deploy.tasks.data import Data, InMemory, Samples, draw_inputs
from polar_deploy.tasks.defaults import Defaults
from polar_deploy.tasks.metric import Metric, Statistics
from polar_deploy.tasks.task import Batch, Task, Tensors
from polar_deploy.tensors import Arrays, TensorSpec

if TYPE_CHECKING:
    from polar_deploy.config import Settings
    from polar_deploy.resolved import ResolvedSettings

__all__ = [
    "BUILT_IN",
    "Arrays",
    "Batch",
    "Data",
    "Defaults",
    "InMemory",
    "Metric",
    "Samples",
    "Statistics",
    "Task",
    "TensorSpec",
    "Tensors",
    "data_name",
    "defaults",
    "draw_inputs",
    "listed",
    "make",
    "packages",
]

BUILT_IN = ("classification", "segmentation", "detection")


def defaults(settings: Settings) -> Defaults:
    """What suits the task that the settings name, and its data.

    Raises:
        UsageError: no such task or data set. ContentError: what the user's function returned is no task.
    """
    if not is_reference(settings.task):
        found: Defaults = _built_in(settings.task).defaults(settings)
        return found
    if settings.data not in (None, settings.task):
        problem = f"the task '{settings.task}' brings its own data, but '{settings.data}' is given, too"
        raise UsageError(problem, "leave --data out; --data-dir reaches the task's function")
    task = own.load(settings.task, settings.data_dir)
    return Defaults(data=settings.task, epochs=task.epochs, batch_size=task.batch_size)


def data_name(settings: Settings) -> str:
    """Name of the data set: the one that is given, the built-in task's `DATA`, or the user's task, which brings it."""
    default: str = settings.task if is_reference(settings.task) else _built_in(settings.task).DATA
    return settings.data or default


def packages(name: str) -> tuple[tuple[str, str], ...]:
    """What a built-in task needs beside the base installation: modules, and the extra that brings each."""
    needed: tuple[tuple[str, str], ...] = () if is_reference(name) else getattr(_built_in(name), "PACKAGES", ())
    return needed


def listed(settings: ResolvedSettings) -> dict[str, Any] | None:
    """What can be told of the data unread: "classes" by name, "pictures" by the part; None: nothing.

    Raises:
        UsageError, ContentError: a run would refuse what is there.
    """
    if is_reference(settings.task):
        return None
    look: Callable[[ResolvedSettings], dict[str, Any] | None] = getattr(_built_in(settings.task), "listed", _unknown)
    return look(settings)


def _unknown(settings: ResolvedSettings) -> None:
    return None


def make(settings: ResolvedSettings) -> Task:
    """The task of a run.

    Raises:
        As `defaults`.
    """
    if is_reference(settings.task):
        return own.load(settings.task, settings.data_dir)
    task: Task = _built_in(settings.task).make(settings)
    return task


def _built_in(name: str) -> Any:
    if name not in BUILT_IN:
        raise unknown("task", name, BUILT_IN)
    return import_module(f"{__name__}.{name}")
