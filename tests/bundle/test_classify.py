"""`bundle run`: pictures in, labels out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polar_deploy import targets
from tests.support.bundle_commands import bundle
from tests.support.bundles import LABELS, logits, write_bundle


@pytest.fixture
def delivered(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Wide, tall and exact ones, in colour and grey."""
    rng, paths = np.random.default_rng(1), []
    for index, size in enumerate([(40, 17), (11, 30), (11, 11), (9, 9)]):
        paths.append(tmp_path / f"{index}.png")
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels if index else pixels[..., 0]).save(paths[-1])
    return paths


def expected(delivered: Path, picture: Path) -> np.ndarray:
    """Probabilities, with the manifest's pre-processing written out: 11 pixels, the middle 8 of them."""
    image = Image.open(picture).convert("RGB")
    scale = 11 / min(image.size)
    image = image.resize([max(int(side * scale), 11) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - 8) / 2) for side in image.size)
    pixels = np.asarray(image)[top : top + 8, left : left + 8] / 255
    normal = ((pixels - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]).transpose(2, 0, 1)[None].astype(np.float32)
    powers = np.exp(logits(delivered / "compressed/model.onnx", normal)[0].astype(float))
    return powers / powers.sum()


def test_the_likeliest_labels_of_each_picture(delivered: Path, pictures: list[Path]) -> None:
    found = json.loads(bundle("run", delivered, *pictures, "--json", "--top", "3").out)
    assert [each["image"] for each in found] == [str(path) for path in pictures]
    for each, picture in zip(found, pictures, strict=True):
        probabilities = expected(delivered, picture)
        best = np.argsort(-probabilities)[:3]
        assert [guess["class"] for guess in each["top"]] == best.tolist()
        assert [guess["label"] for guess in each["top"]] == [LABELS[index] for index in best]
        np.testing.assert_allclose([guess["probability"] for guess in each["top"]], probabilities[best], rtol=1e-4)


def test_a_person_reads_five_labels_with_percentages(delivered: Path, pictures: list[Path]) -> None:
    outcome = bundle("run", delivered, pictures[0])
    name, *lines = outcome.out.splitlines()
    assert (outcome.code, name, len(lines)) == (0, str(pictures[0]), 5)
    assert all(line.split()[1] == "%" for line in lines)


@pytest.mark.skipif(not targets.lacks_to_run(targets.parse("trt-fp16")), reason="this machine can run plans")
def test_a_plan_s_network_runs_as_fp32_graph_where_there_is_no_gpu(tmp_path: Path, pictures: list[Path]) -> None:
    delivered = write_bundle(tmp_path / "trt", "trt-fp16")
    refused = bundle("run", delivered, pictures[0])
    assert (refused.code, refused.out) == (3, "")
    assert "--fp32 runs the FP32 graph in ONNX Runtime instead" in refused.err
    outcome = bundle("run", delivered, pictures[0], "--fp32", "--json", "--top", "1")
    assert json.loads(outcome.out)[0]["top"][0]["class"] == expected(delivered, pictures[0]).argmax()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.png"], 2, "there is no file missing.png"),
        (["labels.txt"], 4, "labels.txt cannot be decoded"),
        (["0.png", "--top", "0"], 2, "--top 0 is below 1"),
    ],
)
def test_wrong_pictures(
    arguments: list[str],
    code: int,
    words: str,
    delivered: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("no picture")
    outcome = bundle("run", delivered, *arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert words in outcome.err
