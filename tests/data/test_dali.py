"""NVIDIA DALI reads training pictures as Pillow does; run with its operators on CPUs, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polar_deploy.data import dali
from polar_deploy.data.pictures import LazyImages
from polar_deploy.errors import ContentError, MachineError
from polar_deploy.training.batches import ImageBatches
from tests.training.runs import CPU, settings

INSTALLED = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
with_dali = pytest.mark.skipif(not INSTALLED, reason="NVIDIA DALI is not installed")


def _picture(width: int, height: int) -> Image.Image:
    """Smooth colours, so that decoders may round otherwise but not place anything elsewhere."""
    corners = np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def _images(root: Path, *names: str, size: int = 40) -> LazyImages:
    return LazyImages(root, np.array(names, object), size, size)


@with_dali
def test_pictures_are_those_of_pillow(tmp_path: Path) -> None:
    """Every orientation of EXIF, grey, CMYK, PNG, progressive, smaller than asked for, and odd sides."""
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        _picture(150, 101).save(tmp_path / f"turned{orientation}.jpg", exif=exif, quality=95)
    _picture(150, 101).save(tmp_path / "progressive.jpg", progressive=True, quality=95)
    _picture(31, 50).save(tmp_path / "small.jpg", quality=95)
    _picture(97, 333).save(tmp_path / "odd.jpg", quality=95, subsampling=0)
    _picture(150, 101).convert("L").save(tmp_path / "grey.jpg", quality=95)
    _picture(150, 101).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    _picture(150, 101).save(tmp_path / "other.png")
    images = _images(tmp_path, *sorted(path.name for path in tmp_path.iterdir()))
    order = np.random.default_rng(1).permutation(len(images.files))
    for name, found, expected in zip(
        images.files[order], dali.DaliReader(images, CPU)(order), images.whole(order), strict=True
    ):
        assert found.shape == expected.shape, name
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 3, name


@with_dali
def test_more_pictures_than_a_batch_of_dali_has(tmp_path: Path) -> None:
    for shade in range(70):
        Image.new("RGB", (60, 60), (3 * shade,) * 3).save(tmp_path / f"{shade:02}.jpg", quality=95)
    images = _images(tmp_path, *sorted(path.name for path in tmp_path.iterdir()))
    found = dali.DaliReader(images, CPU)(np.arange(70))
    assert [round(float(picture.mean()) / 3) for picture in found] == list(range(70))


@with_dali
def test_a_broken_picture_is_named_and_the_next_batch_is_read(tmp_path: Path) -> None:
    _picture(80, 80).save(tmp_path / "good.jpg")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: 4 * len(whole) // 5])
    reader = dali.DaliReader(_images(tmp_path, "cut.jpg", "good.jpg"), CPU)
    with pytest.raises(ContentError, match=r"cut\.jpg cannot be decoded"):
        reader(np.array([0, 1]))
    assert reader(np.array([1]))[0].shape == (60, 60, 3)


@with_dali
def test_training_reads_by_it_where_it_is_asked_for(tmp_path: Path) -> None:
    """The same crops of the same pictures, to a step or two of a pixel; what accuracy is judged by is Pillow's."""
    for number in range(8):
        _picture(60 + number, 70).save(tmp_path / f"{number}.jpg", quality=95)
    images = _images(tmp_path, *(f"{number}.jpg" for number in range(8)))

    def batches(decoder: str) -> ImageBatches:
        held = {"batch_size": 4, "crop_scale": 0.4, "decoder": decoder}
        return ImageBatches(images, np.arange(8), np.arange(8), settings(training=held), CPU)

    with_it, without = batches("dali"), batches("pillow")
    for found, expected in zip(with_it.epoch(0), without.epoch(0), strict=True):
        assert found.targets["label"].tolist() == expected.targets["label"].tolist()
        assert 0 < float((found.inputs["input"] - expected.inputs["input"]).abs().max()) < 0.1
    for found, expected in zip(with_it.plain(), without.plain(), strict=True):
        assert torch.equal(found.inputs["input"], expected.inputs["input"])


def test_dali_reads_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(dali, "_is_installed", lambda: True)
    wanted = {
        (decoder, device.type)
        for decoder in ("auto", "dali", "pillow")
        for device in (CPU, gpu)
        if dali.is_wanted(decoder, device)
    }
    assert wanted == {("auto", "cuda"), ("dali", "cuda"), ("dali", "cpu")}
    monkeypatch.setattr(dali, "_is_installed", lambda: False)
    assert not dali.is_wanted("auto", gpu)
    with pytest.raises(MachineError, match=r"training\.decoder=dali: NVIDIA DALI is not installed"):
        dali.is_wanted("dali", CPU)
