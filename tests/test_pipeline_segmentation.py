"""A folder of pictures and masks goes through the whole command, up to a bundle that is verified."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from polar_deploy.bundle.__main__ import main as bundle
from polar_deploy.workspace import read_json
from tests.conftest import called, polar
from tests.support.schemas import valid
from tests.support.shapes import SIZE, paint

TINY = (
    *("--task", "segmentation", "--model", "tests.support.shapes:unet", "--epochs", "8", "--budget", "macs=0.6"),
    *("--max-drop", "40", "--accuracy-rule", "point", "--min-speedup", "0.2", "--batch", "1,4,8"),
    *("--set", f"input_size={SIZE}", "--set", "training.threads=1", "--set", "training.batch_size=8"),
)


def test_a_folder_becomes_a_bundle(tmp_path: Path) -> None:
    root, folder = paint(tmp_path / "shapes"), tmp_path / "run"
    (root / "classes.txt").write_text("ground\ndisc\nsquare\n")
    outcome = polar(*TINY, "--data", f"pairs:{root}", "--out", folder)
    assert outcome.code == 0, outcome.err
    assert "EXIF turns or mirrors 15 pictures" in " ".join(outcome.err.split())
    graph = onnx.load(folder / "compressed/model.onnx").graph
    assert [each.name for each in graph.input] == ["input"]
    assert [each.name for each in graph.output] == ["out"]  # and no auxiliary head
    parity, report = read_json(folder / "parity.json"), read_json(folder / "report.json")
    valid("parity", parity)
    valid("report", report)
    assert parity["metric"] == {"name": "mean IoU", "unit": "%"}
    assert parity["accuracy"]["full"] > 50
    assert [(each["name"], each["samples"]) for each in report["classes"]] == [
        ("ground", 12),
        ("disc", 12),
        ("square", 12),
    ]
    assert report["macs"]["ratio"] <= 0.6
    if parity["worst_samples"]:  # drawn for the maker, not for the edge team
        assert (
            "From left to right: picture, mask, full network, compressed network"
            in (folder / "report.html").read_text()
        )
        assert "data:image/png" in (folder / "report.html").read_text()
    assert "data:image/png" not in (folder / "bundle/report.html").read_text()
    verified = called(bundle, "verify", folder / "bundle", "--no-timing")
    assert verified.code == 0, verified.err
    manifest = read_json(folder / "bundle/manifest.json")
    assert manifest["task"]["preprocessing"]["stretch"] == [SIZE, SIZE]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "the task segmentation takes a folder of pictures and masks, and none is given"),
        (("--data", "digits"), 2, "a folder of pictures and masks, not 'digits'"),
        (("--data", "pairs:nowhere"), 2, "there is no folder nowhere"),
        (("--data", "pairs:.", "--task", "classification"), 2, "give --task segmentation"),
    ],
)
def test_data_that_is_none(
    options: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = polar(*TINY, *options, "--out", tmp_path / "run")
    assert outcome.code == code
    assert message in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()


def test_cutout_is_refused(tmp_path: Path) -> None:
    root = paint(tmp_path / "shapes", 8)
    outcome = polar(*TINY, "--data", f"pairs:{root}", "--set", "training.cutout=4", "--out", tmp_path / "run")
    assert outcome.code == 2
    assert "training.cutout is for classification" in outcome.err
