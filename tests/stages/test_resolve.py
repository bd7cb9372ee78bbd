"""Resolved settings: every choice made, in a type that says so, and the same document as before."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from polar_deploy import recipes
from polar_deploy.config import Budget, Settings
from polar_deploy.resolved import ResolvedSettings
from polar_deploy.stages.resolve import choose_target, default_folder, resolve


def test_nothing_is_left_open(tmp_path: Path) -> None:
    settings = resolve(Settings(model="resnet20", data="digits"), tmp_path)
    training, gates = settings.training, settings.gates
    assert (settings.input_size, settings.align) == (16, 8)
    assert (training.epochs, training.full_epochs, training.gated_lr) == (30, 30, 0.05)
    assert (training.flip, training.crop_padding, training.crop_scale) == (False, 1, 1.0)
    assert training.batch_size == 128
    assert (gates.close_from, gates.freeze_at) == (0.05, pytest.approx(0.12))
    assert settings.budget == Budget(latency=0.6)
    for name in ("budget", "align"):
        with pytest.raises(ValidationError):
            ResolvedSettings.model_validate(dict(settings) | {name: None})


def test_what_was_given_stays(tmp_path: Path) -> None:
    text = "training.epochs=4 training.full_epochs=5 training.gated_lr=0.3 training.flip=true training.crop_padding=0"
    text += " training.crop_scale=0.2 training.batch_size=20"
    given = dict(recipes.parse_set(each) for each in text.split())
    settings = recipes.load(None, {"model": "resnet20", "data": "digits", "input_size": 24, "align": 4, **given})
    resolved = resolve(settings, tmp_path)
    assert (resolved.input_size, resolved.align) == (24, 4)
    training = resolved.training
    assert (training.epochs, training.full_epochs, training.gated_lr) == (4, 5, 0.3)
    assert (training.flip, training.crop_padding, training.crop_scale, training.batch_size) == (True, 0, 0.2, 20)


def test_it_is_written_as_the_settings_are_and_read_back(tmp_path: Path) -> None:
    settings = Settings(model="resnet20", data="digits")
    resolved = resolve(settings, tmp_path)
    for one, other in ((settings, resolved), (settings.training, resolved.training), (settings.gates, resolved.gates)):
        assert list(one.model_dump()) == list(other.model_dump())  # in the same order, in run.yaml
    path = tmp_path / "run.yaml"
    path.write_text(recipes.dump(resolved))
    assert resolve(recipes.load(path, {}), tmp_path) == resolved


def test_resolving_twice_changes_nothing(tmp_path: Path) -> None:
    once = resolve(Settings(model="resnet20", data="digits"), tmp_path)
    assert resolve(once, tmp_path) == once


def test_the_folder_tells_what_was_asked() -> None:
    settings = Settings(model="my.nets:small", data="digits", seed=3, budget=Budget(macs=0.5, latency=0.75))
    assert default_folder(settings) == Path("runs/my.nets.small-digits-ort-fp32-macs0.5_latency0.75-s3")
    assert default_folder(Settings(model="resnet20")) == Path("runs/resnet20-cifar10-ort-fp32-s0")


def test_the_folder_of_a_run_is_named_after_its_data() -> None:
    names = ("folder:pets", "folder:/data/my pets/", "folder:~/x", f"folder:{'a' * 50}/{'b' * 50}", "my.code:pets")
    folders = [default_folder(Settings(model="resnet20", data=name)) for name in names]
    assert [folder.parent for folder in folders] == [Path("runs")] * 5
    data = [folder.name.removeprefix("resnet20-").removesuffix("-ort-fp32-s0") for folder in folders]
    assert data == ["folder.pets", "folder.data.my.pets", "folder.x", f"{'a' * 9}.{'b' * 50}", "my.code.pets"]


def test_a_named_target_stays() -> None:
    assert choose_target(Settings(model="resnet20", target="trt-int8")).target == "trt-int8"
