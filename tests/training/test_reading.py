"""Batches of pictures in files: read ahead, kept, cropped at random; and the same whatever came in between."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polar_deploy.data.crops import DRAWS, resized_crop
from polar_deploy.data.dataset import normalise
from polar_deploy.data.pictures import LazyImages
from polar_deploy.training import batches
from polar_deploy.training.batches import ImageBatches
from polar_deploy.training.loop import TrainingJob
from tests.training.runs import CPU, NORMALIZE, BreakIn, Broken, fit, network, pair, settings, train, without_seconds

COUNT, SIZE = 40, 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> LazyImages:
    """JPEGs of noise, of several sizes."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(COUNT):
        size = (int(draw.integers(20, 60)), int(draw.integers(20, 60)), 3)
        Image.fromarray(draw.integers(0, 256, size, np.uint8)).save(root / f"{number}.jpg")
    return LazyImages(root, np.array([f"{number}.jpg" for number in range(COUNT)], dtype=object), 18, SIZE)


def read(pictures: Any, **training: Any) -> ImageBatches:
    """All but the first three; every picture is its own class."""
    held = {"batch_size": 8, "flip": False, "crop_padding": 2, "cutout": 0, "crop_scale": 0.3} | training
    return ImageBatches(pictures, np.arange(COUNT), np.arange(3, COUNT), settings(training=held, seed=5), CPU)


def whole(parts: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*map(pair, parts), strict=True)
    return torch.cat(images).numpy(), torch.cat(labels).numpy()


@pytest.mark.parametrize("flip", [False, True])
def test_every_image_is_a_resized_crop_of_its_own_whole_picture(pictures: LazyImages, flip: bool) -> None:
    seen, flips = set(), []
    for number in range(2):
        draw = torch.Generator().manual_seed(5 * 1_000_003 + number)
        order = torch.randperm(COUNT - 3, generator=draw)
        given, labels = whole(read(pictures, flip=flip).epoch(number))
        assert labels.tolist() == (order[:32] + 3).tolist()
        for start in range(0, 32, 8):
            draws = torch.rand(8, DRAWS, generator=draw).numpy()
            torch.randint(0, 1, (8, 2, 1), generator=draw)  # shifts, of which there are none
            mirrored = (torch.rand(8, 1, generator=draw)[:, 0] < 0.5) & flip
            batch = slice(start, start + 8)
            for image, label, own, over in zip(given[batch], labels[batch], draws, mirrored.tolist(), strict=True):
                (picture,) = pictures.whole(np.array([label]))
                made = resized_crop(picture, SIZE, 0.3, own)
                made = made[:, ::-1] if over else made
                flips.append(over)
                expected = normalise(made[None], NORMALIZE.mean, NORMALIZE.std)[0]
                np.testing.assert_allclose(image, expected, atol=1e-5)
                seen.add(made.tobytes())
    assert len(seen) == 64
    assert {*flips} == {False, flip}


def test_cutout_blanks_crops_too(pictures: LazyImages) -> None:
    (whole_ones, _), (cut, _) = (whole(read(pictures, cutout=side, batch_size=37).epoch(0)) for side in (0, 5))
    blank = (cut == 0).all(1)
    assert (blank.sum((1, 2)) <= 25).all()
    assert (blank.sum((1, 2)) >= 9).all()  # cut at the border
    where = np.broadcast_to(~blank[:, None], cut.shape)
    np.testing.assert_array_equal(cut[where], whole_ones[where])


def test_an_epoch_is_the_same_whatever_is_kept(pictures: LazyImages, monkeypatch: pytest.MonkeyPatch) -> None:
    used = read(pictures, flip=True, cutout=3)
    first = whole(used.epoch(2))
    again = whole(used.epoch(2))
    plain = whole(used.plain())
    monkeypatch.setattr(batches, "available_memory", lambda: 0)
    fresh = read(pictures, flip=True, cutout=3)
    for one, other in ((first, again), (first, whole(fresh.epoch(2))), (plain, whole(fresh.plain()))):
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], other[1])
    assert not np.array_equal(first[0], whole(used.epoch(3))[0])


