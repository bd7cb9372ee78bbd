"""What TensorBoard and MLflow hear of a run; and that a run does not depend on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from polar_deploy import tracking
from polar_deploy.documents.training_log import Epoch
from polar_deploy.errors import MachineError
from polar_deploy.progress import Progress
from polar_deploy.tracking import Trackers, flat, scalars, tracked
from tests.conftest import MINIATURE, Miniature, polar

RECORD = {"epoch": 3, "loss": 0.5, "val_score": None, "cut": True, "open": [1, 2], "freeze": {"val_before": 90}}
EPOCH = Epoch(epoch=3, loss=0.5, val_score=None, open=[1, 2])
SETTINGS = {"model": "resnet20", "training": {"lr": 0.1, "flip": None}, "seed": 0}


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_numbers_of_a_record_go_by_their_path() -> None:
    assert dict(scalars(RECORD)) == {"epoch": 3.0, "loss": 0.5, "freeze/val_before": 90.0}
    assert dict(flat(SETTINGS))["training.lr"] == 0.1


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="--track mlflow: mlflow is not installed") as caught:
        tracking.require(["mlflow"])
    assert "'.[mlflow]'" in caught.value.todo
    outcome = polar("--model", "resnet20", "--data", "digits", "--track", "tensorboard", "--dry-run")
    assert outcome.code == 3
    assert "tensorboard is not installed" in outcome.err


def test_one_that_fails_later_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    told = Told()
    with tracked(["tensorboard"], tmp_path, SETTINGS, told) as trackers:

        def fails(values: Any, step: int) -> None:
            raise ConnectionError("the service\nis away")

        monkeypatch.setattr(trackers._held["tensorboard"], "metrics", fails)
        trackers.epoch("full", EPOCH)
        trackers.epoch("full", EPOCH)
    assert told.notes == ["--track tensorboard: the service is away; goes on without"]


def test_tensorboard_has_metrics_settings_and_the_result(miniature: Miniature, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = miniature.copy(tmp_path / "run", "gates")
    outcome = polar(*MINIATURE, "--out", folder, "--track", "tensorboard")
    assert outcome.code == miniature.outcome.code, outcome.err
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    records = [json.loads(line) for line in (folder / "gated/training.jsonl").read_text().splitlines()]
    assert [(each.step, each.value) for each in events.Scalars("gates/loss")] == [
        (record["epoch"], pytest.approx(record["loss"])) for record in records
    ]
    report = json.loads((folder / "report.json").read_text())
    (accuracy,) = events.Scalars("result/accuracy/compressed")
    assert accuracy.value == pytest.approx(report["accuracy"]["compressed"])
    (verdict,) = events.Tensors("verdict/text_summary")
    assert verdict.tensor_proto.string_val[0].decode() == report["verdict"]["overall"]["result"]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of runs that lie in files."""
    tracking_client = pytest.importorskip("mlflow.tracking", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'served'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    return tracking_client.MlflowClient()


def test_mlflow_has_one_run_for_a_run_that_goes_on(mlflow: Any, miniature: Miniature, tmp_path: Path) -> None:
    folder, told = tmp_path / "run", Told()
    folder.mkdir()
    trackers = Trackers(["mlflow"], folder, SETTINGS, told)
    trackers.epoch("full", EPOCH.model_copy(update={"epoch": 1}))
    trackers.end(failed=True)
    known = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert mlflow.get_run(known).info.status == "FAILED"
    shutil.copytree(miniature.folder, folder, dirs_exist_ok=True)
    with tracked(["mlflow"], folder, SETTINGS, told) as trackers:
        trackers.epoch("full", EPOCH.model_copy(update={"epoch": 2, "loss": 0.25}))
        trackers.result()
    assert told.notes == []
    run = mlflow.get_run(known)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model": "resnet20", "training.lr": "0.1", "training.flip": "None", "seed": "0"}
    assert [(each.step, each.value) for each in mlflow.get_metric_history(known, "full/loss")] == [(1, 0.5), (2, 0.25)]
    report = json.loads((folder / "report.json").read_text())
    assert run.data.metrics["result/macs/ratio"] == report["macs"]["ratio"]
    assert run.data.tags["verdict"] == report["verdict"]["overall"]["result"]
    kept = {each.path for each in mlflow.list_artifacts(known)}
    assert {"report.html", "report.json", "run.yaml", "compressed"} <= kept


def test_a_service_that_is_not_there_is_told_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://nowhere")
    with pytest.raises(MachineError, match="--track mlflow: ") as caught:
        Trackers(["mlflow"], tmp_path, SETTINGS, Told())
    assert "MLFLOW_TRACKING_URI" in caught.value.todo
