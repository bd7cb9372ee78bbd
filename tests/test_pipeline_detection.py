"""A folder of pictures and boxes goes through the whole command, up to a bundle that is verified."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from polar_deploy.bundle.__main__ import main as bundle
from polar_deploy.workspace import read_json
from tests.conftest import called, polar
from tests.support.kills import DECIDED, verdict
from tests.support.objects import SIZE, draw, write
from tests.support.schemas import valid

TINY = (
    *("--task", "detection", "--model", "tests.support.objects:detector", "--epochs", "8", "--budget", "macs=0.6"),
    *("--max-drop", "60", "--accuracy-rule", "point", "--min-speedup", "0.2", "--batch", "1"),
    *("--set", f"input_size={SIZE}", "--set", "training.threads=1", "--set", "training.batch_size=8"),
    *("--set", "training.crop_scale=1", "--set", "training.crop_padding=3"),
)


def test_a_folder_becomes_a_bundle(tmp_path: Path) -> None:
    draw(tmp_path / "shapes", 60)
    folder = tmp_path / "run"
    outcome = polar(*TINY, "--data", f"coco:{tmp_path / 'shapes'}", "--out", folder)
    assert outcome.code == DECIDED[verdict(folder)], outcome.err
    graph = onnx.load(folder / "compressed/model.onnx").graph
    assert [each.name for each in graph.output] == ["cls_logits", "bbox_regression", "bbox_ctrness"]
    parity, report = read_json(folder / "parity.json"), read_json(folder / "report.json")
    valid("parity", parity)
    valid("report", report)
    assert parity["metric"] == {"name": "mAP", "unit": "%"}
    assert parity["accuracy"]["full"] > 10
    low, high = parity["accuracy"]["interval"]
    assert low <= parity["accuracy"]["drop"] <= high
    assert low < high
    assert [each["name"] for each in report["classes"]] == ["square", "disc"]
    assert report["macs"]["ratio"] <= 0.6
    if parity["worst_samples"]:  # drawn for the maker, not for the edge team
        assert "From left to right: objects, full network, compressed network" in (folder / "report.html").read_text()
        assert "data:image/png" in (folder / "report.html").read_text()
    assert "data:image/png" not in (folder / "bundle/report.html").read_text()
    verified = called(bundle, "verify", folder / "bundle", "--no-timing")
    assert verified.code == 0, verified.err
    manifest = read_json(folder / "bundle/manifest.json")
    assert manifest["task"]["name"] == "detection"
    assert manifest["task"]["preprocessing"]["stretch"] == [SIZE, SIZE]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "the task detection takes a folder of pictures and boxes, and none is given"),
        (("--data", "digits"), 2, "a folder of pictures and boxes, not 'digits'"),
        (("--data", "coco:nowhere"), 2, "there is no folder nowhere"),
        (("--data", "coco:.", "--task", "classification"), 2, "give --task detection"),
        (("--data", "coco:shapes", "--model", "tests.support.objects:lopsided"), 4, "answers for 63 cells"),
        (("--data", "coco:shapes", "--model", "tests.support.shapes:unet"), 4, "a dictionary of out"),
        (("--data", "coco:spoilt"), 4, "annotations[0] is of the picture 3"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(
    options: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "shapes", 8)
    spoilt = draw(tmp_path / "spoilt", 8)
    spoilt["annotations"][0]["image_id"] = 3
    write(tmp_path / "spoilt", spoilt)
    outcome = polar(*TINY, *options, "--out", tmp_path / "run")
    assert outcome.code == code, outcome.err
    assert message in " ".join(outcome.err.split())
    assert not (tmp_path / "run/full").exists()
