"""Files from strangers: one clear error with the right exit code, nothing written, no traceback, no dead process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from polar_deploy.surgery.__main__ import main
from tests.conftest import child_environment
from tests.surgery.hostile import DONE, REFUSED, cases, damaged, lay, model

DAMAGED = 100
SECONDS, MEGABYTES = 5, 200  # that one file may take

Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What the command answered to each file, all of them in one child process."""
    folder, scratch = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("scratch")
    files = {**cases(), **damaged(DAMAGED)}
    lay(folder, files)
    command = [sys.executable, "-m", "tests.surgery.hostile", str(folder)]
    environment = child_environment() | {"TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = list(files)
    assert len(lines) == len(names), f"the interpreter died ({done.returncode}) at: {names[len(lines)]}\n{done.stderr}"
    assert not [path for path in scratch.iterdir() if path.name != ".ses"]  # ONNX Runtime's own
    return {names[line["number"]]: line for line in lines}


@pytest.mark.parametrize("name", cases())
def test_hostile_file(name: str, answers: Answers) -> None:
    answer, case = answers[name], cases()[name]
    assert answer["code"] == case.code, answer["err"]
    assert case.says in answer["err"]
    _assert_clean(answer)


def test_damaged_files_are_refused_or_compute_the_same(answers: Answers) -> None:
    damage = {name: answers[name] for name in damaged(DAMAGED)}
    assert {answer["code"] for answer in damage.values()} == {DONE, REFUSED}
    for answer in damage.values():
        _assert_clean(answer)


def _assert_clean(answer: dict[str, Any]) -> None:
    """One clear error, nothing left; or a result and silence."""
    assert answer["seconds"] <= SECONDS
    assert answer["megabytes"] <= MEGABYTES
    if answer["code"] == DONE:
        assert answer["err"] == ""
        assert answer["left"] == ["out.onnx", "r.json"] or "out.onnx.data" in answer["left"]
        return
    error, todo = answer["err"].splitlines()
    assert error.startswith("error: ")
    assert todo.startswith("  what to do: ")
    assert answer["out"] == ""
    assert answer["left"] == []


def test_a_file_without_a_place_for_the_smaller_one_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["in.onnx"]) == 2
    assert "no place for the smaller model" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["in.onnx", "out.onnx", "--fast"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("no.onnx", "out.onnx"), "no.onnx"),
        (("folder", "out.onnx"), "folder"),
        (("", "out.onnx"), "not a file"),
        (("pipe", "out.onnx"), "pipe"),
        (("loop", "out.onnx"), "loop"),
        (("good.onnx/in.onnx", "out.onnx"), "good.onnx"),
        (("good.onnx", "folder"), "folder"),
        (("good.onnx", "good.onnx/out.onnx"), "good.onnx"),
        (("good.onnx", "pipe"), "pipe"),
        (("good.onnx", "/proc/no/out.onnx"), "/proc/no"),
        (("good.onnx", "x" * 300), "x" * 300),
        (("good.onnx", "out.onnx", "--report", "folder"), "folder"),
        (("good.onnx", "out.onnx", "--report", "out.onnx"), "out.onnx"),
        (("good.onnx", "out.onnx", "--report", "good.onnx"), "good.onnx"),
    ],
)
def test_places_that_cannot_be(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit 2, everything as it was, and no pipe is waited for."""
    monkeypatch.chdir(tmp_path)
    onnx.save(model(), "good.onnx")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert "what to do: " in error
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_target_folders_are_made(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "in.onnx")
    assert main([str(tmp_path / "in.onnx"), str(tmp_path / "a" / "b" / "out.onnx")]) == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("external", [False, True])
def test_the_source_may_be_the_target(external: bool, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "in.onnx", tmp_path / "elsewhere.onnx"
    onnx.save(model(), path, save_as_external_data=external, location="in.onnx.data", size_threshold=0)
    assert main([str(path), str(elsewhere)]) == 0
    assert main([str(path), str(path)]) == 0
    assert onnx.load(path).SerializeToString() == onnx.load(elsewhere).SerializeToString()


@pytest.mark.parametrize("option", ["--json", "--no-verify"])
def test_a_refusal_in_a_fresh_interpreter(option: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(cases()["cut at 2000"].data)
    command = [sys.executable, "-m", "polar_deploy.surgery", str(source), str(target), option]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"error: {source} is not an ONNX file")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_names_reach_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(cases()["name with emoji"].data)
    command = [sys.executable, "-m", "polar_deploy.surgery", str(source), str(target)]
    environment = child_environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.is_file()


def test_command_writes_model_and_report(tmp_path: Path) -> None:
    """A fresh interpreter, as a user starts it."""
    source, target, report = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "r.json"
    onnx.save(model(), source)
    command = [sys.executable, "-m", "polar_deploy.surgery", str(source), str(target), "--report", str(report)]
    environment = child_environment() | {"COLUMNS": "140"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "16 → 14" in done.stdout
    assert "verified" in done.stdout
    assert done.stderr == ""
    onnx.checker.check_model(onnx.load(target), full_check=True)
    assert json.loads(report.read_text())["layers"][0]["out"] == [16, 14]


def test_json_goes_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(model(), source)
    assert main([str(source), str(tmp_path / "out.onnx"), "--json", "--no-verify"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] is False
