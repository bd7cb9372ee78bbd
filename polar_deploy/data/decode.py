"""One picture file, decoded as its owner sees it.

That is the first frame, turned as EXIF says, transparent parts on white, 16-bit grey scaled to 8 bit.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from polar_deploy.errors import ContentError, one_line

_BACKGROUND = (255, 255, 255)  # of transparent pictures
_ORIENTATION = 0x0112  # EXIF's tag; what brings each of its values upright:
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)  # values with which width and height change places
_WIDENED = {"L;2": 85, "L;4": 17}  # grey of fewer than 8 bits: what Pillow multiplies it by
# What stands at the end of a whole file. WebP needs none, since opening it fails if it is cut short.
_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND", "WEBP": b""}
_TAIL = 64  # bytes in which the mark is looked for


def decode(path: Path, least: int | None = None) -> Image.Image:
    """The picture in a file, in mode RGB.

    Args:
        path: the file.
        least: pixels that the shorter side has to have. A larger JPEG may then come at a half, a quarter or an eighth
            of its size, which its decoder gives for a fraction of the time.

    Raises:
        ContentError: it cannot be decoded, or its values have no known range.
    """
    with _decoding(path) as stored:
        if least is not None:
            scale = least / min(stored.size)
            stored.draft(None, (math.ceil(stored.width * scale), math.ceil(stored.height * scale)))
        return _upright_rgb(stored)


def upright_size(path: Path) -> tuple[tuple[int, int], bool]:
    """Width and height of what `decode` gives, in pixels, from the header; and whether EXIF turns or mirrors it.

    Raises:
        ContentError: as `decode`.
    """
    with _decoding(path) as stored:
        if stored.format == "TIFF":
            stored.load()  # which turns it
        orientation = _orientation(stored)
        return _turned(stored.size, orientation), orientation in _UPRIGHT


def plain_jpeg_size(path: Path) -> tuple[int, int] | None:
    """Width and height as `upright_size` has them, of a JPEG in grey or RGB; None for any other file."""
    try:
        with _opened(path) as stored:
            is_plain = stored.format == "JPEG" and stored.mode in ("L", "RGB")
            return _turned(stored.size, _orientation(stored)) if is_plain else None
    except Exception:  # noqa: BLE001  # whoever decodes it tells why
        return None


def decode_indices(path: Path) -> npt.NDArray[np.uint8]:
    """The numbers in a picture file with a palette or in grey, as they are stored, [H, W]: a mask of classes.

    Raises:
        ContentError: it cannot be decoded, has colours or more than 8 bits, or is a JPEG, which keeps no exact numbers.
    """
    with _decoding(path) as stored:
        if stored.format in ("JPEG", "MPO") or stored.mode not in ("P", "L", "1"):
            kind = "a JPEG" if stored.format in ("JPEG", "MPO") else f"a picture of mode {stored.mode}"
            problem = f"{path} is {kind}, not a mask: a number of 8 bits or fewer for each pixel, in grey or a palette"
            raise ContentError(problem, "save the classes' indices as PNG, grey or with a palette")
        tiles = getattr(stored, "tile", [])  # how the file has its values; gone once they are read
        widened = next((_WIDENED.get(str(tile[3]), 1) for tile in tiles), 1)
        return np.asarray(stored).astype(np.uint8) // widened


def problem(path: Path, *, thorough: bool = False) -> ContentError | None:
    """Why a file is no sound picture; None: nothing is known against it.

    Args:
        path: the file.
        thorough: whether it is decoded. Else its header and last bytes are looked at; only where these do not tell (a
            file that seems cut short; GIF, TIFF, BMP, PPM), it is decoded after all.
    """
    try:
        with _opened(path) as stored:
            mark = _END_MARKS.get(stored.format or "")
            if thorough:
                _upright_rgb(stored)
            elif mark is None or mark not in _tail(path):
                stored.load()
    except ContentError as error:
        return error
    except Exception as error:  # noqa: BLE001  # each of Pillow's decoders fails in its own way
        return _broken(path, error)
    return None


@contextmanager
def _decoding(path: Path) -> Iterator[Image.Image]:
    """The picture in a file, as `_opened` gives it; inside, every failure becomes a ContentError."""
    try:
        with _opened(path) as stored:
            yield stored
    except ContentError:
        raise
    except Exception as error:  # each of Pillow's decoders fails in its own way
        raise _broken(path, error) from error


def _opened(path: Path) -> Image.Image:
    """The picture in a file, of which only the header is read; ContentError if its values have no known range."""
    image = Image.open(path)
    # Pillow widens 16-bit PNG and PGM to its mode I; in a TIFF that is 32 bits, of which any part may be used.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        image.close()
        kind = "floating-point" if image.mode == "F" else "32-bit"
        problem = f"{path} has {kind} grey values, whose range is not known"
        raise ContentError(problem, "save it with 8 or 16 bits a value")
    return image


def _broken(path: Path, error: Exception) -> ContentError:
    problem = f"{path} cannot be decoded: {type(error).__name__}: {one_line(error)}"
    return ContentError(problem, "replace the file or delete it")


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
        return file.read()


def _upright_rgb(stored: Image.Image) -> Image.Image:
    """A picture in mode RGB, as it is to be seen."""
    stored.load()  # before its orientation is asked for: Pillow turns a TIFF by itself
    turn = _UPRIGHT.get(_orientation(stored))
    image = _rgb(stored)
    return image if turn is None else image.transpose(turn)


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height of a picture of this size once it is upright."""
    return size[::-1] if orientation in _ON_ITS_SIDE else size


def _orientation(image: Image.Image) -> int:
    """EXIF's value, 1 to 8; 1 (upright) where there is none, or where EXIF is damaged, which harms no pixel."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    """In mode RGB: 16-bit grey divided by 257, so that 65535 becomes 255; transparent parts on `_BACKGROUND`."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        narrow = (wide + 128) // 257
        narrow[wide == image.info.get("transparency", -1)] = _BACKGROUND[0]
        return Image.fromarray(narrow.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*_BACKGROUND, 255)), layer).convert("RGB")
