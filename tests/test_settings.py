"""`polar-deploy settings`: every setting, with what people are told of it, from the one place that declares it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from polar_deploy import cli, recipes, settings
from polar_deploy.config import Settings
from polar_deploy.pipeline import add_arguments
from tests.conftest import Outcome, called

SNAPSHOT = Path(__file__).parent / "snapshots" / "settings.yaml"


def listed(*words: str) -> Outcome:
    return called(cli.main, "settings", *words)


def test_every_setting_with_default_unit_and_meaning() -> None:
    """What a user sees: whoever changes a setting changes this file, and sees what that means for recipes."""
    outcome = listed()
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == SNAPSHOT.read_text(encoding="utf-8")


def test_what_is_printed_is_a_recipe_of_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.sub("^model: null ", "model: resnet20 ", listed().out), encoding="utf-8")
    assert recipes.load(recipe, {}) == Settings(model="resnet20")


def test_commented_groups_can_be_used(tmp_path: Path) -> None:
    text = re.sub("^model: null ", "model: resnet20 ", listed().out)
    text = re.sub("^budget: null ", "budget: ", text, flags=re.MULTILINE)
    text = re.sub("^#   macs: null ", "  macs: 0.5 ", text, flags=re.MULTILINE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    budget = recipes.load(recipe, {}).budget
    assert budget is not None
    assert budget.asked() == {"macs": 0.5}


def _leaves(document: dict[str, Any], above: str = "") -> set[str]:
    """Dotted keys of what is no group."""
    found: set[str] = set()
    for name, value in document.items():
        found |= _leaves(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}"}
    return found


def test_none_is_forgotten() -> None:
    """All that a run.yaml has, and what groups hold that are left out."""
    keys = _leaves(Settings(model="resnet20").model_dump(mode="json"))
    keys |= {"budget.macs", "budget.params", "budget.latency", "normalize.mean", "normalize.std"}
    assert {each.key for each in settings.every()} == keys
    for each in settings.every():
        assert each.about.meaning, each.key
        could_be_none = each.default is None and not each.required
        assert bool(each.about.unset) == could_be_none, each.key


def test_json_has_the_same() -> None:
    entries = {entry["key"]: entry for entry in json.loads(listed("--json").out)}
    assert list(entries) == [each.key for each in settings.every()]
    assert entries["accept.max_drop"] == {
        "key": "accept.max_drop",
        "default": 1.0,
        "required": False,
        "meaning": "accuracy that the compressed network may lose",
        "unit": "points",
        "unset": None,
        "choices": None,
        "option": "--max-drop",
    }
    assert entries["training.amp"]["choices"] == ["auto", "fp32", "bf16"]
    assert entries["model"]["required"]


def test_every_choice_can_be_given_as_it_is_listed() -> None:
    """YAML has words of its own: off, no, null."""
    choices = [word for entry in json.loads(listed("--json").out) for word in entry["choices"] or ()]
    assert choices
    assert [yaml.safe_load(str(word)) for word in choices] == choices


def test_words_choose(tmp_path: Path) -> None:
    outcome = listed("latency_table", "CUTOUT")
    assert [line.split(":")[0].strip() for line in outcome.out.splitlines()] == ["latency_table", "training", "cutout"]
    assert yaml.safe_load(outcome.out) == {"latency_table": None, "training": {"cutout": 0}}
    inner = listed("multiply-accumulates").out
    assert [line.split(":")[0] for line in inner.splitlines()] == ["# budget", "#   macs"]
    assert yaml.safe_load(inner) is None


def test_no_such_word() -> None:
    outcome = listed("nonsense", "rubbish")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "error: no setting has 'nonsense' or 'rubbish' in its name or meaning\n"
        "  what to do: leave the words out to see all of them\n"
    )


# --------------------------------------------------------------------------- the options that are made of them


def parser() -> Any:
    import argparse

    made = argparse.ArgumentParser()
    add_arguments(made)
    return made


OPTIONS = {
    "--model": "x",
    "--task": "classification",
    "--target": "trt-fp16",
    "--data": "digits",
    "--data-dir": "x",
    "--full-weights": "x",
    "--budget": "0.5",
    "--align": "4",
    "--device": "rk3588",
    "--epochs": "3",
    "--full-epochs": "4",
    "--seed": "1",
    "--max-drop": "2",
    "--accuracy-rule": "point",
    "--min-speedup": "1.5",
    "--verdict-batch": "8",
    "--max-latency-ms": "p99=5",
    "--batch": "16",
    "--latency-table": "x",
    "--golden": "random",
}
KEYS = {  # option: the settings it gives, where they are not named as it is
    "--epochs": {"training.epochs": 3},
    "--full-epochs": {"training.full_epochs": 4},
    "--max-drop": {"accept.max_drop": 2.0},
    "--accuracy-rule": {"accept.accuracy_rule": "point"},
    "--min-speedup": {"accept.min_speedup": 1.5},
    "--verdict-batch": {"accept.batch": 8},
    "--max-latency-ms": {"accept.max_latency_ms": 5.0, "accept.latency_percentile": "p99"},
    "--batch": {"build.batches": [16, 16, 16]},
    "--budget": {"budget": {"macs": 0.5, "params": None, "latency": None}},
    "--golden": {"bundle.golden": "random"},
    "--align": {"align": 4},
    "--seed": {"seed": 1},
}

SWITCHES = {
    "with-full": "bundle.full",
    "skip-broken": "skip_broken",
    "deterministic": "training.deterministic",
}  # options for yes and no


def test_every_option_of_a_setting_is_tried() -> None:
    options = {each.about.option.partition(" ")[0] for each in settings.every()} - {""}
    assert options == {*OPTIONS, *(f"--{name}" for name in SWITCHES)}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_gives_its_setting(option: str) -> None:
    from polar_deploy import pipeline

    value = OPTIONS[option]
    given = [option, value, *([] if option == "--model" else ["--model", "x"])]
    if option == "--batch":
        given += ["--verdict-batch", "16"]
    document = pipeline._settings(parser().parse_args(given)).model_dump(mode="json")
    for key, expected in KEYS.get(option, {option.removeprefix("--").replace("-", "_"): value}).items():
        found: Any = document
        for name in key.split("."):
            found = found[name]
        assert found == expected, key


@pytest.mark.parametrize("no", ["", "no-"])
@pytest.mark.parametrize("option", SWITCHES)
def test_an_option_for_yes_and_no(option: str, no: str) -> None:
    from polar_deploy import pipeline

    value: Any = pipeline._settings(parser().parse_args(["--model", "x", f"--{no}{option}"]))
    for part in SWITCHES[option].split("."):
        value = getattr(value, part)
    assert value is not bool(no)


def test_help_tells_defaults_from_the_declaration() -> None:
    text = " ".join(parser().format_help().split())
    assert "--max-drop POINTS accuracy that the compressed network may lose (default: 1.0)" in text
    assert "the drop's whole 95 % interval, or the drop as counted (default: interval)" in text
    assert "(default: 1,8,64)" in text
    assert "(default: yes)" in text
