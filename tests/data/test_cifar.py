from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polar_deploy import data
from polar_deploy.data import cifar
from polar_deploy.data.pickles import read_pickle
from polar_deploy.errors import ContentError, UsageError
from tests.support.shared import cifar_folder, needs_shared


def batch(count: int, classes: int, key: str = "labels", seed: int = 0) -> dict[str, object]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)
    return {"data": pixels, key: [i % classes for i in range(count)], "batch_label": "a batch"}


def batches_10(root: Path, protocol: int = 2) -> Path:
    """CIFAR-10 in torchvision's folder, 20 training and 10 test images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for part in range(1, 6):
        content = batch(4, 10, seed=part) | {"labels": [(4 * part + i) % 10 for i in range(4)]}
        (folder / f"data_batch_{part}").write_bytes(pickle.dumps(content, protocol))
    (folder / "test_batch").write_bytes(pickle.dumps(batch(10, 10), protocol))
    return folder


def archive_of(folder: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(folder, folder.name)
    return stream.getvalue()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of the server."""
    server = tmp_path / "server"
    server.mkdir()
    monkeypatch.setattr(cifar, "_SERVER", f"{server.as_uri()}/")
    return server


@pytest.mark.parametrize("protocol", [2, 4])
def test_torchvisions_folder(tmp_path: Path, protocol: int) -> None:
    batches_10(tmp_path, protocol)
    dataset = data.load("cifar10", tmp_path)
    assert dataset.train.images.shape == (20, 32, 32, 3)
    assert dataset.train.labels.tolist() == [i % 10 for i in range(4, 24)]
    rows = np.concatenate([batch(4, 10, seed=part)["data"] for part in range(1, 6)])
    # A row is 1024 red, 1024 green, 1024 blue pixels, line by line.
    assert dataset.train.images[7, 5, 9].tolist() == [rows[7, c * 1024 + 5 * 32 + 9] for c in range(3)]
    assert dataset.class_names[3] == "cat"


def test_a_pickle_of_python_2() -> None:
    """As published: an array's bytes are a Python 2 string, and the module is numpy's old one."""
    content = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x03\x01\x80\xfftbs."
    )
    assert read_pickle(content, "here")["data"].tolist() == [[1, 128, 255]]


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 200), ("test", 100)):
        content = batch(count, 100, "fine_labels") | {"coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    dataset = data.load("cifar100", tmp_path, input_size=16)
    assert dataset.test.labels.tolist() == list(range(100))
    assert dataset.train.images.shape == (200, 16, 16, 3)
    assert len(set(dataset.class_names)) == 100
    assert (dataset.class_names[0], dataset.class_names[99]) == ("apple", "worm")


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch hacked",)


def test_hostile_pickles_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = batches_10(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": Hostile()}, 2))
    with pytest.raises(ContentError, match=r"data_batch_2 was not read: .*posix.system, which is no data"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
        (b"cnumpy\nload\n(S'x.npy'\ntR.", "it asks for numpy.load"),
        (b"c_codecs\nencode\n(Va\nVrot13\ntR.", "codec rot13"),
        (b"\x80\x02K", "was not read"),
        (b"", "EOFError"),
        (b"(lp0\n.", "holds a list, not a dictionary"),
    ],
)
def test_other_pickles_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(ContentError, match=f"a file .*{message}"):
        read_pickle(content, "a file")


def broken(key: str, value: object) -> bytes:
    return pickle.dumps(batch(4, 10) | {key: value}, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken("data", np.zeros((4, 3071), np.uint8)), r"data has the shape \[4, 3071\], not \[N, 3072\]"),
        (broken("data", np.zeros((4, 3072))), "data is float64, not uint8"),
        (broken("labels", [0, 1, 2, 10]), r"labels\[3\] is 10, outside 0 to 9"),
        (broken("labels", [0, 1, 2]), r"labels has the shape \[3\], but there are 4 images"),
        (broken("labels", [0, 1, [2, 3], 4]), "labels is no array"),
        (pickle.dumps({"labels": [1]}, 2), "has no entry 'data'"),
        (broken("labels", [])[:100], "was not read"),
    ],
)
def test_bad_batches_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (batches_10(tmp_path) / "data_batch_3").write_bytes(content)
    with pytest.raises(ContentError, match=f"data_batch_3.*{message}"):
        data.load("cifar10", tmp_path)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    (batches_10(tmp_path) / "data_batch_4").unlink()
    with pytest.raises(ContentError, match="lacks data_batch_4"):
        data.load("cifar10", tmp_path)


def test_npz_files_lie_in_the_folder_or_in_one_of_its_name(tmp_path: Path) -> None:
    images = np.zeros((20, 32, 32, 3), np.uint8)
    (tmp_path / "cifar10").mkdir()
    for part in ("train", "test"):
        np.savez(tmp_path / "cifar10" / f"{part}.npz", images=images, labels=np.arange(20) % 10)
    assert data.load("cifar10", tmp_path).fingerprint() == data.load("cifar10", tmp_path / "cifar10").fingerprint()
    with pytest.raises(ContentError, match="class 10 has 0 training images, and 90 classes"):
        data.load("cifar100", tmp_path / "cifar10")


def test_a_missing_folder_is_never_filled(tmp_path: Path, offline: Path) -> None:
    with pytest.raises(UsageError, match="nowhere does not exist") as error:
        data.load("cifar10", tmp_path / "nowhere")
    assert "cifar-10-batches-py" in error.value.todo
    assert not (tmp_path / "nowhere").exists()


def test_a_path_that_cannot_be_looked_at() -> None:
    with pytest.raises(UsageError, match="x" * 300):
        data.load("cifar10", Path("x" * 300))


def test_a_failed_download_says_what_is_expected(
    tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"cifar100 is not in .*data, and its download from file") as error:
        data.load("cifar100")
    assert "cifar-100-python/" in error.value.todo
    assert "--data-dir" in error.value.todo
    assert not (tmp_path / "data").exists()


def test_a_download_is_checked_and_kept(tmp_path: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = archive_of(batches_10(tmp_path / "published"))
    (offline / "cifar-10-python.tar.gz").write_bytes(content)
    with pytest.raises(ContentError, match="not c58f30108f718f92721af3b95e74349a, and was thrown away"):
        data.load("cifar10")
    assert not (tmp_path / "data").exists()

    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(cifar._LAYOUTS, "cifar10", replace(cifar._LAYOUTS["cifar10"], md5=digest))
    first = data.load("cifar10")
    assert first.fingerprint() == data.load("cifar10", tmp_path / "published").fingerprint()
    (offline / "cifar-10-python.tar.gz").unlink()
    assert data.load("cifar10").fingerprint() == first.fingerprint()

    kept = tmp_path / "data" / "cifar-10-python.tar.gz"
    kept.write_bytes(content[: len(content) // 2])
    with pytest.raises(ContentError, match=r"cifar-10-python.tar.gz cannot be read"):
        data.load("cifar10")


@needs_shared
def test_the_real_images(tmp_path: Path) -> None:
    folder = cifar_folder(tmp_path, "cifar10", train_limit=1000, test_limit=25)
    dataset = data.load("cifar10", folder)
    assert np.bincount(dataset.train.labels).tolist() == [100] * 10
    assert np.bincount(dataset.test.labels).tolist() == [3] * 5 + [2] * 5
    pixels = np.asarray(dataset.train.images) / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), dataset.spec.mean, atol=0.02)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), dataset.spec.std, atol=0.02)
