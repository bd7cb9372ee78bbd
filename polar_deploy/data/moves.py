"""How training moves pictures together with what belongs to their pixels: crops, shifts and mirrors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from polar_deploy.config import Normalize, Training
from polar_deploy.data.crops import DRAWS, crop_box
from polar_deploy.data.dataset import Indices, Pixels
from polar_deploy.data.pictures import PictureCache
from polar_deploy.data.threads import parallel
from polar_deploy.limits import available_memory

_KEPT = 0.125  # of the available memory: what pictures may take that are kept, for training and for evaluation each
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


class Source(Protocol):
    """Pictures that are decoded when they are asked for, each uint8 [H, W, C]."""

    @property
    def size(self) -> int:
        """Pixels a side of what training sees."""
        ...

    def plain(self, index: Indices) -> list[Pixels]:
        """The chosen ones, [size, size, C]."""
        ...

    def whole(self, index: Indices) -> list[Pixels]:
        """The chosen ones, from which crops are cut."""
        ...


class Moved(NamedTuple):
    """A picture uint8 [size, size, C], and where its pixels come from.

    Attributes:
        part: left, top, right, bottom of what is seen of the whole picture, as shares of its width and height; parts
            outside of 0 to 1 hold no picture.
        mirrored: whether left and right have changed places after that.
    """

    pixels: Pixels
    part: tuple[float, float, float, float]
    mirrored: bool


class Mover:
    """Pictures as evaluation and as training see them; what fits into memory is decoded once.

    Args:
        source: decodes them.
        training: how they are moved: `flip`, `crop_scale`, and without such crops `crop_padding`.
        stretch: makes [size, size, C] of a box of a picture.
        normal: its mean is the colour of what is shifted in.
        beyond: what that has behind its colour, where pictures have more than three channels.
    """

    def __init__(
        self,
        source: Source,
        training: Training,
        stretch: Callable[[Pixels, int, Box], Pixels],
        normal: Normalize,
        beyond: tuple[int, ...] = (),
    ) -> None:
        self._source, self._training, self._stretch = source, training, stretch
        self._outside = [*(round(255 * mean) for mean in normal.mean), *beyond]

    @cached_property
    def plain(self) -> Callable[[Indices], list[Pixels]]:
        """The pictures of some indices, as evaluation sees them."""
        return PictureCache(self._source.plain, int(_KEPT * available_memory()))

    @cached_property
    def _whole(self) -> Callable[[Indices], list[Pixels]]:
        return PictureCache(self._source.whole, int(_KEPT * available_memory()))

    def moved(self, rows: Indices, draw: np.random.Generator) -> list[Moved]:
        """Pictures for a training batch, all random numbers drawn first."""
        size, training = self._source.size, self._training
        least, padding = training.crop_scale or 1.0, training.crop_padding or 0
        crops = draw.random((len(rows), DRAWS), np.float32)
        shifts = draw.integers(-padding, padding + 1, (len(rows), 2)).tolist()
        mirrors = (draw.random(len(rows)) < (0.5 if training.flip else 0)).tolist()
        if least < 1:
            boxes = [
                (whole, crop_box(whole.shape[1], whole.shape[0], least, crop))
                for whole, crop in zip(self._whole(rows), crops, strict=True)
            ]
            moved = parallel(lambda each: (self._stretch(each[0], size, each[1]), _shares(*each)), boxes)
        else:
            moved = [
                (
                    self._shifted(plain, *shift),
                    (-shift[1] / size, -shift[0] / size, 1 - shift[1] / size, 1 - shift[0] / size),
                )
                for plain, shift in zip(self.plain(rows), shifts, strict=True)
            ]
        return [
            Moved(pixels[:, ::-1] if mirrored else pixels, part, mirrored)
            for (pixels, part), mirrored in zip(moved, mirrors, strict=True)
        ]

    def _shifted(self, pixels: Pixels, down: int, right: int) -> Pixels:
        """Moved by some pixels."""
        result = np.empty_like(pixels)
        result[:] = self._outside
        height, width = pixels.shape[:2]
        result[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = pixels[
            max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
        ]
        return result


def _shares(whole: Pixels, box: Box) -> tuple[float, float, float, float]:
    height, width = whole.shape[:2]
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def stretched(picture: Pixels, size: int, box: Box | None = None) -> Pixels:
    """A picture uint8 [H, W, 3], or a box of it, as [size, size, 3] through an antialiased bilinear filter."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
