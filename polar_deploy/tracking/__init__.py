"""Runs as they are watched elsewhere: metrics of each epoch while it trains, figures and files when it has ended.

A tracker is a module here with a class `Tracker`, imported only when it is asked for. It never decides what
becomes of a run: where a tracker fails, the user is told, and the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from polar_deploy import extras
from polar_deploy.documents.training_log import Epoch
from polar_deploy.errors import MachineError, one_line
from polar_deploy.progress import Progress

LIBRARIES = {
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
}  # what each needs to be installed, which is its extra, too
# What a run has for others when it has ended, where it is there; the bundle is a folder.
ARTEFACTS: tuple[str, ...] = (
    "run.yaml",
    "report.html",
    "report.json",
    "gated/gates.json",
    "compressed/surgery.json",
    "parity.json",
)
ARTEFACTS += ("full/training.jsonl", "gated/training.jsonl", "compressed/model.onnx", "compressed/model.onnx.data")
ARTEFACTS += ("bundle",)


class Tracker(Protocol):
    """One service. Made with the run's folder and its settings by dotted key; raises whatever its library does."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Take metrics by name, such as "full/loss", after `step` epochs."""

    def end(self, figures: Mapping[str, float], files: Sequence[Path], verdict: str | None, *, failed: bool) -> None:
        """Take figures, files and folders of a run that has ended, or failed; verdict None: it did not come so far."""


class Trackers:
    """Those that were asked for.

    Args:
        names: of `LIBRARIES`.
        folder: the run's.
        settings: nested, as in a recipe.
        progress: is told of one that fails.

    Raises:
        MachineError: a library is not installed, or does not reach its service.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], progress: Progress) -> None:
        self._folder, self._progress = folder, progress
        self._held: dict[str, Tracker] = {}
        self._figures: dict[str, float] = {}
        self._verdict: str | None = None
        for name in dict.fromkeys(names):
            try:
                module = import_module(f"polar_deploy.tracking.{name}")
                self._held[name] = module.Tracker(folder, dict(flat(settings)))
            except Exception as error:  # of any library
                raise MachineError(f"--track {name}: {one_line(error)}", _ADVICE[name]) from error

    def epoch(self, stage: str, record: Epoch) -> None:
        """Tell what an epoch of a stage was like."""
        values = {f"{stage}/{key}": value for key, value in scalars(record.as_json()) if key != "epoch"}
        self._each(lambda tracker: tracker.metrics(values, record.epoch))

    def result(self) -> None:
        """Keep the figures of report.json, which the run has just written, for its end."""
        from polar_deploy.report.compare import compare

        if self._held:
            (found,) = compare([self._folder]).runs
            kept = {"accuracy", "latency_ms", "speedup", "macs", "params", "bytes", "energy_mj"}
            self._figures = {f"result/{key}": value for key, value in scalars(found.model_dump(include=kept))}
            self._verdict = found.result

    def end(self, *, failed: bool) -> None:
        """Tell how the run ended, as far as it came."""
        figures, verdict = self._figures, self._verdict
        files = [self._folder / name for name in ARTEFACTS if (self._folder / name).exists()]
        self._each(lambda tracker: tracker.end(figures, files, verdict, failed=failed))

    def _each(self, tell: Any) -> None:
        for name, tracker in list(self._held.items()):
            try:
                tell(tracker)
            except Exception as error:  # noqa: BLE001 - hours of training are worth more than what is told of them
                self._progress.note(f"--track {name}: {one_line(error)}; goes on without")
                del self._held[name]


_ADVICE = {
    "tensorboard": "see that the run's folder can be written, or leave --track out",
    "mlflow": "name your server with MLFLOW_TRACKING_URI=http://…, or install mlflow (not mlflow-skinny), which keeps "
    "runs in a database of its own",
}


@contextmanager
def tracked(names: Sequence[str], folder: Path, settings: Mapping[str, Any], progress: Progress) -> Iterator[Trackers]:
    """Trackers for as long as a run works in its folder; arguments and errors as of `Trackers`."""
    trackers = Trackers(names, folder, settings, progress)
    try:
        yield trackers
    except BaseException:
        trackers.end(failed=True)
        raise
    trackers.end(failed=False)


def require(names: Sequence[str]) -> None:
    """Raise MachineError where what a tracker needs is not installed."""
    for name in names:
        if find_spec(LIBRARIES[name]) is None:
            raise MachineError(
                f"--track {name}: {LIBRARIES[name]} is not installed", f"install it, {extras.install(name)}"
            )


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a nested record, by their path."""
    for key, value in flat(record, sign="/"):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, float(value)


def flat(values: Mapping[str, Any], above: str = "", sign: str = ".") -> Iterator[tuple[str, Any]]:
    """A nested mapping by the paths of what it holds."""
    for key, value in values.items():
        path = f"{above}{sign}{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from flat(value, path, sign)
        else:
            yield path, value
