"""MLflow: a run of the experiment MLFLOW_EXPERIMENT_NAME (or "polar_deploy") at MLFLOW_TRACKING_URI.

A run that goes on after a kill is the same one there: `mlflow.json` in its folder remembers which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polar_deploy.errors import ContentError, UsageError
from polar_deploy.workspace import read_json, write_json

_LONGEST = 500  # characters of a parameter's value that every version of MLflow takes


class Tracker:
    """Settings as parameters, metrics by epoch, files as artefacts."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from mlflow import get_tracking_uri
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        memory, where = folder / "mlflow.json", get_tracking_uri()
        known = self._resumed(memory, where)
        self._id = known or self._begun(folder.name, settings)
        if known is None:
            write_json(memory, {"tracking_uri": where, "run_id": self._id})

    def _begun(self, run_name: str, settings: Mapping[str, Any]) -> str:
        """A new run, with the settings."""
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "polar_deploy")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        begun = str(self._client.create_run(experiment, run_name=run_name).info.run_id)
        params = [Param(key, str(value)[:_LONGEST]) for key, value in settings.items()]
        for first in range(0, len(params), 100):  # as many as a request may have
            self._client.log_batch(begun, params=params[first : first + 100])
        return begun

    def _resumed(self, memory: Path, where: str) -> str | None:
        """The run that this folder had before at the same place, if it is still there."""
        from mlflow.exceptions import MlflowException

        try:
            known = read_json(memory)
            if known["tracking_uri"] != where:
                return None
            self._client.update_run(known["run_id"], status="RUNNING")
            return str(known["run_id"])
        except (UsageError, ContentError, KeyError, TypeError, MlflowException):  # none, damaged, or deleted there
            return None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of an epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def end(self, figures: Mapping[str, float], files: Sequence[Path], verdict: str | None, *, failed: bool) -> None:
        """Log the figures, copy the files, and end the run there."""
        self.metrics(figures, 0)
        for path in files:
            where = path.parent.name if path.parent.name in ("full", "gated", "compressed") else None
            if path.is_dir():
                self._client.log_artifacts(self._id, str(path), path.name)
            else:
                self._client.log_artifact(self._id, str(path), where)
        if verdict is not None:
            self._client.set_tag(self._id, "verdict", verdict)
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
