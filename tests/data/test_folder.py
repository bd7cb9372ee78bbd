"""--data folder:DIR: the user's own pictures, without code."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polar_deploy import data
from polar_deploy.data import LazyImages
from polar_deploy.data.names import without_place
from polar_deploy.errors import ContentError, UsageError

CLASSES = {"bird": (200, 10, 10), "cat": (10, 200, 10), "train": (10, 10, 200)}  # one is called as a part is


def fill(folder: Path, count: int, classes: dict[str, tuple[int, int, int]] = CLASSES) -> Path:
    """`count` pictures of each class, of its colour."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 30), colour).save(folder / name / f"{number:03}.jpg", quality=95)
    return folder


def load(root: Path, **options: object) -> data.Dataset:
    return data.load(f"folder:{root}", input_size=16, **options)  # type: ignore[arg-type]


def files(split: data.Split) -> list[str]:
    assert isinstance(split.images, LazyImages)
    return split.images.files.tolist()


def colours_are_right(dataset: data.Dataset) -> bool:
    """Whether each picture has the colour of its label's class."""
    for split in (dataset.train, dataset.test):
        given = split.images[np.arange(len(split.labels))][:, 8, 8].astype(int)
        wanted = np.array([CLASSES[dataset.class_names[label]] for label in split.labels])
        if np.abs(given - wanted).max() > 8:
            return False
    return True


def test_one_folder_is_split_whatever_the_seed(tmp_path: Path) -> None:
    dataset = load(fill(tmp_path / "pets", 25))
    assert dataset.class_names == ("bird", "cat", "train")
    assert np.bincount(dataset.train.labels).tolist() == [20, 20, 20]
    assert np.bincount(dataset.test.labels).tolist() == [5, 5, 5]
    assert {*files(dataset.train)}.isdisjoint(files(dataset.test))
    assert colours_are_right(dataset)
    assert dataset.validation is None
    assert files(load(tmp_path / "pets").test) == files(dataset.test)
    chosen = {name.partition("/")[2] for name in files(dataset.test)}
    assert len(chosen) > 5  # not the same numbers in each class, nor the last ones


def test_the_test_set_stays_when_pictures_are_added(tmp_path: Path) -> None:
    before = load(fill(tmp_path, 50))
    for name, colour in CLASSES.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / name / "more.jpg")
    after = load(tmp_path)
    assert len({*files(before.test)} - {*files(after.test)}) <= 3
    assert len(files(after.train)) + len(files(after.test)) == 153


@pytest.mark.parametrize("held", ["val", "valid", "validation", "test"])
def test_train_and_one_more_part(tmp_path: Path, held: str) -> None:
    fill(tmp_path / "train", 4)
    fill(tmp_path / held, 2)
    dataset = load(tmp_path)
    assert dataset.class_names == ("bird", "cat", "train")
    assert {name.split("/")[0] for name in files(dataset.train)} == {"train"}
    assert {name.split("/")[0] for name in files(dataset.test)} == {held}
    assert dataset.validation is None
    assert colours_are_right(dataset)


def test_of_three_parts_one_validates(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        fill(tmp_path / part, count)
    dataset = load(tmp_path)
    assert len(dataset.train.labels) == 3 * 7
    assert len(dataset.test.labels) == 3 * 2
    assert {name.split("/")[0] for name in files(dataset.test)} == {"test"}
    learned, validated = data.split_validation(dataset, seed=1)
    names = np.array(files(dataset.train))
    assert {name.split("/")[0] for name in names[learned]} == {"train"}
    assert {name.split("/")[0] for name in names[validated]} == {"val"}
    assert sorted([*learned, *validated]) == list(range(21))
    assert colours_are_right(dataset)


def test_a_test_folder_without_classes_has_no_labels_and_is_not_it(tmp_path: Path) -> None:
    fill(tmp_path / "train", 4)
    fill(tmp_path / "val", 2)
    (tmp_path / "test").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "test" / "unknown.jpg")
    assert {name.split("/")[0] for name in files(load(tmp_path).test)} == {"val"}


def test_a_lone_train_folder_is_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", 10)
    dataset = load(tmp_path)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (24, 6)
    assert dataset.class_names == ("bird", "cat", "train")


