"""Golden samples: inputs, and the outputs that every engine of a network has to give for them.

The outputs are those of the FP32 graph in ONNX Runtime on one CPU thread. How far an engine may be off depends on its
precision alone, and is fixed: docs/bundle.md says where the figures come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from polar_deploy.data import normalise
from polar_deploy.documents.verified import GoldenCheck

if TYPE_CHECKING:
    from polar_deploy.config import Normalize
    from polar_deploy.tensors import Arrays

Array = npt.NDArray[Any]

TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.25}
_COARSE = 8  # pixels of noise that are blown up to a picture


def difference(reference: Arrays, given: Arrays) -> float | None:
    """How far the worst output is off.

    Of floats: the RMS of the difference, as a share of the reference's RMS; of all else, the share that is not equal.
    None where a number is NaN or Inf, or the shapes differ.
    """
    worst = 0.0
    for name, wanted in reference.items():
        found = given.get(name)
        if found is None or found.shape != wanted.shape or not np.isfinite(found).all():
            return None
        if wanted.dtype.kind != "f":
            off, scale = float((found != wanted).mean()), 1.0
        else:
            wide, exact = found.astype(np.float64), wanted.astype(np.float64)
            off, scale = (float(np.sqrt(np.square(values).mean())) for values in (wide - exact, exact))
        worst = max(worst, off / scale if scale else off)
    return worst


def random_pictures(samples: int, shape: Sequence[int], normalize: Normalize) -> Array:
    """Normalised random pictures float32 [N,3,H,W] that hold nobody's data, the same ones each time.

    Coarse noise that is blown up, since the pictures that networks know are smooth: on noise of single pixels they
    answer with values that no picture gives, and INT8 ranges were never measured there.
    """
    _, height, width = shape
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (samples, _COARSE, _COARSE, 3), np.uint8)
    sizes = (width, height)
    pictures = [np.asarray(Image.fromarray(each).resize(sizes, Image.Resampling.BILINEAR)) for each in coarse]
    return normalise(np.stack(pictures), normalize.mean, normalize.std)


def random_inputs(samples: int, seen: Arrays) -> dict[str, Array]:
    """Random samples that hold nobody's data, the same ones each time.

    Floats are normal, with the mean and spread of the samples that were `seen`; all else is drawn from the range of
    these, evenly.
    """
    draw, made = np.random.default_rng(0), {}
    for name, values in seen.items():
        shape = (samples, *values.shape[1:])
        if values.dtype.kind == "f":
            made[name] = draw.normal(values.mean(), values.std(), shape).astype(values.dtype)
        else:
            made[name] = draw.integers(int(values.min()), int(values.max()) + 1, shape).astype(values.dtype)
    return made


def check(reference: Arrays, given: Arrays, precision: str, *, tf32: bool = False) -> GoldenCheck:
    """Whether outputs are within the tolerance of a precision. TF32 rounds to as many bits as FP16 does."""
    found, tolerance = difference(reference, given), TOLERANCE["fp16" if tf32 and precision == "fp32" else precision]
    wanted = next(iter(reference.values()))
    agreed = None
    if found is not None and len(reference) == 1 and wanted.ndim == 2:
        agreed = float((wanted.argmax(axis=1) == next(iter(given.values())).argmax(axis=1)).mean())
    within = found is not None and found <= tolerance
    return GoldenCheck(difference=found, tolerance=tolerance, agreement=agreed, **{"pass": within})  # a word of Python
