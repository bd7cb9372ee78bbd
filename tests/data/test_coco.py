"""coco:DIR: pictures and boxes are found, stay aligned, and what cannot be used is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polar_deploy.config import Normalize, Training
from polar_deploy.data.coco import CocoFolder, LazyBoxed
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.tasks.detection import BoxedPictures
from tests.support.objects import draw, write

PLAIN = Normalize(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
Document = dict[str, Any]


def test_one_set_is_split(tmp_path: Path) -> None:
    draw(tmp_path, 20, name="default", folder="images/default")
    folder = CocoFolder(tmp_path)
    assert {name: len(part) for name, part in folder.parts.items()} == {"train": 16, "test": 4}
    assert folder.class_names == ("square", "disc")
    assert folder.most == 2
    assert "EXIF turns or mirrors 3 pictures" in folder.notes[0]


def test_parts_by_their_names(tmp_path: Path) -> None:
    for seed, (name, count) in enumerate({"train2017": 6, "val2017": 3}.items()):
        draw(tmp_path, count, seed, name, folder=name)
    parts = CocoFolder(tmp_path).parts
    assert {name: len(part) for name, part in parts.items()} == {"train": 6, "test": 3}
    draw(tmp_path, 2, 5, "test", "test")
    parts = CocoFolder(tmp_path).parts
    assert {name: len(part) for name, part in parts.items()} == {"train": 6, "validation": 3, "test": 2}
    assert parts["test"][0].picture == "test/000.png"


def samples(root: Path, size: int, **training: object) -> BoxedPictures:
    folder = CocoFolder(root)
    boxed = [each for part in folder.parts.values() for each in part]
    return BoxedPictures(LazyBoxed(root, boxed, size), folder.most, PLAIN, Training.model_validate(training))


@pytest.mark.parametrize(
    "training",
    [{"crop_scale": 0.4, "flip": True}, {"crop_scale": 1.0, "crop_padding": 9, "flip": True}, None],
    ids=["crops", "shifts", "plain"],
)
def test_picture_and_boxes_stay_aligned(training: dict[str, object] | None, tmp_path: Path) -> None:
    """Whatever is drawn, and whatever EXIF says, an object's colour fills its box, and is nowhere else."""
    draw(tmp_path, 16)
    read = samples(tmp_path, 64, **(training or {}))
    inputs, targets = read.read(np.arange(16), np.random.default_rng(1) if training else None)
    pictures, boxes, labels = inputs["input"], targets["boxes"], targets["labels"]
    assert (pictures.dtype, boxes.dtype) == (np.float32, np.float32)
    assert not targets["crowd"].any()
    rows, columns = np.mgrid[:64, :64] + 0.5
    seen = 0
    for picture, held, classes in zip(pictures, boxes, labels, strict=True):
        for (left, top, right, bottom), label in zip(held, classes, strict=True):
            if label >= 0:
                coloured = picture[2 if label == 0 else 0] > 0.6
                inside = (columns > left) & (columns < right) & (rows > top) & (rows < bottom)
                assert coloured[inside].mean() > 0.65
                beside = (columns > left - 2) & (columns < right + 2) & (rows > top - 2) & (rows < bottom + 2)
                assert not coloured[~beside].any()
                seen += 1
    assert seen >= (21 if training is None else 12)
    if training:
        again = read.read(np.arange(16), np.random.default_rng(1))
        assert np.array_equal(again[1]["boxes"], boxes)
        assert not np.array_equal(read.read(np.arange(16), np.random.default_rng(2))[1]["boxes"], boxes)


def test_boxes_are_a_part_of_the_fingerprint(tmp_path: Path) -> None:
    document = draw(tmp_path, 8)
    before = samples(tmp_path, 32).fingerprint()
    document["annotations"][0]["bbox"][2] -= 1
    write(tmp_path, document)
    assert samples(tmp_path, 32).fingerprint() != before


def orphan(document: Document, root: Path) -> None:
    document["annotations"][4]["image_id"] = 5


def lost(document: Document, root: Path) -> None:
    (root / "images/003.png").unlink()


def outside(document: Document, root: Path) -> None:
    document["images"][0] |= {"width": 36, "height": 40}
    document["annotations"][0]["bbox"] = [30, 2, 12, 12]


def flat(document: Document, root: Path) -> None:
    document["annotations"][0]["bbox"] = [3, 2, 12, 0]


def strange(document: Document, root: Path) -> None:
    document["annotations"][1]["category_id"] = 99