def test_pictures_may_lie_deeper_and_links_may_go_in_circles(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    deep = tmp_path / "cat" / "2024" / "may"
    deep.mkdir(parents=True)
    Image.new("RGB", (40, 30), CLASSES["cat"]).save(deep / "deep.JPG")
    (tmp_path / "cat" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "cat" / ".ipynb_checkpoints" / "x.jpg").write_bytes(b"no picture")
    (deep / "again").symlink_to(tmp_path / "cat", target_is_directory=True)
    dataset = load(tmp_path)
    assert "cat/2024/may/deep.JPG" in files(dataset.train) + files(dataset.test)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 10


def test_stray_files_and_folders_are_neither_classes_nor_pictures(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes(b"no picture")
    for name in ("._000.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "labels.csv"):
        (tmp_path / name).write_bytes(b"no picture")
        (tmp_path / "cat" / name).write_bytes(b"no picture")
    dataset = load(tmp_path)
    assert dataset.class_names == ("bird", "cat", "train")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 15


def test_what_is_known_unread(tmp_path: Path) -> None:
    spec = data.spec(f"folder:{fill(tmp_path / 'pets', 3)}")
    assert (spec.classes, spec.input_size, spec.crop_scale) == (3, 224, 0.35)
    assert spec.mean == data.spec("imagenet").mean
    assert data.load(f"folder:{tmp_path / 'pets'}").train.images.shape[1:] == (224, 224, 3)
    assert data.spec("folder:pets", tmp_path) == spec  # --data-dir is where a relative one begins


@pytest.mark.parametrize(("count", "batch"), [(3, 8), (25, 8), (80, 32), (236, 64), (240, 128), (400, 128)])
def test_small_folders_have_small_batches(tmp_path: Path, count: int, batch: int) -> None:
    """An epoch of 0.72 · 3 · count pictures has four steps or more, if batches of 8 are small enough for that."""
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.jpg").touch()
    assert data.spec(f"folder:{tmp_path}").batch_size == batch


def test_broken_pictures_are_named_or_left_out(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    sound = load(tmp_path)
    for split, content in ((sound.train, b""), (sound.test, b"<html>404</html>")):
        (tmp_path / files(split)[3]).write_bytes(content)
    with pytest.raises(ContentError, match=r"\.jpg cannot be decoded: .*\(2 files in all are no sound pictures\)") as e:
        load(tmp_path)
    assert "--skip-broken" in e.value.todo
    dataset = load(tmp_path, skip_broken=True)
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (47, 11)
    assert files(dataset.train) == [name for name in files(sound.train) if name != files(sound.train)[3]]
    assert colours_are_right(dataset)
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith(f"2 broken pictures are left out, first {tmp_path / files(sound.train)[3]} ")
    assert dataset.fingerprint() != sound.fingerprint()


def test_validation_stays_what_it_is_when_broken_pictures_go(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        fill(tmp_path / part, 4)
    (tmp_path / "train" / "bird" / "000.jpg").write_bytes(b"")
    (tmp_path / "val" / "cat" / "002.jpg").write_bytes(b"")
    dataset = load(tmp_path, skip_broken=True)
    assert dataset.validation is not None
    names = np.array(files(dataset.train))[dataset.validation]
    assert sorted(names) == sorted(
        f"val/{name}/{number:03}.jpg" for name in CLASSES for number in range(4) if (name, number) != ("cat", 2)
    )


@pytest.mark.parametrize(("part", "count"), [("train", 3), ("val", 4)])
def test_a_class_that_has_nothing_else_is_named(tmp_path: Path, part: str, count: int) -> None:
    fill(tmp_path / "train", 4)
    fill(tmp_path / "val", 4)
    for number in range(count):
        (tmp_path / part / "cat" / f"{number:03}.jpg").write_bytes(b"")
    with pytest.raises(ContentError, match=r"set without broken files: class 1 has \d"):
        load(tmp_path, skip_broken=True)


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere"):
        data.spec(f"folder:{tmp_path / 'nowhere'}")
    Image.new("RGB", (9, 9)).save(tmp_path / "alone.jpg")
    with pytest.raises(ContentError, match="has 0 class folders") as error:
        data.spec(f"folder:{tmp_path}")
    assert "DIR/CLASS/*.jpg" in error.value.todo
    fill(tmp_path / "one", 5, {"cat": (1, 2, 3)})
    with pytest.raises(ContentError, match="has 1 class folders, a network tells two apart"):
        load(tmp_path / "one")
    fill(tmp_path / "few", 2)
    with pytest.raises(ContentError, match="few/bird holds 2 pictures: two to train on and one to test are needed"):
        load(tmp_path / "few")
    fill(tmp_path / "parts" / "train", 4)
    (tmp_path / "parts" / "val").mkdir()
    with pytest.raises(ContentError, match="parts/val holds no class folders"):
        data.spec(f"folder:{tmp_path / 'parts'}")
    fill(tmp_path / "other" / "train", 4)
    fill(tmp_path / "other" / "test", 4, {"bird": (1, 2, 3), "dog": (4, 5, 6)})
    with pytest.raises(ContentError, match="training and test classes differ in 3, first in 'cat'"):
        load(tmp_path / "other")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "shut", 3)
    (tmp_path / "shut").chmod(0)
    try:
        with pytest.raises(UsageError, match=r"cannot read .*shut: Permission denied"):
            data.spec(f"folder:{tmp_path / 'shut'}")
    finally:
        (tmp_path / "shut").chmod(0o755)


def test_others_see_the_folders_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_place("folder:/home/me/pets") == "folder:pets"
    assert without_place("folder:/home/me/pets/") == "folder:pets"
    assert without_place("folder:.") == f"folder:{tmp_path.name}"
    assert without_place("cifar10") == "cifar10"
    assert without_place("my.code:pets") == "my.code:pets"
