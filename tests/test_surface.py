"""What others rely on, as one reviewed file: settings, options, keys of JSON files, public names of Python.

A change of any of them changes tests/snapshots/surface.txt, where whoever reviews it sees it. The file is written by
`python -m tests.test_surface`; whether it is Breaking says CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from polar_deploy import cli, settings

ROOT = Path(__file__).parents[1]
SNAPSHOT = Path(__file__).parent / "snapshots" / "surface.txt"


def settings_keys() -> Iterator[str]:
    """Each setting, such as "training.lr"."""
    yield from (each.key for each in settings.every())


def options(node: cli.Node = cli.COMMANDS, above: str = "") -> Iterator[str]:
    """Each command with its options and arguments, such as "bundle run: BUNDLE --json"."""
    if isinstance(node, cli.Group):
        for name, child in node.commands.items():
            yield from options(child, f"{above} {name}".strip())
        return
    parser = argparse.ArgumentParser(add_help=False)
    import_module(node.module).add_arguments(parser)
    for action in parser._actions:
        yield f"{above} {' '.join(action.option_strings) or action.dest}"


def json_keys(schema: object, place: str = "") -> Iterator[str]:
    """Each property in a JSON Schema, by its path; below a definition by the name of that."""
    if isinstance(schema, list):
        for each in schema:
            yield from json_keys(each, place)
    if not isinstance(schema, dict):
        return
    for word, value in schema.items():
        if word in ("properties", "$defs"):
            for name, inner in value.items():
                path = f"{place}.{name}".lstrip(".") if word == "properties" else f"({name})"
                yield from [path] if word == "properties" else []
                yield from json_keys(inner, path)
        else:
            yield from json_keys(value, place)


def public_names() -> Iterator[str]:
    """Each name on the page of the API, with its parameters, as the source declares them."""
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    named = re.findall(r"auto(?:module|class):: (\S+)", page)
    yield from dict.fromkeys(line for name in named for line in _public(name))


def _public(name: str) -> Iterator[str]:
    if not _path(name).is_file():
        module, _, member = name.rpartition(".")
        yield from _declared(name, _declarations(module)[member])
        return
    tree, declared = _tree(name), _declarations(name)
    exported = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    listed = set(ast.literal_eval(exported[0])) if exported else None
    for member in sorted(declared if listed is None else listed):
        if member in declared and not member.startswith("_"):
            yield from _declared(f"{name}.{member}", declared[member])
        elif not member.startswith("_"):
            yield f"{name}.{member}"


def _path(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _declarations(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Classes and functions of a module, with those that it hands on: `from MODULE import NAME as NAME`."""
    tree = _tree(module)
    found = {node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    for node in ast.walk(tree):
        for each in node.names if isinstance(node, ast.ImportFrom) and node.module else ():
            if each.asname == each.name:
                found[each.name] = _declarations(node.module)[each.name]
    return found


def _declared(name: str, node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg != "self"]
        names += ["*", *(each.arg for each in node.args.kwonlyargs)] if node.args.kwonlyargs else []
        names += [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
        is_property = any(ast.unparse(each).endswith("property") for each in node.decorator_list)
        yield name if is_property else f"{name}({', '.join(names)})"
        return
    yield name
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and (not inner.name.startswith("_") or inner.name == "__init__"):
            yield from _declared(f"{name}.{inner.name}", inner)
        elif isinstance(inner, ast.AnnAssign) and not ast.unparse(inner.target).startswith("_"):
            yield f"{name}.{ast.unparse(inner.target)}"


def surface() -> str:
    """All of it, a line each."""
    parts = {"settings": settings_keys(), "options": options()}
    for path in sorted((ROOT / "polar_deploy/schemas").glob("*.json")):
        keys = json_keys(json.loads(path.read_text(encoding="utf-8")))
        parts[path.name.replace(".schema.json", ".json")] = iter(sorted(set(keys)))
    parts["Python"] = public_names()
    return "\n".join(line for title, lines in parts.items() for line in (f"# {title}", *lines, ""))


def test_what_others_rely_on_is_what_was_reviewed() -> None:
    assert surface().splitlines() == SNAPSHOT.read_text(encoding="utf-8").splitlines()


def test_properties_of_a_schema_are_found_at_any_depth() -> None:
    schema = {
        "properties": {"a": {"items": {"properties": {"b": {}}}}, "properties": {"oneOf": [{"properties": {"c": {}}}]}},
        "$defs": {"d": {"properties": {"e": {"additionalProperties": {"properties": {"f": {}}}}}}},
    }
    assert set(json_keys(schema)) == {"a", "a.b", "properties", "properties.c", "(d).e", "(d).e.f"}


if __name__ == "__main__":
    SNAPSHOT.write_text(surface(), encoding="utf-8")
