"""Write the parts of README and docs that say what code and results say: `python docs/generate.py`.

Such a part lies between `<!-- generated: NAME -->` and `<!-- end -->`. `--check` writes nothing, and names the pages
that are behind.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import FIGURES, table
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """README, what else stands beside it, and all pages of the site."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


# ------------------------------------------------------------------------------------------------- settings, options


def settings() -> str:
    """Every setting of `polar_deploy.config`, a table a group: key, type, default, and the comment beside it."""
    from polar_deploy import config

    comments = _comments(Path(config.__file__).read_text(encoding="utf-8"))
    groups = {"": config.Settings, **dict(_groups(config.Settings, ""))}
    parts = []
    for name, model in groups.items():
        rows = []
        for key, info in model.model_fields.items():
            if f"{name}.{key}".lstrip(".") in groups:
                continue
            value = "required" if info.is_required() else f"`{_plain(info.get_default(call_default_factory=True))}`"
            text = info.description or _as_yaml(comments.get((model.__name__, key), ""))
            rows.append((f"`{f'{name}.{key}'.lstrip('.')}`", _type(info.annotation, info.metadata), value, text))
        title = f"## {name}" if name else "## The run"
        parts.append(f"{title}\n\n{(model.__doc__ or '').strip()}\n\n{table(('setting', 'type', 'default', ''), rows)}")
    return "\n\n".join(parts)


def _groups(model: type[BaseModel], above: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, info in model.model_fields.items():
        name = f"{above}.{key}".lstrip(".")
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield name, kind
                yield from _groups(kind, name)


def _comments(source: str) -> dict[tuple[str, str], str]:
    """The comment at the end of each field's line, by class and field."""
    at_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return {
        (owner.name, field.target.id): at_line[field.end_lineno or field.lineno]
        for owner in classes
        for field in owner.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.end_lineno in at_line
    }


def _as_yaml(comment: str) -> str:
    """A comment on Python values, in the words of a recipe."""
    for python, yaml in (("None:", "null:"), ("True:", "true:"), ("():", "[]:")):
        comment = comment.replace(python, yaml)
    return comment


def _plain(value: object) -> str:
    """A default as YAML has it."""
    if isinstance(value, BaseModel):
        return json.dumps(value.model_dump(mode="json"))
    return json.dumps(list(value) if isinstance(value, tuple) else value, default=str).strip('"')


_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "null"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with its bounds."""
    arguments = getattr(annotation, "__args__", ())
    origin = getattr(annotation, "__origin__", None)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type(origin, annotation.__metadata__)
    if origin is tuple:
        inner = [_type(each) for each in arguments if each is not ...]
        return f"list of {inner[0]}" if len({*inner}) == 1 else f"list: {', '.join(inner)}"
    if origin is not None and str(origin) == "typing.Literal":
        return ", ".join(f"`{each}`" for each in arguments)
    if arguments:  # a union; that it may be null shows in its default
        return " or ".join(_type(each, metadata) for each in arguments if each is not type(None))
    return f"{_NAMES.get(annotation, getattr(annotation, '__name__', str(annotation)))}{_bounds(metadata)}"


def _bounds(metadata: Sequence[Any]) -> str:
    flat = [each for entry in metadata for each in (getattr(entry, "metadata", None) or [entry])]
    found = [f"{sign} {getattr(each, name)}" for each in flat for name, sign in _BOUNDS.items() if hasattr(each, name)]
    return f" {', '.join(found)}" if found else ""


def options() -> str:
    """The pipeline's options, from its parser."""
    from polar_deploy.pipeline import _parser

    rows = []
    for action in _parser()._actions:
        shown = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        shown = "{" + ",".join(action.choices) + "}" if action.choices and not action.metavar else shown
        names = ", ".join(f"`{f'{name} {shown}'.strip()}`" for name in action.option_strings)
        rows.append((names, (action.help or "").replace("%%", "%")))
    return table(("option", ""), rows)


PARTS: dict[str, Callable[[], str]] = {"settings": settings, "options": options, **FIGURES}


def renewed(text: str) -> str:
    """A page with its generated parts as they should be."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}\n{part[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with `--check` only look; exit code 1 if a page was behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is behind")
    check = parser.parse_args(argv).check
    behind = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            behind += 1
            print(f"{page.relative_to(ROOT)}: {'is behind, run python docs/generate.py' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    return 1 if check and behind else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
