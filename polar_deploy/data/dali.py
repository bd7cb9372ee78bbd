"""JPEGs that NVIDIA DALI decodes and resizes, on the GPU that trains, for random resized crops.

Pixels differ from Pillow's by a step or two, so that pictures which accuracy is judged by are never read this way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_deploy.data.decode import plain_jpeg_size
from polar_deploy.data.pictures import LazyImages, resized_size
from polar_deploy.errors import MachineError

if TYPE_CHECKING:
    import torch

    from polar_deploy.config import Decoder
    from polar_deploy.data.dataset import Indices, Pixels

_AT_ONCE = 64  # pictures in a run of DALI's pipeline
_INSTALL = "install NVIDIA DALI (pip install nvidia-dali-cuda130, by CUDA's version), or pass training.decoder=pillow"


def is_wanted(decoder: Decoder, device: torch.device) -> bool:
    """Whether DALI is to read: where it was asked for, else where it is installed beside an NVIDIA GPU.

    Raises:
        MachineError: it was asked for, and is not installed.
    """
    if decoder == "dali" and not _is_installed():
        raise MachineError("training.decoder=dali: NVIDIA DALI is not installed", _INSTALL)
    return decoder == "dali" or (decoder == "auto" and device.type == "cuda" and _is_installed())


def _is_installed() -> bool:
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


class DaliReader:
    """Reads the pictures of a `LazyImages` as its `whole` does; all but plain JPEGs are left to that.

    Args:
        images: which pictures, and of what size.
        device: the GPU that decodes; "cpu": DALI's operators on CPUs, which are no faster than Pillow.
    """

    def __init__(self, images: LazyImages, device: torch.device) -> None:
        self._images, self._device = images, device
        self._pipeline: Any = None

    def __call__(self, index: Indices) -> list[Pixels]:
        """The chosen pictures, each uint8 [H, W, 3]; ContentError names the file that cannot be decoded."""
        rows = np.asarray(index)
        paths = [self._images.root / name for name in self._images.files[rows]]
        sizes = {place: size for place, path in enumerate(paths) if (size := plain_jpeg_size(path))}
        found: dict[int, Pixels] = {}
        jpegs = list(sizes)
        for first in range(0, len(jpegs), _AT_ONCE):
            places = jpegs[first : first + _AT_ONCE]
            pictures = self._decoded([paths[k] for k in places], [sizes[k] for k in places])
            found.update(zip(places, pictures, strict=False))  # of which there may be none
        others = [place for place in range(len(paths)) if place not in found]
        found |= dict(zip(others, self._images.whole(rows[others]), strict=True))
        return [found[place] for place in range(len(paths))]

    def _decoded(self, paths: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> list[Pixels]:
        """All, or none where DALI refuses one of them: Pillow reads them then, or names the one that is broken."""
        if self._pipeline is None:
            self._pipeline = _pipeline(self._device)
        targets = [resized_size(size, min(self._images.detail, *size))[::-1] for size in sizes]
        try:
            self._pipeline.feed_input("files", [np.fromfile(path, np.uint8) for path in paths])
            self._pipeline.feed_input("sizes", [np.array(target, np.float32) for target in targets])
            (batch,) = self._pipeline.run()
        except RuntimeError:  # all that DALI raises; it cannot be run again afterwards
            self._pipeline = None
            return []
        batch = batch.as_cpu()
        return [np.array(batch[k]) for k in range(len(paths))]


def _pipeline(device: torch.device) -> Any:
    from nvidia.dali import Pipeline, fn, types

    on_gpu = device.type == "cuda"
    gpu = (device.index or 0) if on_gpu else None
    pipeline = Pipeline(_AT_ONCE, num_threads=4, device_id=gpu, prefetch_queue_depth=1)
    with pipeline:
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        sizes = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=1)
        pixels = fn.decoders.image(files, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        pipeline.set_outputs(fn.resize(pixels, size=sizes, interp_type=types.INTERP_LINEAR, antialias=True))
    pipeline.build()
    return pipeline
