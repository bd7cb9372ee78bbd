"""findings/: each script says what was guessed and seen, pins what it installs, and stands in the list."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_the_list_is_whole() -> None:
    listed = re.findall(r"^\| \[([\w-]+)\]\(\1\.sh\)", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [path.stem for path in SCRIPTS]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_can_be_run_and_says_what_it_is_about(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    for part in ("# Guessed: ", "# Seen: ", "# Versions: ", "# For users of polar_deploy: "):
        assert text.count(f"\n{part}") == 1
    (packages,) = re.findall(r"pip\" install --quiet --disable-pip-version-check (.+)", text)
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", package) for package in packages.split())
    code = text.split("<<'PY'\n")[1].removesuffix("PY\n")
    compile(code, str(path), "exec")
    assert "\nassert " in code or "\n    assert " in code
    assert "polar_deploy" not in code