def test_evaluation_sees_the_centres(pictures: LazyImages) -> None:
    used = read(pictures)
    for _ in range(2):
        images, labels = whole(used.plain())
        assert labels.tolist() == list(range(3, COUNT))
        expected = normalise(pictures[np.arange(3, COUNT)], NORMALIZE.mean, NORMALIZE.std)
        np.testing.assert_allclose(images, expected, atol=1e-5)


def test_arrays_can_be_cropped_too() -> None:
    images = np.random.default_rng(1).integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)
    used = read(images)
    assert used.reads
    assert not read(images, crop_scale=1.0).reads
    given, labels = whole(used.epoch(0))
    unchanged = normalise(images[labels], NORMALIZE.mean, NORMALIZE.std)
    assert all(np.abs(one - other).max() > 0.1 for one, other in zip(given, unchanged, strict=True))


class Slow:
    """A user's source: it tells when, and by how many at once, it is asked."""

    shape = (COUNT, SIZE, SIZE, 3)

    def __init__(self) -> None:
        self.asked = 0
        self.together = 0
        self.most = 0
        self.threads: set[str] = set()

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        self.together += 1
        self.most = max(self.most, self.together)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.02)
        self.together -= 1
        self.asked += len(index)
        return np.zeros((len(index), SIZE, SIZE, 3), np.uint8)


def test_batches_are_read_ahead_by_one_reader_at_a_time() -> None:
    source = Slow()
    used, other = read(source), read(source)
    loop = used.epoch(0)
    next(loop)
    deadline = time.monotonic() + 5
    while source.asked < 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.asked == 24  # the one that was asked for, and two more
    for _ in other.epoch(1):  # in the middle of the first loop, as statistics of norms are
        pass
    assert source.most == 1
    assert threading.main_thread().name not in source.threads
    assert len(list(loop)) == 3
    assert used.waited > 0


def test_a_loop_that_is_left_early_ends_its_reader() -> None:
    source = Slow()
    loop = read(source).epoch(0)
    next(loop)
    loop.close()
    asked = source.asked
    assert not [each for each in threading.enumerate() if each.name.startswith("reader")]
    time.sleep(0.1)
    assert source.asked == asked


def test_a_source_that_fails_ends_the_loop() -> None:
    class Failing(Slow):
        def __getitem__(self, index: np.ndarray) -> np.ndarray:
            if self.asked >= 8:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    loop = read(Failing()).epoch(0)
    next(loop)
    with pytest.raises(OSError, match="the disk is gone"):
        list(loop)


def test_a_broken_run_on_files_ends_like_an_unbroken_one(
    pictures: LazyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights bit by bit; the run that goes on has no memory to keep pictures in."""
    asked = settings(training={"batch_size": 8, "crop_scale": 0.3, "flip": True})

    def run(folder: Path) -> TrainingJob:
        labels, parts = np.arange(COUNT) % 4, (np.arange(8, COUNT), np.arange(8))
        learned, validated = (ImageBatches(pictures, labels, rows, asked, CPU) for rows in parts)
        made = fit(asked, folder, gated=False, epochs=4)
        return replace(made, train=learned, validation=validated)

    unbroken = run(tmp_path / "unbroken")
    records = train(unbroken).records
    with pytest.raises(Broken):
        train(run(tmp_path / "broken"), progress=BreakIn(3))
    monkeypatch.setattr(batches, "available_memory", lambda: 0)
    resumed = run(tmp_path / "broken")
    again = train(resumed).records
    assert len(again) == 4
    assert without_seconds(again) == without_seconds(records)
    before = network().state_dict()
    for name, tensor in unbroken.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    assert not torch.equal(before["linear.weight"], unbroken.network.state_dict()["linear.weight"])
