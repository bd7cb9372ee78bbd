from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polar_deploy import data
from polar_deploy.data.dataset import Dataset, DataSpec, Split, normalise, split_validation
from polar_deploy.errors import UsageError

SPEC = DataSpec("toy", 3, 4, (0.5, 0.25, 0.1), (0.2, 0.3, 0.4), flip=True, crop_padding=1, epochs=1)


def toy(seed: int = 0, counts: tuple[int, ...] = (20, 50, 7)) -> Dataset:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    images = rng.integers(0, 256, (len(labels), 4, 4, 3), np.uint8)
    return Dataset(SPEC, Split(images, labels), Split(images[:5], labels[:5]), ("a", "b", "c"))


def test_normalise_is_its_formula() -> None:
    images = toy().train.images[np.arange(6)]
    result = normalise(images, SPEC.mean, SPEC.std)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    assert result.shape == (6, 3, 4, 4)
    for channel in range(3):
        expected = (images[..., channel].astype(np.float64) / 255 - SPEC.mean[channel]) / SPEC.std[channel]
        np.testing.assert_allclose(result[:, channel], expected, atol=1e-6)


def test_split_validation_takes_its_share_of_every_class() -> None:
    dataset = toy()
    train, validation = split_validation(dataset, seed=3)
    assert sorted([*train, *validation]) == list(range(77))
    assert np.bincount(dataset.train.labels[validation]).tolist() == [2, 5, 1]
    assert not np.array_equal(validation, split_validation(dataset, seed=4)[1])
    assert np.array_equal(validation, split_validation(dataset, seed=3)[1])


def test_split_validation_leaves_both_sides_an_image() -> None:
    dataset = toy(counts=(2, 2, 2))
    for share in (0.01, 0.99):
        train, validation = split_validation(dataset, 0, share)
        assert sorted(dataset.train.labels[train]) == sorted(dataset.train.labels[validation]) == [0, 1, 2]


def test_fingerprint_follows_the_content() -> None:
    dataset = toy()
    assert dataset.fingerprint() == dataset.fingerprint() == toy().fingerprint()
    assert len(bytes.fromhex(dataset.fingerprint())) == hashlib.sha256().digest_size
    images, labels = np.array(dataset.test.images[np.arange(5)]), dataset.test.labels.copy()
    images[4, 3, 3, 2] ^= 1
    labels[0] = (labels[0] + 1) % 3
    others = [
        toy(seed=1),
        replace(dataset, test=Split(images, dataset.test.labels)),
        replace(dataset, test=Split(dataset.test.images, labels)),
        replace(dataset, class_names=("a", "b", "d")),
    ]
    assert len({dataset.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_a_spec_is_known_unread() -> None:
    assert [data.spec(n).classes for n in ("digits", "cifar10", "cifar100", "tiny-imagenet", "imagenet")] == [
        10,
        10,
        100,
        200,
        1000,
    ]
    assert data.spec("cifar100").mean == (0.5071, 0.4865, 0.4409)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="no data set called 'CIFAR-10'") as error:
        data.spec("CIFAR-10")
    assert "cifar10" in error.value.todo
    with pytest.raises(UsageError) as error:
        data.load("zzz")
    assert "digits, cifar10, cifar100, tiny-imagenet, imagenet" in error.value.todo


def test_a_folder_without_its_word_and_a_word_without_its_folder_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pets").mkdir()
    with pytest.raises(UsageError, match=r"'my pets', which is a folder\n.*give --data folder:my pets"):
        data.spec("my pets")
    for word in ("folder", "pairs", "coco"):
        with pytest.raises(UsageError, match=f"'{word}:' names no folder\n.*write {word}:DIR"):
            data.spec(f"{word}:")


def test_the_import_is_light() -> None:
    heavy = "{'torch', 'sklearn', 'scipy', 'torchvision', 'onnx'} & set(sys.modules)"
    code = f"import sys; from polar_deploy import data; data.spec('digits'); print({heavy})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
