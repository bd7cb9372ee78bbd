from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polar_deploy import data
from polar_deploy.data.dataset import DataSpec
from polar_deploy.errors import ContentError, UsageError

SPEC = DataSpec("toy", 3, 16, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), flip=True, crop_padding=2, epochs=1)
COLOURS = {"n01": (200, 10, 10), "n02": (10, 200, 10), "n03": (10, 10, 200)}


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (24, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def image_folder(root: Path, test: str = "val") -> Path:
    for name, colour in COLOURS.items():
        for number in range(2):
            picture(root / "train" / name / f"{number}.png", colour)
        picture(root / test / name / "x.JPEG", colour, (20, 40))
    (root / "train" / "n01" / "notes.txt").write_text("not an image")
    return root


@pytest.mark.parametrize("test", ["val", "test"])
def test_classes_and_colours(tmp_path: Path, test: str) -> None:
    dataset = data.image_folders(SPEC, image_folder(tmp_path, test), shorter=18)
    assert dataset.class_names == ("n01", "n02", "n03")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.train.images.shape == (6, 16, 16, 3)
    chosen = np.array([5, 0, 2])
    pixels = dataset.train.images[chosen]
    assert pixels.dtype == np.uint8
    assert pixels[:, 8, 8].tolist() == [list(COLOURS[name]) for name in ("n03", "n01", "n02")]
    assert dataset.test.images[np.arange(3)].shape == (3, 16, 16, 3)


def test_the_centre_is_cut_out(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :8], image[:, 8:24], image[:, 24:] = 50, 100, 150
    Image.fromarray(image).save(root / "train" / "n01" / "0.png")
    pixels = data.image_folders(SPEC, root, shorter=16).train.images[np.array([0])]
    assert np.unique(pixels).tolist() == [100]


def test_the_shorter_side_is_resized_first(tmp_path: Path) -> None:
    """As torchvision's Resize(18), CenterCrop(16): 93 × 70 pixels become ⌊93 · 18 / 70⌋ × 18, half pixels are even."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 93, 3), np.uint8))
    root = image_folder(tmp_path)
    image.save(root / "train" / "n01" / "0.png")
    images = data.image_folders(SPEC, root, shorter=18).train.images
    expected = image.resize((23, 18), Image.Resampling.BILINEAR).crop((4, 1, 20, 17))
    np.testing.assert_array_equal(images[np.array([0])][0], np.asarray(expected))


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    Image.new("L", (16, 16), 77).save(root / "train" / "n01" / "0.png")
    Image.new("RGBA", (16, 16), (1, 2, 3, 0)).save(root / "train" / "n01" / "1.png")
    pixels = data.image_folders(SPEC, root, shorter=16).train.images[np.array([0, 1])]
    assert pixels[:, 0, 0].tolist() == [[77, 77, 77], [1, 2, 3]]


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    broken = root / "train" / "n02" / "1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    dataset = data.image_folders(SPEC, root, shorter=16)
    with pytest.raises(ContentError, match=r"n02/1\.png cannot be decoded"):
        dataset.train.images[np.arange(6)]


def test_the_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    prints = {data.image_folders(SPEC, root, shorter).fingerprint() for shorter in (16, 16, 18)}
    (root / "train" / "n01" / "0.png").rename(root / "train" / "n01" / "9.png")
    prints.add(data.image_folders(SPEC, root, 16).fingerprint())
    picture(root / "train" / "n01" / "9.png", (1, 2, 3), (99, 99))
    prints.add(data.image_folders(SPEC, root, 16).fingerprint())
    assert len(prints) == 4


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder 'train'"):
        data.image_folders(SPEC, tmp_path, 16)
    root = image_folder(tmp_path / "a")
    (root / "val" / "n04").mkdir()
    with pytest.raises(ContentError, match="training and test classes differ in 1, first in 'n04'"):
        data.image_folders(SPEC, root, 16)
    (root / "train" / "n04").mkdir()
    with pytest.raises(ContentError, match="has 4 class folders, toy has 3 classes"):
        data.image_folders(SPEC, root, 16)
    root = image_folder(tmp_path / "b")
    (root / "train" / "n03" / "0.png").unlink()
    with pytest.raises(ContentError, match="class 2 has 1 training images"):
        data.image_folders(SPEC, root, 16)
    image_folder(tmp_path / "c", test="elsewhere")
    with pytest.raises(UsageError, match="neither 'val' nor 'test'"):
        data.image_folders(SPEC, tmp_path / "c", 16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny ImageNet as published, with two training images a class."""
    parent = tmp_path_factory.mktemp("tiny")
    root, lines = parent / "tiny-imagenet-200", []
    picture(root / "first.JPEG", (10, 20, 30), (64, 64))
    content = (root / "first.JPEG").read_bytes()
    (root / "val" / "images").mkdir(parents=True)
    for label in range(200):
        folder = root / "train" / f"n{label:03}" / "images"
        folder.mkdir(parents=True)
        for number in range(2):
            (folder / f"n{label:03}_{number}.JPEG").write_bytes(content)
        (root / "val" / "images" / f"val_{label}.JPEG").write_bytes(content)
        lines.append(f"val_{label}.JPEG\tn{199 - label:03}\t0\t0\t10\t10\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images").mkdir(parents=True)  # as published: without labels
    return parent


def test_tiny_imagenet(tiny: Path) -> None:
    dataset = data.load("tiny-imagenet", tiny)
    assert dataset.train.images.shape == (400, 64, 64, 3)
    assert dataset.test.labels.tolist() == list(range(200))
    assert isinstance(dataset.test.images, data.LazyImages)
    assert dataset.test.images.files[0] == "val/images/val_199.JPEG"
    assert dataset.fingerprint() == data.load("tiny-imagenet", tiny / "tiny-imagenet-200").fingerprint()
    assert data.load("tiny-imagenet", tiny, input_size=32).test.images[np.array([3])].shape == (1, 32, 32, 3)


def test_a_wrong_annotation_is_named(tiny: Path) -> None:
    annotations = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_9999.JPEG\tn001\n")
    with pytest.raises(ContentError, match=r"val_annotations.txt, line 201: 'val_9999.JPEG"):
        data.load("tiny-imagenet", tiny)
    annotations.write_text(good)


def test_imagenet_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="imagenet is not there: no folder 'train' in"):
        data.load("imagenet", tmp_path)
    image_folder(tmp_path / "ILSVRC2012")
    with pytest.raises(ContentError, match="has 3 class folders, imagenet has 1000 classes"):
        data.load("imagenet", tmp_path)
