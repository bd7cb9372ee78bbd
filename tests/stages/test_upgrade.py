"""A new version of the program on the folder of an old one: minutes are spent again, hours are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polar_deploy import cli
from polar_deploy.documents.latency_table import MeasuredTable
from polar_deploy.engines import table
from polar_deploy.progress import Progress
from polar_deploy.stages import NAMES, stage
from tests.conftest import MINIATURE, Miniature, Outcome, called, contents, polar
from tests.support.kills import differences
from tests.test_latency_budget import TINY
from tests.test_latency_budget import _measured as measured_table


def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the program is another version."""
    monkeypatch.setattr(stage, "__version__", "9.9.9")


def interrupted(stage: str, *arguments: object) -> Outcome:
    """Run the command until the first epoch of a stage is over, then Ctrl-C."""
    whole = Progress.epoch

    def epoch(progress: Progress, **facts: Any) -> None:
        whole(progress, **facts)
        if progress._name == stage:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "epoch", epoch)
        return polar(*arguments)


def test_surgery_and_what_follows_are_made_again_and_training_is_not(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = miniature.copy(tmp_path / "run")
    newer(monkeypatch)
    outcome = polar(*MINIATURE, "--out", folder)
    assert outcome.up_to_date == ["full", "gates"]
    assert outcome.ran == list(NAMES[2:])
    assert "surgery: made anew, what is there is by polar_deploy 0.1.0 and not polar_deploy 9.9.9" in outcome.err
    stamps = [f"stamps/{name}.json" for name in NAMES[2:]]
    assert [name for name in differences(miniature.folder, folder) if name not in stamps] == []
    assert polar(*MINIATURE, "--out", folder).ran in ([], ["parity", "bundle", "report"])  # undecided: measured again


def test_a_bundle_of_what_another_version_exported_is_made(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained and cut by one version, handed over by another: settings are the same, so the bundle tells the truth."""
    folder = miniature.copy(tmp_path / "run", "bundle", "report")
    newer(monkeypatch)
    outcome = polar(*MINIATURE, "--out", folder, "--from", "bundle")
    assert outcome.ran == ["bundle", "report"], outcome.err
    assert (folder / "bundle/manifest.json").is_file()


def test_what_is_left_of_the_run_before_is_told(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = miniature.copy(tmp_path / "run")
    newer(monkeypatch)
    until = (*MINIATURE, "--out", folder, "--until", "surgery")
    outcome = polar(*until)
    assert outcome.ran == ["export", "surgery"]
    assert (
        "build, parity, bundle, report: what is there is of the run before; it is made anew without --until"
        in outcome.err
    )
    assert "of the run before" not in polar(*until).err


def test_what_is_shown_of_a_run_before_is_told(miniature: Miniature, tmp_path: Path) -> None:
    folder = miniature.copy(tmp_path / "run")
    shown = (("gates", "show", folder), ("report", "view", folder, "--no-browser"), ("report", "compare", folder))
    assert [called(cli.main, *each).err for each in shown] == [""] * 3
    for made in (("--epochs", "1", "--until", "full"), ("--until", "full")):
        assert polar(*MINIATURE, "--out", folder, *made).code == 0
        read = "full/weights.safetensors is another one than stage gates has read"
        told = [called(cli.main, *each).err for each in shown]
        before = made[0] == "--until"  # the same weights again, and a log with other seconds, which the report reads
        assert [f"warning: this is of an earlier run in {folder}: " in each for each in told] == [
            not before,
            True,
            True,
        ]
        assert [read in each for each in told] == [not before] * 3
        settings = f"{folder / 'run.yaml'} has other settings"
        assert [settings in each for each in told] == [False, not before, not before]
    (folder / "stamps/gates.json").unlink()
    assert "stage gates has begun again and not ended" in called(cli.main, *shown[0]).err


def test_a_half_trained_network_goes_on(miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = miniature.copy(tmp_path / "run", *NAMES[1:])
    assert interrupted("gates", *MINIATURE, "--out", folder).code == 130
    newer(monkeypatch)
    outcome = polar(*MINIATURE, "--out", folder, "--until", "gates")
    assert "gates: goes on after epoch 1 of 3" in outcome.err
    gated = {name: digest for name, digest in contents(folder).items() if name.startswith("gated/")}
    del gated["gated/training.jsonl"]  # has seconds in it
    assert gated.items() <= contents(miniature.folder).items()


def test_a_network_that_is_trained_otherwise_now_begins_again_and_says_so(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = miniature.copy(tmp_path / "run", *NAMES[1:])
    assert interrupted("gates", *MINIATURE, "--out", folder).code == 130
    monkeypatch.setattr(stage, "TRAINING", 2)
    outcome = polar(*MINIATURE, "--out", folder, "--until", "gates")
    assert outcome.ran == ["full", "gates"]
    assert "full: made anew, what is there is by training 1 and not training 2" in outcome.err
    assert "gates: begins again: its checkpoint is damaged, or of other settings, data or training" in outcome.err
    assert "goes on" not in outcome.err
    assert f"gates: what was trained before is kept in {folder / 'gates.before'}\n" in outcome.err
    assert (folder / "gates.before/checkpoint.safetensors").is_file()


def test_what_other_settings_trained_is_kept(miniature: Miniature, tmp_path: Path) -> None:
    folder = miniature.copy(tmp_path / "run")
    until = ("--out", folder, "--until", "gates")
    outcome = polar(*MINIATURE, *until, "--set", "training.full_epochs=1")
    assert outcome.ran == ["full", "gates"]
    whole = contents(miniature.folder)
    kept = {"full": ("weights.safetensors", "training.jsonl")}
    kept["gated"] = (*kept["full"], "gates.json")
    for place, name in (("full", "full"), ("gated", "gates")):
        assert f"{name}: what was trained before is kept in {folder / name}.before\n" in outcome.err
        here = contents(folder / f"{name}.before")
        assert here == {file: whole[f"{place}/{file}"] for file in kept[place]}
    outcome = polar(*MINIATURE, *until)
    assert f"full: what was trained before is kept in {folder / 'full'}.before-2\n" in outcome.err
    kept_so_far = sorted(path.name for path in folder.glob("*.before*"))
    assert kept_so_far == ["full.before", "full.before-2", "gates.before", "gates.before-2"]
    assert polar(*MINIATURE, *until).up_to_date == ["full", "gates"]
    assert sorted(path.name for path in folder.glob("*.before*")) == kept_so_far


def test_the_budget_of_a_half_trained_network_does_not_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(*_: object, **__: object) -> MeasuredTable:
        measured.append("a table")
        return measured_table(seconds=float(len(measured)))

    monkeypatch.setattr(table, "measure", measure)
    run = tmp_path / "run"
    command = (*TINY, "--budget", "latency=0.8", "--epochs", "2", "--out", run)
    assert interrupted("gates", *command).code == 130
    begun_with = (run / "latency-table.json").read_bytes()
    newer(monkeypatch)
    outcome = polar(*command)
    assert (outcome.code, len(measured)) == (0, 1)
    assert "gates: goes on after epoch 1 of 2" in outcome.err
    assert (run / "latency-table.json").read_bytes() == begun_with
    (run / "stamps/gates.json").unlink()  # nothing is half trained any more: measured by the new version
    assert polar(*command).ran == ["gates"]
    assert len(measured) == 2
