"""pairs:DIR: pictures and masks are found, stay aligned, and what cannot be used is named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polar_deploy.config import Normalize, Training
from polar_deploy.data.decode import decode_indices
from polar_deploy.data.pairs import LazyPairs, PairFolder
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.tasks.segmentation import MaskedPictures
from tests.support.shapes import paint

PLAIN = Normalize(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_a_folder_is_paired_and_split(tmp_path: Path) -> None:
    folder = PairFolder(paint(tmp_path, 20))
    assert {name: len(pairs) for name, pairs in folder.parts.items()} == {"train": 16, "test": 4}
    assert folder.classes == 3
    assert folder.class_names == ()
    assert all(Path(pair.picture).stem == Path(pair.mask).stem for pair in folder.parts["train"])
    assert "EXIF turns or mirrors 5 pictures" in folder.notes[0]


def test_parts_by_folders(tmp_path: Path) -> None:
    for seed, (name, count) in enumerate({"train": 6, "val": 3, "test": 2}.items()):
        paint(tmp_path / name, count, seed)
    parts = PairFolder(tmp_path).parts
    assert {name: len(pairs) for name, pairs in parts.items()} == {"train": 6, "validation": 3, "test": 2}
    assert parts["test"][0] == ("test/images/000.png", "test/masks/000.png")


def samples(root: Path, size: int, **training: object) -> MaskedPictures:
    folder = PairFolder(root)
    pairs = [pair for part in folder.parts.values() for pair in part]
    return MaskedPictures(LazyPairs(root, pairs, size), PLAIN, Training.model_validate(training))


def told_by_colour(pictures: np.ndarray) -> np.ndarray:
    """The class that a pixel's colour is of, as `paint` gives them."""
    red, blue = pictures[:, 0], pictures[:, 2]
    return np.where(red > 0.6, 1, np.where(blue > 0.6, 2, 0))


@pytest.mark.parametrize(
    "training",
    [{"crop_scale": 0.4, "flip": True}, {"crop_scale": 1.0, "crop_padding": 5, "flip": True}, None],
    ids=["crops", "shifts", "plain"],
)
def test_picture_and_mask_stay_aligned(training: dict[str, object] | None, tmp_path: Path) -> None:
    """Whatever is drawn, and whatever EXIF says, colours tell the classes; only edges are between two."""
    read = samples(paint(tmp_path, 16), 48, **(training or {}))
    draw = np.random.default_rng(1) if training else None
    inputs, targets = read.read(np.arange(16), draw)
    pictures, masks = inputs["input"], targets["mask"]
    assert pictures.dtype == np.float32
    assert masks.dtype == np.uint8
    judged = masks != 255
    for picture, mask, used in zip(told_by_colour(pictures), masks, judged, strict=True):
        assert (picture == mask)[used].mean() > 0.93
    if training:
        again = read.read(np.arange(16), np.random.default_rng(1))
        assert np.array_equal(again[1]["mask"], masks)
        other = read.read(np.arange(16), np.random.default_rng(2))
        assert not np.array_equal(other[1]["mask"], masks)


def break_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def save(path: Path, mode: str, size: tuple[int, int] = (8, 8), value: int = 0) -> None:
    Image.new(mode, size, value).save(path)


BROKEN = {
    "no mask": (lambda root: (root / "masks/003.png").unlink(), "images/003.png has no mask"),
    "another size": (lambda root: save(root / "masks/002.png", "L"), "its mask .*masks/002.png 8 × 8"),
    "turned": (lambda root: turn(root / "masks/001.png"), "turned as its EXIF says, its mask"),
    "broken mask": (lambda root: break_off(root / "masks/002.png"), "masks/002.png cannot be decoded"),
    "broken picture": (lambda root: break_off(root / "images/002.png"), "images/002.png cannot be decoded"),
    "colours": (lambda root: save(root / "masks/002.png", "RGB"), "002.png is a picture of mode RGB, not a mask"),
    "16 bits": (lambda root: save(root / "masks/002.png", "I;16"), "002.png is a picture of mode I;16, not a mask"),
    "two pictures": (lambda root: save(root / "images/002.jpg", "RGB"), "have one name"),
    "unnamed class": (
        lambda root: (root / "classes.txt").write_text("ground\ndisc\n"),
        "has class 2, but classes.txt names classes 0 to 1",
    ),
}


def turn(path: Path) -> None:
    mask = np.zeros((60, 61), np.uint8)
    Image.fromarray(mask).save(path)


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_used_is_named(kind: str, tmp_path: Path) -> None:
    harm, message = BROKEN[kind]
    harm(paint(tmp_path, 8))
    with pytest.raises(ContentError, match=message) as caught:
        PairFolder(tmp_path).parts  # noqa: B018
    assert "--skip-broken" in caught.value.todo


@pytest.mark.parametrize("kind", ["no mask", "another size", "broken mask", "broken picture", "colours"])
def test_it_is_left_out_where_that_is_asked_for(kind: str, tmp_path: Path) -> None:
    BROKEN[kind][0](paint(tmp_path, 12))
    folder = PairFolder(tmp_path, skip_broken=True)
    assert sum(map(len, folder.parts.values())) == 11
    assert any("a pair is left out: " in note for note in folder.notes)


def test_a_jpeg_is_no_mask(tmp_path: Path) -> None:
    save(tmp_path / "mask.jpg", "L")
    with pytest.raises(ContentError, match="is a JPEG, not a mask"):
        decode_indices(tmp_path / "mask.jpg")


def test_255_for_the_only_object_is_explained(tmp_path: Path) -> None:
    paint(tmp_path, 6)
    for path in (tmp_path / "masks").glob("0*.png"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(ContentError, match="have class 0 alone") as caught:
        PairFolder(tmp_path).classes  # noqa: B018
    assert "what is 255 in a mask of two values is 1 then" in caught.value.todo


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        ([], UsageError, "there is no folder"),
        (["somewhere"], ContentError, "there is no folder .*train/images"),
        (["images"], ContentError, "there is no folder .*masks"),
        (["images", "masks"], ContentError, "has 0 pictures with a mask for train, 2 are needed"),
    ],
)
def test_a_folder_of_something_else(make: list[str], error: type[Exception], message: str, tmp_path: Path) -> None:
    for name in make:
        (tmp_path / "data" / name).mkdir(parents=True)
    with pytest.raises(error, match=message):
        PairFolder(tmp_path / "data").parts  # noqa: B018


@pytest.mark.parametrize(("names", "message"), [("a\n\nb\n", "line 2 is empty"), ("a\n", "1 names")])
def test_bad_class_names(names: str, message: str, tmp_path: Path) -> None:
    paint(tmp_path, 6)
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(ContentError, match=message):
        PairFolder(tmp_path).classes  # noqa: B018


@pytest.mark.parametrize(("bits", "stored"), [(1, [[0, 1], [1, 0]]), (2, [[0, 3], [2, 1]]), (4, [[0, 15], [7, 1]])])
def test_grey_of_few_bits_is_not_widened(bits: int, stored: list[list[int]], tmp_path: Path) -> None:
    """Pillow scales such grey to 0 … 255, which is right for pictures and wrong for indices."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(bytes([0, (left << (8 - bits)) | (right << (8 - 2 * bits))]) for left, right in stored)
    header = struct.pack(">IIBBBBB", 2, 2, bits, 0, 0, 0, 0)
    path = tmp_path / "mask.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert decode_indices(path).tolist() == stored
