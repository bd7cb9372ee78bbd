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

if TYPE_CHECKING:
    from polar_deploy.config import Triple

Array = npt.NDArray[np.float32]

TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.25}
_COARSE = 8  # pixels of noise that are blown up to a picture


def difference(reference: Array, given: Array) -> float | None:
    """RMS difference of logits [N,classes] from the reference, as a share of the reference's RMS.

    None where a logit is NaN or Inf, or the shapes differ.
    """
    if given.shape != reference.shape or not np.isfinite(given).all():
        return None
    wanted, found = reference.astype(np.float64), given.astype(np.float64)
    off, scale = (float(np.sqrt(np.square(values).mean())) for values in (found - wanted, wanted))
    return off / scale if scale else off


def random_inputs(samples: int, shape: Sequence[int], mean: Triple, std: Triple) -> Array:
    """Normalised random pictures float32 [N,3,H,W] that hold nobody's data, the same ones each time.

    Coarse noise that is blown up, since the pictures that networks know are smooth: on noise of single pixels they
    answer with values that no picture gives, and INT8 ranges were never measured there.
    """
    _, height, width = shape
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (samples, _COARSE, _COARSE, 3), np.uint8)
    sizes = (width, height)
    pictures = [np.asarray(Image.fromarray(each).resize(sizes, Image.Resampling.BILINEAR)) for each in coarse]
    return normalise(np.stack(pictures), mean, std)


def check(reference: Array, given: Array, precision: str, *, tf32: bool = False) -> dict[str, Any]:
    """Whether logits are within the tolerance of a precision: {"difference", "tolerance", "agreement", "pass"}.

    TF32 rounds to as many bits as FP16 does.
    """
    found, tolerance = difference(reference, given), TOLERANCE["fp16" if tf32 and precision == "fp32" else precision]
    agreed = None if found is None else float((reference.argmax(axis=1) == given.argmax(axis=1)).mean())
    return {
        "difference": found,
        "tolerance": tolerance,
        "agreement": agreed,
        "pass": found is not None and found <= tolerance,
    }