def broken(document: Document, root: Path) -> None:
    path = root / "images/002.png"
    path.write_bytes(path.read_bytes()[:60])


def resized(document: Document, root: Path) -> None:
    document["images"][3]["width"] += 3


ONE = [
    (orphan, r"annotations\[4\] is of the picture 5, which is not in 'images'"),
    (lost, r"no picture .*images/003.png, which has annotations"),
    (outside, r"annotations\[0\] has the box \[30, 2, 12, 12\].*not inside of 000.png of 36 × 40 pixels"),
    (flat, r"annotations\[0\] has the box \[3, 2, 12, 0\].*no area"),
    (strange, r"annotations\[1\] is of the category 99, which is not in 'categories' \(3, 7"),
    (broken, r"002.png cannot be decoded"),
    (resized, r"003.png has \d+ × \d+ pixels, \d+ × \d+ as annotated"),
]


@pytest.mark.parametrize(("spoil", "message"), ONE, ids=[each[0].__name__ for each in ONE])
def test_what_cannot_be_used_is_named_or_left_out(
    spoil: Callable[[Document, Path], None], message: str, tmp_path: Path
) -> None:
    document = draw(tmp_path, 12)
    spoil(document, tmp_path)
    write(tmp_path, document)
    with pytest.raises(ContentError, match=message) as found:
        CocoFolder(tmp_path).parts  # noqa: B018
    assert "--skip-broken" in found.value.todo
    rest = CocoFolder(tmp_path, skip_broken=True)
    held = [each for part in rest.parts.values() for each in part]
    assert len(held) in (11, 12)
    assert sum(len(each.labels) for each in held) < 16
    assert "left out" in rest.notes[0]


def test_a_box_may_stand_out_by_a_pixel(tmp_path: Path) -> None:
    document = draw(tmp_path, 8)
    document["images"][0] |= {}
    width, height = (document["images"][0][key] for key in ("width", "height"))
    document["annotations"][0]["bbox"] = [-0.6, 1, width + 1.2, height - 1]
    write(tmp_path, document)
    boxes = next(each for part in CocoFolder(tmp_path).parts.values() for each in part if "000" in each.picture).boxes
    assert boxes[0, [0, 2]].tolist() == [0, 1]


FILES: list[tuple[Callable[[Path, Document], object], str]] = [
    (lambda root, whole: write(root, {}), r"instances_train.json: images: Field required"),
    (lambda root, whole: (root / "annotations/instances_train.json").write_text('{"images": ['), "Invalid JSON"),
    (
        lambda root, whole: write(root, whole | {"images": [{"id": 1, "width": 3, "height": 3}]}),
        r"images\[0\].file_name: Field required",
    ),
    (
        lambda root, whole: write(
            root, whole | {"annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3]}]}
        ),
        r"annotations\[0\].bbox\[3\]: Field required",
    ),
    (lambda root, whole: write(root, whole | {"images": [], "annotations": []}), "has 0 pictures for train"),
    (lambda root, whole: write(root, whole | {"annotations": []}), "has no box in any picture for train"),
    (lambda root, whole: write(root, whole | {"categories": []}), "names no category"),
    (
        lambda root, whole: write(root, whole | {"images": whole["images"] * 2}),
        r"images\[8\] has the id 100, as another",
    ),
    (
        lambda root, whole: write(root, whole | {"categories": [*whole["categories"], {"id": 7, "name": "ring"}]}),
        r"categories\[2\] is 'ring' with the id 7, which is that of 'disc'",
    ),
    (
        lambda root, whole: write(root, whole | {"categories": [*whole["categories"], {"id": 8, "name": "disc"}]}),
        "two categories are called 'disc'",
    ),
    (lambda root, whole: write(root, whole, "train2"), "it is not clear which one is for train"),
    (lambda root, whole: (root / "annotations/instances_train.json").unlink(), r"no file instances_\*.json"),
    (lambda root, whole: (root / "images").rename(root / "pictures"), "there is no folder .*/train with the pictures"),
]


@pytest.mark.parametrize(("spoil", "message"), FILES)
def test_annotations_that_say_nothing(spoil: Callable[[Path, Document], object], message: str, tmp_path: Path) -> None:
    spoil(tmp_path, draw(tmp_path, 8))
    with pytest.raises(ContentError, match=message):
        CocoFolder(tmp_path).parts  # noqa: B018


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        CocoFolder(tmp_path / "nowhere").parts  # noqa: B018
