"""Recipes and command line values: what is read, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_deploy import recipes
from polar_deploy.config import Budget, Settings, Training
from polar_deploy.errors import UsageError
from polar_deploy.recipes import dump, find, load, parse_budget, parse_latency, parse_set
from polar_deploy.targets import parse as parse_target

PIPELINES = sorted(recipes.shipped().values())


def refused(folder: Path, text: str, overrides: dict[str, object] | None = None, **options: Any) -> list[str]:
    """The lines of the error that `text` leads to, without the folder."""
    recipe = folder / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError) as error:
        load(recipe, overrides or {}, **options)
    return error.value.what.replace(f"{folder}/", "").splitlines()


# --------------------------------------------------------------------------- what is read


def test_a_recipe_is_found_by_name_or_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(find("cifar10-resnet56"), {}).model == "resnet56"
    with pytest.raises(UsageError, match=r"cifar10-resnet57: no such file.*there are cifar10-resnet56, ") as caught:
        find("cifar10-resnet57")
    assert caught.value.todo == "did you mean cifar10-resnet56?"
    (tmp_path / "digits").write_text("model: resnet32\n")  # a file of one's own comes first
    assert load(find("digits"), {}).model == "resnet32"


@pytest.mark.parametrize(
    ("text", "bound", "percentile"), [("5", 5.0, "p50"), ("p99=0.5", 0.5, "p99"), ("p99.9=7", 7.0, "p99.9")]
)
def test_a_bound_on_a_percentile_of_latency(text: str, bound: float, percentile: str) -> None:
    accept = load(None, {"model": "resnet20", **parse_latency(text)}).accept
    assert (accept.max_latency_ms, accept.latency_percentile) == (bound, percentile)


@pytest.mark.parametrize("text", ["p98=5", "=5", "p99=", "p99=-1", "fast"])
def test_a_bound_on_latency_that_is_none(text: str) -> None:
    options = dict.fromkeys(("accept.max_latency_ms", "accept.latency_percentile"), "--max-latency-ms")
    with pytest.raises(UsageError, match="--max-latency-ms"):
        load(None, {"model": "resnet20", **parse_latency(text)}, options)


@pytest.mark.parametrize("recipe", PIPELINES, ids=lambda path: path.stem)
def test_each_pipeline_is_a_recipe_that_says_what_it_is_for(recipe: Path) -> None:
    settings = load(recipe, {})
    comments = [line for line in recipe.read_text().splitlines() if line.startswith("# ")]
    assert 2 <= len(comments) <= 4
    assert any("Hardware" in line for line in comments)
    assert settings.model in recipe.stem or recipe.stem == settings.data
    assert settings.data in recipe.stem
    assert parse_target(settings.target).name == settings.target


def test_there_is_a_pipeline_for_each_use_case() -> None:
    assert [path.stem for path in PIPELINES] == [
        "cifar10-resnet56",
        "cifar100-resnet56",
        "digits",
        "imagenet-resnet50",
        "tiny-imagenet-resnet18",
    ]


def test_the_command_line_wins_over_the_recipe_and_the_last_value_over_the_first(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: resnet20\nseed: 3\ntraining: {lr: 0.05, epochs: 7}\nbudget: {macs: 0.6}\n")
    settings = load(recipe, {"training.lr": 0.2, "budget": Budget(params=0.7), "data_dir": Path("here")})
    assert settings == Settings(
        model="resnet20",
        seed=3,
        training=Training(lr=0.2, epochs=7),
        budget=Budget(params=0.7),
        data_dir=Path("here"),
    )
    assert load(recipe, {"budget": Budget(params=0.7), "budget.macs": 0.4}).budget == Budget(macs=0.4, params=0.7)
    assert load(None, {"model": "vgg11", "normalize": None}) == Settings(model="vgg11")


def test_a_group_left_empty_has_its_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: resnet20\ntraining:\n  # lr: 0.2\n")
    assert load(recipe, {}) == Settings(model="resnet20")


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: resnet20\ntraining: {weight_decay: 1e-4}\n")
    assert load(recipe, {}).training.weight_decay == 1e-4


@settings(max_examples=50, deadline=None)
@given(
    model=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1),
    lr=st.floats(min_value=1e-30, max_value=1e30),
    seed=st.integers(min_value=0, max_value=2**32 - 1),
    mean=st.none() | st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3),
    folder=st.none() | st.sampled_from(["a", "~/data", "null", "1e5", "with: colon", "#x"]),
)
def test_what_is_dumped_loads_as_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, model: str, lr: float, seed: int, mean: Any, folder: str | None
) -> None:
    values: dict[str, Any] = {"model": model, "seed": seed, "data_dir": folder, "training": {"lr": lr}}
    if mean is not None:
        values["normalize"] = {"mean": mean, "std": [1.0, 2.5, 1e-3]}
    settings = Settings.model_validate(values)
    recipe = tmp_path_factory.getbasetemp() / "dumped.yaml"
    recipe.write_text(dump(settings), encoding="utf-8")
    assert load(recipe, {}) == settings


def test_a_dump_writes_every_default_out() -> None:
    text = dump(Settings(model="resnet20"))
    for key in ("target: ort-fp32", "data_dir: null", "min_speedup: 1.02", "weight_decay: 0.0005", "mode: batch"):
        assert key in text


# --------------------------------------------------------------------------- what is refused


def test_unknown_keys_are_named_with_their_lines_and_the_nearest_key(tmp_path: Path) -> None:
    assert refused(tmp_path, "modl: resnet20\nepochs: 3\ntraining:\n  epoch: 3\n  zzz: 1\n\ntrainng: {lr: 1}\n") == [
        "r.yaml:1: unknown key 'modl'; did you mean 'model'?",
        "r.yaml:2: unknown key 'epochs'; did you mean 'training.epochs'?",
        "r.yaml:4: unknown key 'training.epoch'; did you mean 'training.epochs'?",
        f"r.yaml:5: unknown key 'training.zzz'; known are {', '.join(Training.model_fields)}",
        "r.yaml:7: unknown key 'trainng'; did you mean 'training'?",
    ]
    assert refused(tmp_path, "model: resnet20\n", {"gates.close_frm": 0.1, "gate.freeze_at": 1, "qqq": 1}) == [
        "--set gates.close_frm: unknown key 'gates.close_frm'; did you mean 'gates.close_from'?",
        "--set gate.freeze_at: unknown key 'gate.freeze_at'; did you mean 'gates.freeze_at'?",
        f"--set qqq: unknown key 'qqq'; known are {', '.join(Settings.model_fields)}",
    ]


def test_a_whole_group_on_the_command_line_is_checked_too(tmp_path: Path) -> None:
    assert refused(tmp_path, "model: resnet20\n", {"training": {"zzz": 1, "lr": 0}, "budget": 0.3}) == [
        "--set budget: budget is a group of settings (macs, params, latency), not 0.3",
        "--set training: training.lr is 0 but should be greater than 0",
        f"--set training: unknown key 'training.zzz'; known are {', '.join(Training.model_fields)}",
    ]


def test_wrong_values_are_named_with_their_place_and_what_is_allowed(tmp_path: Path) -> None:
    text = "model: resnet20\nseed: -1\ntraining:\n  lr: .nan\n  init_from: half\nbudget: 0.5\n"
    lines = refused(
        tmp_path, text, {"training.epochs": 0, "accept.batch": "x"}, options={"training.epochs": "--epochs"}
    )
    assert sorted(lines) == [
        "--epochs: training.epochs is 0 but should be greater than or equal to 1",
        "--set accept.batch: accept.batch is 'x' but should be a valid integer",
        "r.yaml:2: seed is -1 but should be greater than or equal to 0",
        "r.yaml:4: training.lr is nan but should be a finite number",
        "r.yaml:5: training.init_from is 'half' but should be 'full' or 'scratch'",
        "r.yaml:6: budget is a group of settings (macs, params, latency), not 0.5",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1", "model is missing: give it in the recipe, or as --set model=VALUE"),
        ("model: 12", "r.yaml:1: model is 12 but should be a valid string"),
        (
            "model: a\ntraining: {momentum: yes}",
            "r.yaml:2: training.momentum takes no true or false (YAML reads yes, no, on and off as such)",
        ),
        (
            "model: a\nnormalize:\n  mean: [0, 0, 0]",
            "r.yaml:3: normalize.std is missing: give it in the recipe, or as --set normalize.std=VALUE",
        ),
        (
            "model: a\n\ngates: {close_from: 0.6, freeze_at: 0.3}",
            "r.yaml:3: gates.close_from (0.6) must lie before gates.freeze_at (0.3)",
        ),
        ("model: a\nbudget: {macs: null}", "r.yaml:2: a budget names at least one of macs, params, latency"),
        ("model: a\nseed: 1\nmodel: b", "r.yaml:3: model is given twice, first in line 1"),
        (
            "model: a\n? [1, 2]\n: 3",
            f"r.yaml:2: unknown key '(a list or mapping)'; known are {', '.join(Settings.model_fields)}",
        ),
    ],
)
def test_one_mistake_one_line(tmp_path: Path, text: str, line: str) -> None:
    assert refused(tmp_path, text) == [line]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("model: a\nseed: [1", "r.yaml:2: not valid YAML: expected"),
        ("model: a\n\tseed: 1", "r.yaml:2: not valid YAML: found character"),
        ("model: a\n---\nmodel: b", "r.yaml:2: not valid YAML: but found another document"),
        ("model: !!python/object/apply:os.system [ls]", "r.yaml:1: not valid YAML: could not determine a constructor"),
        ("training: &t {lr: 0.1, epochs: *t}", "r.yaml:1: not valid YAML: found unconstructable recursive node"),
        ("[" * 600, "r.yaml: not valid YAML: maximum recursion depth"),
        ("model: a\nseed: 2024-13-45", "r.yaml: not valid YAML: month must be"),
        ("model: a\0b", "r.yaml: not valid YAML: unacceptable character"),
        ("- model: a", "r.yaml:1: no settings but a list or a lone value"),
    ],
)
def test_what_is_not_yaml(tmp_path: Path, text: str, start: str) -> None:
    (line, *_) = refused(tmp_path, text)
    assert line.startswith(start)


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read recipe .*gone\.yaml: No such file"):
        load(tmp_path / "gone.yaml", {})
    with pytest.raises(UsageError, match="Is a directory"):
        load(tmp_path, {})


# --------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("training.lr=0.1", ("training.lr", 0.1)),
        ("build.batches=[1, 4, 8]", ("build.batches", [1, 4, 8])),
        ("gates.blocks=false", ("gates.blocks", False)),
        ("data_dir=a=b", ("data_dir", "a=b")),
        ("normalize=", ("normalize", None)),
    ],
)
def test_set_reads_yaml(text: str, pair: tuple[str, object]) -> None:
    assert parse_set(text) == pair


@pytest.mark.parametrize("text", ["training.lr", "=3", "", "a=[1", "a=!!python/none x", "a=2024-13-45"])
def test_set_refuses(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--set "):
        parse_set(text)


def test_budgets() -> None:
    assert parse_budget("0.5") == Budget(macs=0.5)
    assert parse_budget("macs=0.5, params=0.6,latency=.7") == Budget(macs=0.5, params=0.6, latency=0.7)
    assert parse_budget("params=0.6") == Budget(params=0.6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nan", "finite"),
        ("inf", "finite"),
        ("0", "greater than 0"),
        ("1", "less than 1"),
        ("1.5", "less than 1"),
        ("-0.5", "greater than 0"),
        ("50%", "valid number"),
        ("", "valid number"),
        ("macs=0.5,params=2", "params is '2' but should be less than 1"),
        ("mac=0.5", "unknown cost 'mac'; known are macs, params, latency"),
        ("macs=0.5,0.3", "macs is given twice"),
    ],
)
def test_budgets_that_make_no_sense(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_budget(text)
    assert error.value.what.startswith(f"--budget {text}: ")
    assert words in error.value.what
