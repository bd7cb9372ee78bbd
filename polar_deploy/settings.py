"""Print every setting with its default, unit and meaning, as a recipe.

What is printed is YAML: write it to a file, give it a model, change what you want, and run it with --recipe FILE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from polar_deploy.config import About, Settings
from polar_deploy.errors import UsageError

_COMMENT = 34  # column


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: dotted, such as "training.lr".
        kind: its type.
        default: as it is written in a recipe; None too where it has to be given.
        required: whether it has to be given.
        about: what people are told of it.
    """

    key: str
    kind: Any
    default: Any
    required: bool
    about: About

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it can take, where these are few words."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


def _groups(model: type[BaseModel], name: str = "") -> dict[str, type[BaseModel]]:
    """Find the groups of settings by dotted name; the outermost is ""."""
    found = {name: model}
    for key, info in model.model_fields.items():
        if inner := _group(info):
            found |= _groups(inner, f"{name}.{key}".lstrip("."))
    return found


def _group(info: FieldInfo) -> type[BaseModel] | None:
    """The group that a field holds; `Normalize | None` is one too."""
    kinds = (info.annotation, *get_args(info.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


GROUPS = _groups(Settings)


def kinds() -> dict[str, Any]:
    """The type of each setting and of each group but the outermost, by dotted key."""
    return {
        f"{group}.{key}".lstrip("."): info.annotation
        for group, model in GROUPS.items()
        for key, info in model.model_fields.items()
    }


def every(model: type[BaseModel] = Settings, above: str = "") -> Iterator[Setting]:
    """All settings in the order of a recipe. Groups that may be left out as a whole come before what they hold."""
    for name, info in model.model_fields.items():
        key = f"{above}.{name}".lstrip(".")
        for about in info.metadata:
            if isinstance(about, About):
                default = None if info.is_required() else info.default
                yield Setting(key, info.annotation, _plain(default), info.is_required(), about)
        if inner := _group(info):
            yield from every(inner, key)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `polar-deploy settings`."""
    parser.add_argument("words", metavar="WORD", nargs="*", help="only settings with one of these in name or meaning")
    parser.add_argument("--json", action="store_true", help="print them as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the settings."""
    chosen = [each for each in every() if not arguments.words or any(map(_has(each), arguments.words))]
    if not chosen:
        what = f"no setting has {' or '.join(map(repr, arguments.words))} in its name or meaning"
        raise UsageError(what, "leave the words out to see all of them")
    print(json.dumps([_described(each) for each in chosen], indent=1) if arguments.json else recipe(chosen))
    return 0


def _has(setting: Setting) -> Any:
    text = f"{setting.key} {setting.about.meaning} {setting.about.option}".lower()
    return lambda word: word.lower() in text


def _described(setting: Setting) -> dict[str, Any]:
    about = setting.about
    return {
        "key": setting.key,
        "default": setting.default,
        "required": setting.required,
        "meaning": about.meaning,
        "unit": about.unit or None,
        "unset": about.unset or None,
        "choices": list(setting.choices) or None,
        "option": about.option.partition(" ")[0] or None,
    }


def recipe(settings: list[Setting]) -> str:
    """A recipe with these settings at their defaults; what a group holds that is left out is commented out."""
    optional = {each.key for each in every() if each.key in GROUPS}
    lines: list[str] = []
    begun: set[str] = set()
    for setting in settings:
        *groups, name = setting.key.split(".")
        for depth in range(len(groups)):
            group = ".".join(groups[: depth + 1])
            if group not in begun:
                title = (GROUPS[group].__doc__ or "").splitlines()[0]
                lines.append(_line(depth, f"{groups[depth]}:", title, off=group in optional))
                begun.add(group)
        begun.add(setting.key)
        value = yaml.safe_dump(setting.default, default_flow_style=True).removesuffix("...\n").strip()
        off = ".".join(groups) in optional
        lines.append(_line(len(groups), f"{name}: {value}", _sentence(setting), off=off))
    return "\n".join(lines)


def _line(depth: int, text: str, comment: str, *, off: bool = False) -> str:
    left = f"{'# ' if off else ''}{'  ' * depth}{text}"
    return f"{left:{_COMMENT}} # {comment}"


def _sentence(setting: Setting) -> str:
    about = setting.about
    unit = f" [{about.unit}]" if about.unit else ""
    unset = f"; null: {about.unset}" if about.unset else ""
    unset = "; has to be given" if setting.required else unset
    one_of = f"; {' | '.join(setting.choices)}" if setting.choices else ""
    option = f" ({about.option.partition(' ')[0]})" if about.option else ""
    return f"{about.meaning}{unit}{one_of}{unset}{option}"
