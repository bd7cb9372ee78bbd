"""Settings in and out: YAML recipes, `--set key=value`, `--budget`, with errors that name the line or the option."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from polar_deploy.config import Budget, Settings
from polar_deploy.errors import UsageError
from polar_deploy.settings import GROUPS, kinds

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_PLACES = (Path(__file__).parent / "pipelines", Path(__file__).parents[1] / "pipelines")  # installed, in a checkout
SHIPPED = next((place for place in _PLACES if place.is_dir()), _PLACES[0])  # recipes that come with the package
_BUDGET_HELP = "give a share of the full network's cost between 0 and 1, such as 0.5 or macs=0.5,params=0.6"


def load(recipe: Path | None, overrides: Mapping[str, object], options: Mapping[str, str] | None = None) -> Settings:
    """Read a recipe, then lay the command line's values over it.

    Relative paths, in a recipe too, start at the current folder.

    Args:
        recipe: YAML file, or None for the defaults.
        overrides: values by dotted key, such as "training.lr"; a whole group, such as a `Budget`, may be given too.
        options: how the user wrote a key, for messages, such as {"training.lr": "--lr"}; else it is "--set KEY".

    Raises:
        UsageError: no such file, not YAML, unknown or repeated keys, wrong values; one line for each, with its place.
    """
    draft = _Draft()
    if recipe is not None:
        for key, value, place in _read(recipe):
            draft.put(key, value, place)
    for key, value in overrides.items():
        draft.put(key, value, place=(options or {}).get(key, f"--set {key}"))
    return draft.settings()


def find(name: str) -> Path:
    """The recipe of that name: a YAML file, or one that comes with the package, such as cifar10-resnet56.

    Raises:
        UsageError: there is neither; the message lists those that come with the package.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path  # whoever reads it says what is wrong with it
    known = shipped()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise UsageError(
        f"--recipe {name}: no such file, and no recipe of that name; there are {', '.join(sorted(known))}",
        f"did you mean {near[0]}?" if near else "give a YAML file, or one of these names",
    )


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name; beside them lie sweeps over them."""
    return {path.stem: path for path in SHIPPED.glob("*.yaml") if not path.stem.startswith("sweep-")}


def dump(settings: Settings) -> str:
    """Write settings as YAML, every default written out: `load` reads the same settings back."""
    values = settings.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True)


def parse_set(text: str) -> tuple[str, object]:
    """Read the "key=value" of a `--set` option; the value is YAML, such as 0.1, true or [2.0, 0.5]."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text}: no key and value", "write --set KEY=VALUE, such as --set training.lr=0.05")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--set {text}: the value is not YAML", "quote a value that has signs in it") from error


def parse_budget(text: str) -> Budget:
    """Read a budget as the command line has it: "0.5", which is MACs, or "macs=0.5,params=0.6,latency=0.7"."""
    shares: dict[str, str] = {}
    for part in text.split(","):
        name, equals, share = (piece.strip() for piece in part.partition("="))
        if not equals:
            name, share = "macs", name
        if name not in Budget.model_fields:
            raise UsageError(f"--budget {text}: unknown cost {name!r}; known are macs, params, latency", _BUDGET_HELP)
        if name in shares:
            raise UsageError(f"--budget {text}: {name} is given twice", _BUDGET_HELP)
        shares[name] = share
    try:
        return Budget.model_validate(shares)
    except ValidationError as error:
        raise UsageError(f"--budget {text}: {'; '.join(map(_sentence, error.errors()))}", _BUDGET_HELP) from error


