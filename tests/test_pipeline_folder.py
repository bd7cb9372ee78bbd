"""A folder of pictures goes through the whole command without a line of code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from polar_deploy.bundle.__main__ import main as bundle
from tests.conftest import called, contents, polar

NAMES = ("cyan", "grey", "olive", "rose")
COLOURS = {"cyan": (20, 180, 190), "grey": (128, 128, 128), "olive": (120, 130, 20), "rose": (220, 60, 120)}
KINDS = (".jpg", ".png", ".webp", ".bmp", ".gif", ".tif")
TINY = (
    *(
        "--model",
        "tests.support.tiny:net",
        "--epochs",
        "4",
        "--budget",
        "0.5",
        "--max-drop",
        "30",
        "--accuracy-rule",
        "point",
    ),
    *("--min-speedup", "0.5", "--batch", "1,4,8", "--set", "input_size=16", "--set", "training.threads=1"),
)


def paint(folder: Path, count: int = 60) -> Path:
    """`count` pictures of each class, in many kinds, sizes and modes, some on their side."""
    draw = np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = draw.integers(20, 40, 2)
            noisy = np.array(COLOURS[name]) + draw.integers(-20, 21, (height, width, 3))
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            exif = Image.Exif()
            exif[0x0112] = number % 8 + 1
            suffix = KINDS[number % len(KINDS)]
            if number % 5 == 1 and suffix != ".jpg":
                image = image.convert("P")
            image.save(folder / name / f"{number}{suffix}", **({"exif": exif} if suffix in KINDS[:3] else {}))
        (folder / name / "._0.jpg").write_bytes(b"macOS")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "Thumbs.db").write_bytes(b"Windows")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody's, with the pictures in it."""
    place = tmp_path_factory.mktemp("somebody")
    paint(place / "tiles")
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Iterator[Path]:
    """The folder of the run on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        outcome = polar(*TINY, "--data", "folder:tiles")
        assert outcome.code in (0, 5), outcome.err  # 5: the machine was too busy to tell how fast it is
        yield place / "runs" / "tests.support.tiny.net-folder.tiles-ort-fp32-macs0.5-s0"


def test_the_bundle_is_verified(run: Path) -> None:
    outcome = called(bundle, "verify", run / "bundle", "--no-timing", "--data", run.parents[1] / "tiles")
    assert outcome.code == 0, outcome.out + outcome.err
    assert (run / "bundle" / "labels.txt").read_text().split() == list(NAMES)


def test_it_learned_what_is_in_the_pictures(run: Path) -> None:
    counted = json.loads((run / "parity.json").read_text())["accuracy"]
    assert counted["samples"] == 48  # a fifth of 240
    assert counted["full"] > 60  # of four classes


def test_the_log_tells_how_long_it_waited_for_data(run: Path) -> None:
    for line in (run / "full" / "training.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert 0 <= record["data_seconds"] <= record["seconds"]


def test_nothing_that_is_handed_over_tells_where_the_pictures_lie(run: Path, place: Path) -> None:
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    assert manifest["provenance"]["data"]["name"] == "folder:tiles"
    assert manifest["provenance"]["settings"]["data"] == "folder:tiles"
    absolute = run.parent / "absolute"
    again = polar("--recipe", run / "run.yaml", "--data", f"folder:{place / 'tiles'}", "--out", absolute, "--epochs", 1)
    assert again.code in (0, 1, 5), again.err
    assert yaml.safe_load((absolute / "run.yaml").read_text())["data"] == f"folder:{place / 'tiles'}"
    for path in [*(absolute / "bundle").rglob("*"), absolute / "report.json", absolute / "report.html"]:
        if path.is_file():
            assert place.name.encode() not in path.read_bytes(), path


def test_the_same_command_has_nothing_to_do(run: Path) -> None:
    before = contents(run)
    outcome = polar(*TINY, "--data", "folder:tiles", "--until", "export")
    assert outcome.up_to_date == ["full", "gates", "export"]
    assert contents(run) == before


def test_a_broken_picture_ends_the_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "tiles", 12)
    for name in ("olive/3.bmp", "rose/7.png"):
        path = tmp_path / "tiles" / name
        path.write_bytes(path.read_bytes()[:100])
    options = (*TINY, "--data", "folder:tiles", "--out", "run", "--until", "full")
    outcome = polar(*options)
    assert outcome.code == 4
    assert "error: tiles/olive/3.bmp cannot be decoded: " in outcome.err
    assert "(2 files in all are no sound pictures)" in outcome.err
    assert "--skip-broken" in outcome.err
    assert not (tmp_path / "run").exists()
    outcome = polar(*options, "--skip-broken")
    assert outcome.code == 0, outcome.err
    assert "2 broken pictures are left out, first tiles/olive/3.bmp " in outcome.err


def test_folders_that_are_none_end_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = polar("--model", "tests.support.tiny:net", "--data", "folder:nowhere")
    assert outcome.code == 2
    assert "error: there is no folder nowhere\n  what to do: give one folder a class" in outcome.err
    (tmp_path / "flat").mkdir()
    outcome = polar("--model", "tests.support.tiny:net", "--data", "folder:flat")
    assert outcome.code == 4
    assert "error: flat has 0 class folders" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["flat"]


def test_a_plan_tells_what_a_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 9), ("val", 4)):
        for name in ("circle", "cross"):
            (tmp_path / "shapes" / part / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / "shapes" / part / name / f"{number}.png").write_bytes(b"")  # none is read
    plan = ("--model", "tests.support.tiny:net", "--budget", "0.5", "--data", "folder:shapes", "--dry-run")
    outcome = polar(*plan)
    assert outcome.code == 0, outcome.err
    assert "data      2 classes (circle, cross); pictures: 16 of train, 2 of validation, 8 of test\n" in outcome.out
    (tmp_path / "shapes/val/cross").rename(tmp_path / "shapes/val/square")
    outcome = polar(*plan)
    assert outcome.code == 4
    assert "training and test classes differ in 2, first in 'cross'" in outcome.err
    (tmp_path / "shapes/val/square").rename(tmp_path / "shapes/val/cross")
    for part in ("train", "val"):
        (tmp_path / "shapes" / part / "empty").mkdir()
    outcome = polar(*plan)
    assert outcome.code == 4
    assert "/empty holds no pictures" in outcome.err
