from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Miniature


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path) -> Path:
    """The bundle of the miniature run, to be changed."""
    return Path(shutil.copytree(miniature.folder / "bundle", tmp_path / "bundle"))