def parse_batches(text: str) -> list[int]:
    """Read the batch sizes of an engine: "1,8,64" are min, opt and max; "16" is all three."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--batch {text}: not one size, or three", "give min, opt and max: 1,8,64")
    sizes = [int(part) for part in parts]
    return sizes * 3 if len(sizes) == 1 else sizes


def parse_latency(text: str) -> dict[str, object]:
    """Read a bound on latency: "5" milliseconds of the median, "p99=5" of the 99th percentile; by setting."""
    percentile, equals, bound = text.rpartition("=")
    return {"accept.max_latency_ms": bound, **({"accept.latency_percentile": percentile} if equals else {})}


# --------------------------------------------------------------------------- YAML, with the place of each key


def _read(recipe: Path) -> Iterator[tuple[str, object, str]]:
    """Yield (dotted key, value, "file:line") of each setting in a YAML file."""
    try:
        loader = yaml.SafeLoader(Path(recipe).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            yield from _entries(loader, root, "", recipe)
        elif root is not None:
            raise UsageError(
                f"{recipe}:1: no settings but a list or a lone value", "write lines such as `model: resnet20`"
            )
    except OSError as error:
        raise UsageError(f"cannot read recipe {recipe}: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{recipe}{line}: not valid YAML: {problem}", "correct the file there") from error


def _entries(
    loader: yaml.SafeLoader, node: yaml.MappingNode, above: str, recipe: Path
) -> Iterator[tuple[str, object, str]]:
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "(a list or mapping)"
        key, line = f"{above}{name}", key_node.start_mark.line + 1
        if key in lines:
            raise UsageError(f"{recipe}:{line}: {key} is given twice, first in line {lines[key]}", "remove one of them")
        lines[key] = line
        if key in GROUPS and isinstance(value_node, yaml.MappingNode):
            yield from _entries(loader, value_node, f"{key}.", recipe)
        elif key not in GROUPS or not value_node.tag.endswith(":null"):  # a group left empty has its defaults
            yield key, loader.construct_object(value_node, deep=True), f"{recipe}:{line}"


# --------------------------------------------------------------------------- from values to settings


_KEYS = {key: kind for key, kind in kinds().items() if key}
_RENAMED = {  # what settings and groups were called once: an error names the key of today
    "build.edges": "build.io_dtype",
    "gates.freeze": "gates.freeze_at",
    "gates.start": "gates.close_from",
    "training.final": "training.train_on_validation",
    "training.start": "training.init_from",
    "verdict": "accept",
}


@dataclass
class _Draft:
    """Plain values on their way to `Settings`, with the place each came from and what is wrong with them."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # dotted key -> "recipe.yaml:4" or "--epochs"
    problems: list[str] = field(default_factory=list)

    def put(self, key: str, value: object, place: str) -> None:
        """Lay one value, or a whole group, over what is there."""
        if key not in _KEYS:
            self.problems.append(f"{place}: {_unknown(key)}")
            return
        # pydantic would take true for 1
        if isinstance(value, bool) and bool not in (_KEYS[key], *get_args(_KEYS[key])):
            self.problems.append(f"{place}: {key} takes no true or false (YAML reads yes, no, on and off as such)")
            return
        *groups, name = key.split(".")
        values = self.values
        for group in groups:
            if not isinstance(values.get(group), dict):
                values[group] = {}
            values = values[group]
        values[name] = value.model_dump() if isinstance(value, BaseModel) else value
        self.places = {k: v for k, v in self.places.items() if not k.startswith(f"{key}.")} | {key: place}

    def settings(self) -> Settings:
        """Validate: all problems in one UsageError, a line each."""
        problems = self.problems
        if not problems:
            try:
                return Settings.model_validate(self.values)
            except ValidationError as error:
                problems = [self._place(detail) + _sentence(detail) for detail in error.errors()]
        raise UsageError("\n".join(problems), "correct that, then give the command again")

    def _place(self, detail: ErrorDetails) -> str:
        """Find where the value, the group around it, or the first value of that group was written."""
        names = [str(name) for name in detail["loc"]]
        for length in range(len(names), 0, -1):
            key = ".".join(names[:length])
            for known, place in self.places.items():
                if known == key or known.startswith(f"{key}."):
                    return f"{place}: "
        return ""


def _unknown(key: str) -> str:
    """Say that there is no such key: what it is called today, or the nearest one."""
    group, _, name = key.partition(".")
    today = _RENAMED.get(key) or (f"{_RENAMED[group]}.{name}" if group in _RENAMED else None)
    return f"{key} is called {today} now" if today in _KEYS else f"unknown key {key!r}; {_hint(key)}"


def _hint(key: str) -> str:
    """Name the known key that was probably meant, or all keys of the group."""
    above, _, name = key.rpartition(".")
    if above in GROUPS:
        siblings = {sibling: f"{above}.{sibling}".lstrip(".") for sibling in GROUPS[above].model_fields}
        anywhere = {known.rpartition(".")[2]: known for known in reversed(_KEYS)}
        near = _nearest(name, siblings) or _nearest(name, anywhere)
    else:
        siblings = anywhere = {known: known for known in _KEYS}
        near = _nearest(key, anywhere)
    return f"did you mean {near!r}?" if near else f"known are {', '.join(siblings)}"


def _nearest(name: str, keys: dict[str, str]) -> str | None:
    matches = difflib.get_close_matches(name, keys, n=1)
    return keys[matches[0]] if matches else None


def _sentence(detail: ErrorDetails) -> str:
    """Say in one sentence what pydantic complains about."""
    key = ".".join(str(name) for name in detail["loc"])
    if detail["type"] == "missing":
        return f"{key} is missing: give it in the recipe, or as --set {key}=VALUE"
    if detail["type"] == "extra_forbidden":
        return _unknown(key)
    if detail["type"] == "model_type":
        return f"{key} is a group of settings ({', '.join(GROUPS[key].model_fields)}), not {detail['input']!r}"
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    asked = detail["msg"].removeprefix("Input ").partition(", unable to parse")[0]
    return f"{key} is {detail['input']!r} but {asked}"
