"""Write what code and results say: parts of README and docs, and the JSON Schemas: `python docs/generate.py`.

Such a part lies between `<!-- generated: NAME -->` and `<!-- end -->`. `--check` writes nothing, and names the files
that are behind.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package of this checkout

from figures import FIGURES, table

from polar_deploy import cli
from polar_deploy.backends import BACKENDS
from polar_deploy.bundle.manifest import Manifest
from polar_deploy.config import About
from polar_deploy.documents.build import Built
from polar_deploy.documents.gates import GateStates
from polar_deploy.documents.latency_table import MeasuredTable
from polar_deploy.documents.parity import Parity
from polar_deploy.documents.part import schema
from polar_deploy.documents.report import Report
from polar_deploy.documents.surgery import SurgeryReport
from polar_deploy.settings import GROUPS

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """README, what else stands beside it, and all pages of the site."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def settings() -> str:
    """Every setting of `polar_deploy.config`, a table a group: key, type, default, and what it says."""
    parts = []
    for group, model in GROUPS.items():
        rows = []
        for key, info in model.model_fields.items():
            name = f"{group}.{key}".lstrip(".")
            about = next((each for each in info.metadata if isinstance(each, About)), None)
            if about is None or name in GROUPS:
                continue
            default = "has to be given" if info.is_required() else f"`{_plain(info.default)}`"
            unset = f": {about.unset}" if about.unset and info.default is None else ""
            meaning = f"{about.meaning}{f' ({about.unit})' if about.unit else ''}"
            option = f"`{about.option.partition(' ')[0]}`" if about.option else ""
            rows.append((f"`{name}`", _type(info.annotation, info.metadata), f"{default}{unset}", meaning, option))
        head = ("setting", "type", "default", "meaning", "option")
        said = (model.__doc__ or "").strip() + "".join(f" Default: {unset}." for unset in _unset(group))
        parts.append(f"## {group or 'The run'}\n\n{said}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _unset(group: str) -> Iterator[str]:
    """What a group stands for where it is left out as a whole."""
    above, _, name = group.rpartition(".")
    info = GROUPS[above].model_fields.get(name)
    yield from (each.unset for each in (info.metadata if info else ()) if isinstance(each, About))


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


def commands() -> str:
    """Every command, from the tree of them."""
    return table(("command", "does"), _rows(cli.COMMANDS, "polar-deploy"))


def _rows(node: cli.Node, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, cli.Command):
        yield f"`{name}`", node.help
        return
    for word, child in node.commands.items():
        yield from _rows(child, f"{name} {word}")


def options() -> str:
    """The options of `polar-deploy run`, from its parser."""
    rows = []
    for action in cli.parser(cli.COMMANDS.commands["run"], "polar-deploy run", [])._actions:
        shown = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        shown = "{" + ",".join(action.choices) + "}" if action.choices and not action.metavar else str(shown)
        names = ", ".join(f"`{f'{name} {shown}'.strip()}`" for name in action.option_strings)
        rows.append((names, (action.help or "").replace("%%", "%")))
    return table(("option", "says"), rows)


def backends() -> str:
    """What each backend says of itself."""
    rows = []
    for backend in BACKENDS:
        names = ", ".join(f"`{backend.name}-{precision}`" for precision in backend.align)
        aligned = ", ".join(f"{precision.upper()} {width}" for precision, width in backend.align.items())
        where = "CPU" if backend.gpu is None else "GPU, built on any x86-64" if not backend.gpu.to_build else "GPU"
        engine = "a plan" if backend.artefact.is_code else "the typed graph"
        rows.append((names, backend.library, f"`{backend.extra}`", where, engine, aligned))
    return table(("targets", "library", "extra", "runs on", "its engine is", "widths are multiples of"), rows)


def decisions() -> str:
    """Every decision, by its page's title."""
    found = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    return "\n".join(f"- [{page.read_text(encoding='utf-8').splitlines()[0][2:]}]({page.name})" for page in found)


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "decisions": decisions,
    "targets": backends,
    "commands": commands,
    "options": options,
    **FIGURES,
}


SCHEMAS: dict[str, type[BaseModel]] = {
    "build": Built,
    "bundle": Manifest,
    "gates": GateStates,
    "latency-table": MeasuredTable,
    "parity": Parity,
    "report": Report,
    "surgery": SurgeryReport,
}


def renewed(text: str) -> str:
    """A page with its generated parts as they should be."""
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}\n{part[3]}", text)


def files() -> Iterator[tuple[Path, str]]:
    """Each file that is generated, or has parts that are, as it should be."""
    for page in pages():
        yield page, renewed(page.read_text(encoding="utf-8"))
    for name, model in SCHEMAS.items():
        yield ROOT / f"polar_deploy/schemas/{name}.schema.json", f"{json.dumps(schema(model), indent=1)}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or with `--check` only look; exit code 1 if a file was behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is behind")
    check = parser.parse_args(argv).check
    behind = 0
    for path, text in files():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            behind += 1
            print(f"{path.relative_to(ROOT)}: {'is behind, run python docs/generate.py' if check else 'written'}")
            if not check:
                path.write_text(text, encoding="utf-8")
    return 1 if check and behind else 0


if __name__ == "__main__":
    sys.exit(main())
