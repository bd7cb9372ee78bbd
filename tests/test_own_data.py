"""docs/own-data.md, and the network of own-network.md: each block runs, and what it defines goes where it says."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polar_deploy import data, models, pipeline
from polar_deploy.config import Normalize, Settings
from polar_deploy.data import own
from polar_deploy.errors import ContentError
from polar_deploy.tasks.classification import classifier
from polar_deploy.tasks.detection import detector
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
NETWORK_PAGE = (ROOT / "docs" / "own-network.md").read_text(encoding="utf-8")
BLOCKS, (NETWORK, *_) = (
    re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) for page in (PAGE, NETWORK_PAGE)
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's code in it, as a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "detectors.py").write_text(BLOCKS[0], encoding="utf-8")
    (tmp_path / "mypackage" / "nets.py").write_text(NETWORK, encoding="utf-8")
    (tmp_path / "mypackage" / "sets.py").write_text("\n".join(BLOCKS[1:]), encoding="utf-8")
    own.load.cache_clear()
    yield tmp_path
    own.load.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


def test_all_blocks_are_taken() -> None:
    assert PAGE.count("```python") == len(BLOCKS) == 4
    assert [re.findall(r"^(?:def|class) (\w+)", block, re.MULTILINE) for block in BLOCKS] == [
        ["Fcos", "fcos"],
        ["parts"],
        ["Tiles", "tiles"],
        ["signs"],
    ]


def test_the_commands_are_commands() -> None:
    lines = re.findall(r"`(--(?:model|data) [^`]+)`", PAGE + NETWORK_PAGE)
    assert lines
    for line in lines:
        parser = argparse.ArgumentParser(exit_on_error=False)
        pipeline.add_arguments(parser)
        parser.parse_args(shlex.split(line))
    for key, value in re.findall(r"--set ([\w.]+)=([\w.]+)", PAGE):
        group, _, name = key.rpartition(".")
        fields = Settings.model_fields["training"].annotation.model_fields if group else Settings.model_fields  # type: ignore[union-attr]
        assert name in fields, key
        assert value


def test_the_detector() -> None:
    """Strides of 8, 16, 32 and 64 pixels: 64, 16, 4 cells and 1 of a picture of 64."""
    normal = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    task = detector(3, 64, lambda: pytest.fail("no data is read"), normal)
    network = models.build("mypackage.detectors:fcos", task).eval()
    outputs = task.forward(network, {"input": torch.zeros(1, 3, 64, 64)})
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "cls_logits": (1, 85, 3),
        "bbox_regression": (1, 85, 4),
        "bbox_ctrness": (1, 85, 1),
    }


def test_the_network() -> None:
    network = models.build("mypackage.nets:small", classifier(7, 40))
    assert network(torch.zeros(2, 3, 40, 40)).shape == (2, 7)


def test_arrays() -> None:
    dataset = data.load("mypackage.sets:parts")
    assert dataset.class_names == ("nut", "bolt", "ring")
    assert dataset.train.images.shape == (200, 32, 32, 3)


def test_images_that_are_read_when_they_are_asked_for() -> None:
    dataset = data.load("mypackage.sets:tiles")
    assert dataset.train.images[np.array([5, 3])].shape == (2, 32, 32, 3)
    assert dataset.spec.crop_scale == 0.5


def test_a_folder_with_settings_of_its_own(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("left", "right"):
            (tmp_path / "signs" / part / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (80, 60)).save(tmp_path / "signs" / part / name / f"{number}.png")
    dataset = data.load("mypackage.sets:signs", tmp_path / "signs")
    assert dataset.train.images[np.arange(4)].shape == (4, 48, 48, 3)


@pytest.mark.parametrize(("file", "wrong", "right"), [("nets", "n_classes", "classes"), ("sets", "root", "data_dir")])
def test_a_wrong_signature_is_answered_with_the_right_one(here: Path, file: str, wrong: str, right: str) -> None:
    (here / "mypackage" / f"wrong_{file}.py").write_text(f"def make({wrong}):\n    return None\n", encoding="utf-8")
    calls = {
        "nets": lambda: models.build("mypackage.wrong_nets:make", classifier(3, 32)),
        "sets": lambda: data.load("mypackage.wrong_sets:make"),
    }
    with pytest.raises(ContentError, match=rf"is defined as make\({wrong}\)") as error:
        calls[file]()
    assert f"`def make({right}):`" in error.value.todo
