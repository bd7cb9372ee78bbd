"""Calling the bundle's commands, and changing a bundle so that its hashes are right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polar_deploy.bundle.__main__ import main
from tests.conftest import Outcome, called


def bundle(*arguments: object) -> Outcome:
    """`python -m polar_deploy.bundle …` in this process."""
    return called(main, *arguments)


def manifest(folder: Path) -> Any:
    """The manifest's content."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def change(folder: Path, *keys: str | int, to: object) -> None:
    """Set one value of the manifest."""
    document = value = manifest(folder)
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = to
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")


def edit(folder: Path, function: Callable[[Any], Any]) -> None:
    """Let `function` change the manifest."""
    document = manifest(folder)
    function(document)
    (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")


def put(folder: Path, name: str, content: bytes) -> None:
    """Write a file with its right size and hash in the manifest, as somebody who means harm would."""
    (folder / name).write_bytes(content)
    change(folder, "files", name, to={"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
