"""The project itself: which module may import which, the version, the size of its files, the Makefile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from polar_deploy import __version__

ROOT = Path(__file__).parents[1]
LARGEST = 2_000_000  # bytes
LONGEST = 400  # lines


def test_imports_point_one_way() -> None:
    lint = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("torch", "2.6.0a0+git.nv25.01"),
        ("torchvision", "0.20.0a0"),
        ("polygraphy", "0.49.12"),
        ("tensorrt", "10.7.0.23"),
    ],
)
def test_what_the_oldest_container_of_nvidia_brings_is_left_alone(package: str, version: str) -> None:
    """That of 25.01; later ones have later versions, and there are no upper bounds. None has TensorRT for RTX."""
    pytest.importorskip("tomllib", reason="Python 3.10 has none")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {"": project["dependencies"], **project["optional-dependencies"]}
    bounds = [
        (extra, requirement.specifier)
        for extra, lines in asked.items()
        for requirement in map(Requirement, lines)
        if requirement.name == package and extra != "rtx"
    ]
    assert bounds
    for extra, specifier in bounds:
        assert specifier.contains(version, prereleases=True), extra
        assert {each.operator for each in specifier} == {">="}, extra


def test_no_file_of_the_package_is_long() -> None:
    """What is longer has two subjects: it is split by meaning."""
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "polar_deploy").rglob("*.py")
    }
    assert len(lengths) > 200
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_no_file_is_large() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [path for path in files if path.is_file() and path.stat().st_size > LARGEST] == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile, where making the environment would begin from nothing."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "--no-print-directory", *arguments], cwd=folder, capture_output=True, text=True)


def test_make_installs_once(checkout: Path) -> None:
    assert "pip install" in make(checkout, "--dry-run", "demo").stdout
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()
    done = make(checkout, "--dry-run", "demo", "ARGS=--seed 1")
    assert done.stdout == ".venv/bin/python -m polar_deploy.pipeline --recipe digits --seed 1\n"


def test_make_names_a_python_that_is_too_old(checkout: Path) -> None:
    old = checkout / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(checkout, "test", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"{old} must be Python 3.10 or later" in done.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("image", ["edge", "train"])
def test_a_wheel_can_be_built_of_what_an_image_copies(image: str) -> None:
    """Hatch wants all files that pyproject.toml names; in Docker there are those that are copied, and not ignored."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    keys = (
        r'fragments = \[{ path = "(.+)"',
        r'license-files = \["(.+)"\]',
        r'force-include = \{ "(.+)" = .+ "(.+)" = ',
    )
    named = [name for key in keys for found in re.finditer(f"^{key}", project, re.MULTILINE) for name in found.groups()]
    assert len(named) == 4
    dockerfile = (ROOT / "docker" / f"{image}.Dockerfile").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (.+) /\S+$", dockerfile, re.MULTILINE) for word in line.split()}
    assert copied == {"polar_deploy", "pyproject.toml", *named}
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()}
    assert copied <= kept
