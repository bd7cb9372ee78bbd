"""What makes a stage run again: each setting, by the stages that depend on it, and a new version of the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polar_deploy import recipes
from polar_deploy.progress import Progress
from polar_deploy.settings import GROUPS, every
from polar_deploy.stages import NAMES, STAGES, gates, runner, stage
from polar_deploy.stages.context import RunContext
from polar_deploy.stages.resolve import resolve
from tests.conftest import ROOT

EVERYTHING = {"full", "gates", "export", "parity"}
BOTH, GATED = {"full", "gates"}, {"gates"}
BUILT = {"build", "parity"}
# setting -> another value, and the stages that depend on it; bundle and report depend on all of them
SETTINGS: dict[str, tuple[object, set[str]]] = {
    "model": ("tests.support.tiny:other", {"full", "gates", "export"}),
    "target": ("ort-int8", BUILT | GATED),  # which likes widths of 16 channels, not 8
    "data": ("tests.stages.test_fingerprint:noise", EVERYTHING),
    "input_size": (24, EVERYTHING),
    "skip_broken": (True, set()),  # what is left out makes the data another
    "normalize": ({"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}, EVERYTHING),
    "budget.macs": (0.4, {"gates", "surgery"}),
    "budget.params": (0.4, {"gates", "surgery"}),
    "budget.latency": (0.4, {"gates", "surgery"}),
    "align": (4, GATED),
    "device": ("rk3588", GATED),
    "seed": (1, {"full", "gates", "export"}),
    "build.batches": ([1, 2, 3], BUILT),
    "build.io_dtype": ("native", BUILT),
    "build.tf32": (True, BUILT),
    "build.workspace": (64, BUILT),
    "build.optimization_level": (1, BUILT),
    "build.version_compatible": (True, BUILT),
    "build.hardware_compatible": (True, BUILT),
    "build.capabilities": (["8.9"], BUILT),
    "build.max_layer_error": (0.2, BUILT),
    "build.reduce_range": (True, BUILT),
    "build.calibration.images": (100, BUILT),
    "build.calibration.method": ("entropy", BUILT),
    "build.calibration.percentile": (99.0, BUILT),
    "accept.max_drop": (2.0, {"parity"}),
    "accept.accuracy_rule": ("point", {"parity"}),
    "accept.min_speedup": (1.5, {"parity"}),
    "accept.max_latency_ms": (5.0, {"parity"}),
    "accept.latency_percentile": ("p99", {"parity"}),
    "accept.batch": (8, {"parity"}),
    "bundle.full": (False, set()),
    "bundle.golden": ("random", set()),
    "bundle.licence": ("MIT", set()),
    "training.epochs": (4, GATED),
    "training.full_epochs": (4, {"full"}),
    "training.batch_size": (64, BOTH),
    "training.lr": (0.2, BOTH),
    "training.gated_lr": (0.2, GATED),
    "training.momentum": (0.5, BOTH),
    "training.weight_decay": (0.0, BOTH),
    "training.warmup": (0.1, BOTH),
    "training.label_smoothing": (0.1, BOTH),
    "training.flip": (True, BOTH),
    "training.crop_padding": (3, BOTH),
    "training.crop_scale": (0.5, BOTH),
    "training.cutout": (4, BOTH),
    "training.decoder": ("pillow", BOTH),
    "training.init_from": ("scratch", GATED),
    "training.distill": (0.1, GATED),
    "training.distill_share": (1.0, GATED),
    "training.distill_temperature": (2.0, GATED),
    "training.accumulate": (2, BOTH),
    "training.deterministic": (True, BOTH),
    "training.amp": ("fp32", BOTH),
    "training.channels_last": (False, BOTH),
    "training.train_on_validation": (True, BOTH),
    "training.threads": (1, BOTH),
    "gates.mode": ("sample", GATED),
    "gates.blocks": (False, GATED),
    "gates.heads": (True, GATED),
    "gates.close_from": (0.1, GATED),
    "gates.freeze_at": (0.5, GATED),
    "gates.min_width": (0.5, GATED),
}
GIVEN: dict[str, object] = {
    "model": "tests.support.tiny:net",
    "data": "digits",
    "budget.macs": 0.5,
    "training.full_epochs": 3,
}
ALWAYS = {"bundle", "report"}


def noise(data_dir: Path | None) -> Any:
    """Another data set than digits, of the same shape."""
    from dataclasses import replace

    from polar_deploy import data

    digits = data.load("digits")
    return replace(digits, test=replace(digits.test, labels=digits.test.labels[::-1].copy()))


def one_class_less(data_dir: Path | None) -> Any:
    """The digits, with nines called eights."""
    from dataclasses import replace

    import numpy as np

    from polar_deploy import data

    digits = data.load("digits")
    parts = {name: getattr(digits, name) for name in ("train", "test")}
    parts = {name: replace(part, labels=np.minimum(part.labels, 8)) for name, part in parts.items()}
    return replace(digits, spec=replace(digits.spec, classes=9), class_names=digits.class_names[:9], **parts)


def context(folder: Path, **changes: object) -> RunContext:
    settings = recipes.load(None, GIVEN | changes)
    return RunContext(resolve(settings, folder), folder, Progress(quiet=True))


def fingerprints(run: RunContext) -> dict[str, object]:
    return {stage.name: stage.fingerprint(run) for stage in STAGES}


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    return {name for name in NAMES if before[name] != after[name]}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return fingerprints(context(tmp_path_factory.mktemp("none")))


def test_every_setting_is_tried() -> None:
    settings = {each.key for each in every() if each.key not in GROUPS}
    parts = {key for key in settings if key.startswith("normalize.")}  # which only make sense together
    assert {*SETTINGS, *parts, "task", "data_dir", "full_weights", "latency_table"} == {*settings, "normalize"}


def test_another_task_makes_everything_again(before: dict[str, object], tmp_path: Path) -> None:
    own = context(tmp_path, task="tests.support.own_tasks:tones", model="tests.support.own_tasks:listener", data=None)
    assert changed(before, fingerprints(own)) >= EVERYTHING


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_makes_those_stages_run_again_that_depend_on_it(
    setting: str, before: dict[str, object], tmp_path: Path
) -> None:
    value, stages = SETTINGS[setting]
    assert changed(before, fingerprints(context(tmp_path, **{setting: value}))) == stages | ALWAYS


def test_what_changed_since_the_last_time_in_a_folder_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(written: str | None, **changes: object) -> str:
        run = context(tmp_path, **changes)
        if written is not None:
            (tmp_path / "run.yaml").write_text(written)
        run.progress = Progress()
        runner._tell_changes(run, run.settings.model_dump(mode="json"))
        return capsys.readouterr().err

    settings = recipes.dump(context(tmp_path).settings)
    assert told(None, seed=7) == ""
    assert told(settings) == ""
    changes = "seed 0 → 7, training.lr 0.1 → 0.2, training.gated_lr 0.05 → 0.1"
    assert told(settings, **{"seed": 7, "training.lr": 0.2}) == (
        f"other settings than the last time in this folder: {changes}\n"
    )
    assert told("setting_of_old: 1\n") == told("model: [\n") == ""


def test_int8_is_calibrated_on_the_data(tmp_path: Path) -> None:
    int8 = {"target": "ort-int8"}
    one, other = (fingerprints(context(tmp_path, **int8, seed=seed)) for seed in (0, 1))
    assert "build" in changed(one, other)


def test_a_latency_budget_depends_on_what_is_measured(tmp_path: Path) -> None:
    limited = {"budget.latency": 0.8}
    before = fingerprints(context(tmp_path, **limited))
    for change in ({"accept.batch": 8}, {"build.tf32": True}, {"target": "ort-int8"}):
        assert "gates" in changed(before, fingerprints(context(tmp_path, **limited, **change)))


def test_a_table_is_measured_again_only_where_its_engines_change(tmp_path: Path) -> None:
    before = gates._table_fingerprint(context(tmp_path))
    narrower = {"data": "tests.stages.test_fingerprint:one_class_less"}
    for change in (
        {"target": "ort-int8"},
        {"build.tf32": True},
        {"gates.blocks": False},
        {"gates.heads": True},
        {"model": "resnet32"},
        narrower,
    ):
        assert gates._table_fingerprint(context(tmp_path, **change)) != before
    for change in ({"gates.freeze_at": 0.2}, {"training.lr": 0.3}, {"seed": 5}, {"gates.min_width": 0.1}):
        assert gates._table_fingerprint(context(tmp_path, **change)) == before


def test_where_files_lie_means_nothing(before: dict[str, object], tmp_path: Path) -> None:
    elsewhere = context(tmp_path, data_dir=tmp_path, latency_table=tmp_path / "table.json")
    assert changed(before, fingerprints(elsewhere)) == set()
    given = [context(tmp_path, full_weights=tmp_path / name) for name in ("a.npz", "b.npz")]
    assert changed(*map(fingerprints, given)) == set()  # what they hold is hashed as a file
    assert changed(before, fingerprints(given[0])) == {"full"}


def test_a_new_version_makes_again_what_takes_minutes(
    before: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = gates._table_fingerprint(context(tmp_path))
    monkeypatch.setattr(stage, "__version__", "9.9.9")
    newer = context(tmp_path)
    assert changed(before, fingerprints(newer)) == {"export", "surgery", "build", "parity", "bundle", "report"}
    assert gates._table_fingerprint(newer) != table


def test_training_is_made_again_only_where_that_is_said(
    before: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "TRAINING", stage.TRAINING + 1)
    assert changed(before, fingerprints(context(tmp_path))) == {"full", "gates"}


def test_the_version_is_that_of_the_package() -> None:
    import polar_deploy

    assert stage.fingerprint({}).program == f"polar_deploy {polar_deploy.__version__}"
    assert f'__version__ = "{polar_deploy.__version__}"' in (ROOT / "polar_deploy/__init__.py").read_text()
