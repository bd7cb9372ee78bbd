"""What a sweep is: a YAML file that says what its runs share, and in what they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polar_deploy import recipes
from polar_deploy.config import Settings
from polar_deploy.errors import UsageError, first_line
from polar_deploy.resolved import ResolvedSettings
from polar_deploy.settings import GROUPS
from polar_deploy.stages.resolve import choose_target, default_folder, resolve

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Sweep(BaseModel):
    """A sweep as its file has it.

    Attributes:
        recipe: a YAML file, or the name of a recipe that comes with the package.
        settings: of all runs, over those of the recipe; in groups, as in a recipe.
        budgets: as for --budget.
        seeds, targets: those of the settings, where they are left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recipe: str | None = None
    settings: dict[str, Any] = {}
    budgets: Annotated[list[str | float], Field(min_length=1)]
    seeds: Annotated[list[int] | None, Field(min_length=1)] = None
    targets: Annotated[list[str] | None, Field(min_length=1)] = None


@dataclass(frozen=True)
class Planned:
    """One run of a sweep, in a folder of its own."""

    settings: ResolvedSettings
    folder: Path

    @property
    def name(self) -> str:
        """Of its folder, which tells budget, target and seed."""
        return self.folder.name


def read(path: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        UsageError: no such file, not YAML, or not what a sweep is; a line for each problem.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "give the YAML file of a sweep") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {first_line(error)}", "correct the file") from error
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        lines = [f"{path}: {_sentence(each)}" for each in error.errors()]
        known = ", ".join(Sweep.model_fields)
        raise UsageError("\n".join(lines), f"a sweep has {known}; budgets have to be there") from error


def _sentence(detail: ErrorDetails) -> str:
    """Say in one sentence what pydantic complains about."""
    key, found, kind = ".".join(map(str, detail["loc"])), detail["input"], detail["type"]
    if not key:
        return "the file is no mapping of keys to values"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "extra_forbidden":
        near = get_close_matches(key, Sweep.model_fields, n=1)
        return f"unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}"
    if kind == "list_type":
        return f"{key} is {found!r} but should be a list, such as [{found}]"
    return f"{key} is {found!r} but {detail['msg'].removeprefix('Input ').replace('List should', 'should')}"


def planned(path: Path, folder: Path) -> list[Planned]:
    """The runs of a sweep, in order of targets, budgets and seeds.

    Args:
        path: its file.
        folder: where its runs have their folders.

    Raises:
        UsageError: the file is not what a sweep is, a setting is wrong, or two runs are the same.
    """
    sweep = read(path)
    recipe = None if sweep.recipe is None else recipes.find(sweep.recipe)
    shared = dict(_dotted(sweep.settings))
    targets: Sequence[str | None] = sweep.targets or [None]
    seeds: Sequence[int | None] = sweep.seeds or [None]
    runs: dict[Path, Planned] = {}
    for target, budget, seed in product(targets, sweep.budgets, seeds):
        own: dict[str, object] = {"budget": recipes.parse_budget(str(budget))}
        own |= {key: value for key, value in (("target", target), ("seed", seed)) if value is not None}
        settings = choose_target(_settings(path, recipe, shared, own))
        place = folder / default_folder(settings).name
        if place in runs:
            raise UsageError(f"{path}: two runs are the same, {place.name}", "give each budget, seed and target once")
        runs[place] = Planned(resolve(settings, place), place)
    return list(runs.values())


def _settings(path: Path, recipe: Path | None, shared: Mapping[str, object], own: Mapping[str, object]) -> Settings:
    places = {key: f"{path}: settings.{key}" for key in shared} | {key: f"{path}: {key}s" for key in own}
    return recipes.load(recipe, {**shared, **own}, places)


def _dotted(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, object]]:
    """Settings by dotted key; what is no group of settings is a value, whatever it is."""
    for name, value in values.items():
        key = f"{above}.{name}".lstrip(".")
        if key in GROUPS and isinstance(value, dict):
            yield from _dotted(value, key)
        else:
            yield key, value
