from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polar_deploy import data
from polar_deploy.data import decode
from polar_deploy.data.dataset import Dataset, DataSpec
from polar_deploy.data.sound import sound
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


def read(root: Path) -> Dataset:
    """The data set in a folder, after a look at its files."""
    return sound(data.image_folders(SPEC, root, shorter=16))


def one(path: Path, size: int = 2) -> list[object]:
    """The pixels that are read from a picture of `size` × `size`, as lists [size][size][3]."""
    return data.LazyImages(path.parent, np.array([path.name], dtype=object), size, size)[np.array([0])][0].tolist()


def grey(values: list[list[int]]) -> list[object]:
    return [[[value] * 3 for value in row] for row in values]


def write_png(path: Path, depth: int, kind: int, rows: list[bytes], transparent: bytes = b"") -> Path:
    """A PNG of two columns, written by hand; Pillow does not write all kinds."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, len(rows), depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    between = chunk(b"tRNS", transparent) if transparent else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + between + pixels + chunk(b"IEND", b""))
    return path


WIDE = [[0, 128], [32768, 65535]]  # by 257: 0, 0.498, 127.502, 255
NARROW = [[0, 0], [128, 255]]


@pytest.mark.parametrize(
    ("suffix", "order"), [(".png", "<u2"), (".png", ">u2"), (".tif", "<u2"), (".tif", ">u2"), (".pgm", "<u2")]
)
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str, order: str) -> None:
    Image.fromarray(np.array(WIDE, order)).save(tmp_path / f"x{suffix}")
    assert one(tmp_path / f"x{suffix}") == grey(NARROW)


def test_16_bit_grey_in_wider_modes(tmp_path: Path) -> None:
    """Older versions of Pillow open every 16-bit PNG in mode I."""
    wide = Image.fromarray(np.array(WIDE, np.int32))
    assert np.asarray(decode._rgb(wide)).tolist() == grey(NARROW)


def test_16_bit_colours_and_transparency(tmp_path: Path) -> None:
    pixels = struct.pack(">6H", 0x1234, 0xFFFF, 0, 0x8000, 0x7FFF, 0x0100)
    assert one(write_png(tmp_path / "rgb.png", 16, 2, [pixels, pixels])) == [[[0x12, 255, 0], [128, 127, 1]]] * 2
    rows = [struct.pack(">2H", *row) for row in WIDE]
    assert one(write_png(tmp_path / "grey.png", 16, 0, rows, struct.pack(">H", 128))) == grey([[0, 255], [128, 255]])


def test_grey_values_of_no_known_range_are_named(tmp_path: Path) -> None:
    for dtype, kind in ((np.float32, "floating-point"), (np.int32, "32-bit")):
        root = image_folder(tmp_path / kind)
        Image.fromarray(np.zeros((20, 20), dtype)).save(root / "val" / "n02" / "deep.tif")
        with pytest.raises(ContentError, match=rf"n02/deep\.tif has {kind} grey values, whose range is not known"):
            read(root)
        with pytest.raises(ContentError, match=r"deep\.tif has"):
            one(root / "val" / "n02" / "deep.tif")


UPRIGHT = {
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[3, 1], [4, 2]],
    7: [[4, 2], [3, 1]],
    8: [[2, 4], [1, 3]],
    0: [[1, 2], [3, 4]],  # not in the standard
    9: [[1, 2], [3, 4]],
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_turns_a_picture(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.array([[1, 2], [3, 4]], np.uint8)).convert("RGB")
    image.save(tmp_path / f"x{suffix}", exif=exif, lossless=True)
    assert one(tmp_path / f"x{suffix}") == grey(UPRIGHT[orientation])


def test_exif_turns_before_the_centre_is_cut_out(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.repeat(np.array([[0], [0], [80], [160], [0], [0]], np.uint8), 32, 1).repeat(16, 0)  # 96 high, 32 wide
    Image.fromarray(values).save(tmp_path / "x.jpg", exif=exif, quality=100)
    pixels = np.array(one(tmp_path / "x.jpg", 32))[..., 0]
    np.testing.assert_allclose(pixels, np.repeat([[160] * 16 + [80] * 16], 32, 0), atol=1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_harms_no_pixel(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2), (9, 9, 9))
    for number, exif in enumerate((b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0")):
        image.save(tmp_path / f"{number}.png", exif=exif)
        assert one(tmp_path / f"{number}.png") == grey([[9, 9], [9, 9]])


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    """Opaque, opaque, half, and fully transparent: 255 + (colour − 255) · α / 255."""
    alpha = np.array([[255, 255], [128, 0]], np.uint8)
    colour = np.array([[[10, 20, 30], [40, 50, 60]], [[55, 155, 255], [1, 2, 3]]], np.uint8)
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "rgba.png")
    expected = [[[10, 20, 30], [40, 50, 60]], [[155, 205, 255], [255, 255, 255]]]
    assert one(tmp_path / "rgba.png") == expected
    Image.fromarray(np.dstack([colour[..., 0], alpha])).save(tmp_path / "la.png")
    assert one(tmp_path / "la.png") == grey([[10, 40], [155, 255]])


def test_a_transparent_colour_is_white(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    white = [255, 255, 255]
    for name, transparency in (("one.png", 1), ("one.gif", 1), ("each.png", bytes([255, 0, 255]))):
        palette.save(tmp_path / name, transparency=transparency)
        assert one(tmp_path / name) == [[[10, 20, 30], white], [[70, 80, 90], white]], name
    palette.save(tmp_path / "none.png")
    assert one(tmp_path / "none.png") == [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    write_png(tmp_path / "grey.png", 8, 0, [b"\x07\x08", b"\x09\x07"], b"\0\x08")
    assert one(tmp_path / "grey.png") == grey([[7, 255], [9, 7]])
    write_png(tmp_path / "rgb.png", 8, 2, [bytes([1, 2, 3, 4, 5, 6])] * 2, bytes([0, 4, 0, 5, 0, 6]))
    assert one(tmp_path / "rgb.png") == [[[1, 2, 3], white]] * 2


def test_opaque_pictures_of_other_modes(tmp_path: Path) -> None:
    black, red = [[[0, 0, 0]] * 2] * 2, [[[255, 0, 0]] * 2] * 2
    Image.new("L", (2, 2), 77).save(tmp_path / "l.png")
    assert one(tmp_path / "l.png") == grey([[77, 77]] * 2)
    Image.new("1", (2, 2), 0).save(tmp_path / "1.png")
    assert one(tmp_path / "1.png") == black
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert one(tmp_path / "cmyk.tif") == red
    Image.new("RGBA", (2, 2), (255, 0, 0, 255)).save(tmp_path / "opaque.png")
    assert one(tmp_path / "opaque.png") == red


@pytest.mark.parametrize("suffix", [".png", ".gif", ".webp", ".tif"])
def test_the_first_frame_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert one(tmp_path / f"x{suffix}") == [[[255, 0, 0]] * 2] * 2


def test_stray_files_and_folders_are_no_pictures_and_no_classes(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    for split in (root / "train", root / "val"):
        for folder in (".ipynb_checkpoints", "__MACOSX", ".Trash", "@eaDir"):
            (split / folder).mkdir()
            (split / folder / "._x.png").write_bytes(b"no picture")
        for name in ("._0.png", ".hidden.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (split / name).write_bytes(b"no picture")
            (split / "n02" / name).write_bytes(b"no picture")
        (split / "n02" / ".ipynb_checkpoints").mkdir()
        (split / "n02" / "folder.png").mkdir()
    dataset = data.image_folders(SPEC, root, shorter=16)
    assert dataset.class_names == ("n01", "n02", "n03")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_is_named(tmp_path: Path, split: str) -> None:
    root = image_folder(tmp_path)
    for file in (root / split / "n02").iterdir():
        file.rename(file.with_name(f"._{file.name}"))
    with pytest.raises(ContentError, match=rf"{split}/n02 holds no pictures\n") as error:
        data.image_folders(SPEC, root, shorter=16)
    assert "\n" not in error.value.what


def encoded(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


KINDS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "PPM": ".ppm"}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("share", [0, 0.01, 0.2, 0.6, 0.95])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_cut_short_is_named_before_training(tmp_path: Path, kind: str, share: float, split: str) -> None:
    root, content = image_folder(tmp_path), encoded(kind)
    (root / split / "n02" / f"1{KINDS[kind]}").write_bytes(content)
    read(root)
    (root / split / "n02" / f"1{KINDS[kind]}").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ContentError, match=rf"{split}/n02/1\{KINDS[kind]} cannot be decoded: ") as error:
        read(root)
    assert "\n" not in error.value.what
    assert error.value.todo == "replace the file or delete it, or leave such files out with --skip-broken"


def test_all_broken_pictures_are_counted(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "train" / "n01" / "5.jpg").write_text("<html>404</html>")
    (root / "train" / "n03" / "6.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(
        ContentError, match=r"n01/5\.jpg cannot be decoded: .* \(2 files in all are no sound pictures\)"
    ):
        read(root)


def test_what_follows_a_whole_picture_does_no_harm(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    for kind, suffix in KINDS.items():
        (root / "train" / "n01" / f"more{suffix}").write_bytes(encoded(kind) + b"\0" * 5000)
    assert len(read(root).train.labels) == 6 + len(KINDS)


def test_a_picture_that_breaks_later_is_named(tmp_path: Path) -> None:
    """The ends are there; what lies between is found to be damaged when it is decoded."""
    root = image_folder(tmp_path)
    broken = root / "train" / "n02" / "1.png"
    content = bytearray(encoded("PNG"))
    content[200:300] = bytes(100)
    broken.write_bytes(content)
    dataset = read(root)
    with pytest.raises(ContentError, match=r"n02/1\.png cannot be decoded"):
        dataset.train.images[np.arange(6)]
    picture(root / "train" / "n02" / "2.png", COLOURS["n02"])
    left = sound(data.image_folders(SPEC, root, shorter=16), skip_broken=True)  # decodes all at once
    assert len(left.train.images[np.arange(6)]) == 6
    assert "n02/1.png cannot be decoded" in left.notes[0]


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
