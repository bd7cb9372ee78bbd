"""A sweep's file: what it may say, which runs it means, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polar_deploy import cli, recipes
from polar_deploy.errors import UsageError
from polar_deploy.sweep.plan import planned
from tests.conftest import ROOT, called

TINY = "settings: {model: 'tests.support.tiny:net', data: digits}\n"


def sweep(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def test_runs_are_targets_by_budgets_by_seeds_over_a_recipe(tmp_path: Path) -> None:
    text = "recipe: digits\nsettings: {training: {epochs: 7}, accept.max_drop: 3}\n"
    text += "budgets: [0.5, 'macs=0.4,params=0.3']\nseeds: [0, 4]\ntargets: [ort-fp32, ov-fp32]\n"
    runs = planned(sweep(tmp_path, text), tmp_path)
    assert [(run.settings.target, run.settings.budget.asked(), run.settings.seed) for run in runs] == [
        (target, budget, seed)
        for target in ("ort-fp32", "ov-fp32")
        for budget in ({"macs": 0.5}, {"macs": 0.4, "params": 0.3})
        for seed in (0, 4)
    ]
    assert {(run.settings.model, run.settings.training.epochs, run.settings.accept.max_drop) for run in runs} == {
        ("resnet20", 7, 3.0)
    }
    assert runs[1].folder == tmp_path / "resnet20-digits-ort-fp32-macs0.5-s4"
    assert len({run.folder for run in runs}) == 8


def test_seeds_and_targets_are_those_of_the_settings_where_they_are_left_out(tmp_path: Path) -> None:
    (run,) = planned(sweep(tmp_path, f"{TINY}budgets: [0.5]\n"), tmp_path)
    assert (run.settings.seed, run.settings.target) == (0, "ort-fp32")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TINY, "mine.yaml: budgets is missing"),
        (f"{TINY}budgets: []\n", "mine.yaml: budgets is [] but should have at least 1 item"),
        (f"{TINY}budgets: [0.5]\nseed: [1]\n", "mine.yaml: unknown key 'seed'; did you mean 'seeds'?"),
        (f"{TINY}budgets: [0.5]\nseeds: 3\n", "mine.yaml: seeds is 3 but should be a list, such as [3]"),
        (f"{TINY}budgets: [0.5]\nseeds: [one]\n", "mine.yaml: seeds.0 is 'one' but should be a valid integer"),
        (f"{TINY}budgets: [1.5]\n", "--budget 1.5"),
        (
            f"{TINY}budgets: [0.5, macs=0.5]\n",
            "two runs are the same, tests.support.tiny.net-digits-ort-fp32-macs0.5-s0",
        ),
        (f"{TINY}budgets: [0.5]\ntargets: [toaster]\n", "toaster"),
        ("settings: {model: resnet20, training: {epoch: 3}}\nbudgets: [0.5]\n", "settings.training.epoch: unknown key"),
        ("recipe: digitz\nbudgets: [0.5]\n", "no recipe of that name"),
        ("- 1\n", "mine.yaml: the file is no mapping of keys to values"),
        ("a: [\n", "mine.yaml: not valid YAML"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        planned(sweep(tmp_path, text), tmp_path)
    assert said in caught.value.what


def test_the_shipped_sweep_lists_its_runs_and_is_no_recipe() -> None:
    outcome = called(cli.main, "sweep", ROOT / "pipelines" / "sweep-digits.yaml", "--dry-run", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    runs = json.loads(outcome.out)
    assert len(runs) == 6
    assert runs[0] == "resnet20-digits-ort-fp32-macs0.6-s0"
    assert "sweep-digits" not in recipes.shipped()


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    outcome = called(cli.main, "sweep", tmp_path / "none.yaml")
    assert outcome.code == 2
    assert "cannot read" in outcome.err
    assert called(cli.main, "sweep", sweep(tmp_path, TINY), "--gpus-per-run", "-1").code == 2
