"""Words that were retired do not come back: as identifiers, settings or keys of JSON (docs/decisions/019)."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from polar_deploy.errors import UsageError
from polar_deploy.recipes import load
from polar_deploy.settings import kinds

PACKAGE = Path(__file__).parents[1] / "polar_deploy"

IDENTIFIERS = {  # retired: today's
    "Edge": "IOTensor",
    "Fit": "TrainingJob",
    "Here": "AvailableEngines",
    "Mix": "MixingWeights",
    "Sized": "ShapeDriven",
    "Stated": "UnsupportedOp",
    "Stored": "DetachedModel",
    "Told": "ShapeInput",
    "Verdict": "AcceptanceCriteria",
    "Wall": "Unsupported",
    "aloud": "echo",
    "edges": "io_tensors, io_dtype",
    "endangered": "must_keep_values",
    "engines_here": "open_engines",
    "fragile": "can_be_nonfinite",
    "gone": "is_removed",
    "heard": "drain_errors",
    "keep_edges": "keep_io_types",
    "kept_engine": "cached_engine",
    "last_words": "recent_errors",
    "risky": "nonfinite_risk",
    "settled": "after_cut",
    "told_by": "shape_input_index",
    "unsaid": "omit_settings",
    "was_other": "has_other_settings",
    "why_not_as_delivered": "plan_rejection",
    "worth_another": "needs_another_round",
}
MODULES = {"arithmetic", "maths", "model", "numbers", "regroup", "stored", "trace", "walls"}  # of surgery
SETTINGS = {
    "build.edges": "build.io_dtype",
    "gates.freeze": "gates.freeze_at",
    "gates.start": "gates.close_from",
    "training.final": "training.train_on_validation",
    "training.start": "training.init_from",
    "verdict": "accept",
    "verdict.max_drop": "accept.max_drop",
    "verdict.batch": "accept.batch",
}
JSON_KEYS = {
    "edges": "io_dtype",
    "kept": "high_precision_layers",
    "largest": "max",
    "smallest": "min",
    "usual": "opt",
    "walls": "unsupported",
}


def identifiers(code: str) -> Iterator[tuple[str, int]]:
    """Each name that a module gives, takes or uses, with its line; not the words of texts and comments."""
    for node in ast.walk(ast.parse(code)):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, line
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, line
            case ast.alias(name=name, asname=other):
                yield from ((each, line) for each in (name.rpartition(".")[2], other) if each)
            case _:
                pass


def keys(schema: object) -> Iterator[str]:
    """The names of all properties in a JSON Schema."""
    if isinstance(schema, dict):
        for word, value in schema.items():
            if word == "properties":
                yield from value
            yield from keys(value)
    elif isinstance(schema, list):
        for each in schema:
            yield from keys(each)


def test_identifiers_are_found_wherever_they_stand() -> None:
    code = "from a.b import c as d\nclass E:\n    f: int = g(h=i.j)\n    def k(self, m): return 'n'  # o\n"
    assert {name for name, _ in identifiers(code)} == {*"cdEfghijkm", "int", "self"}


def test_no_identifier_is_a_retired_word() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}, today {IDENTIFIERS[name]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, line in identifiers(path.read_text(encoding="utf-8"))
        if name in IDENTIFIERS
    ]
    assert found == []


def test_no_module_of_surgery_has_a_retired_name() -> None:
    assert {path.stem for path in (PACKAGE / "surgery").rglob("*.py")} & MODULES == set()


def test_no_setting_has_a_retired_name() -> None:
    assert kinds().keys() & SETTINGS.keys() == set()
    assert {today for today in SETTINGS.values() if today not in kinds()} == set()


@pytest.mark.parametrize("retired", SETTINGS)
def test_a_retired_setting_is_an_error_that_names_the_one_of_today(retired: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    group, _, name = retired.partition(".")
    recipe.write_text(f"model: resnet20\n{group}:\n  {name}: 1\n" if name else f"{group}: {{}}\n")
    with pytest.raises(UsageError) as option:
        load(None, {"model": "resnet20", retired: 1})
    assert option.value.what == f"--set {retired}: {retired} is called {SETTINGS[retired]} now"
    with pytest.raises(UsageError) as line:
        load(recipe, {})
    assert f"is called {SETTINGS[retired]}" in line.value.what or f"is called {SETTINGS[group]}" in line.value.what


@pytest.mark.parametrize("schema", sorted((PACKAGE / "schemas").glob("*.json")), ids=lambda path: path.name)
def test_no_key_of_a_file_is_a_retired_word(schema: Path) -> None:
    assert set(keys(json.loads(schema.read_text(encoding="utf-8")))) & JSON_KEYS.keys() == set()
