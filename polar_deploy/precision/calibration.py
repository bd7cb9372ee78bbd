"""The range that INT8 covers of each tensor, read off what the tensor holds while calibration samples pass.

ONNX Runtime has calibrators, too. They keep all tensors of all samples, print, and need minutes; and their entropy
method in its default setting tries one threshold only, the largest value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from polar_deploy import onnx_files
from polar_deploy.errors import ContentError
from polar_deploy.ort_session import open_session, session_options, translated
from polar_deploy.precision.qdq import Range
from polar_deploy.tensors import Arrays, count, finite, take

if TYPE_CHECKING:
    import onnxruntime

    from polar_deploy.config import Calibration

Array = npt.NDArray[Any]
BINS = 2048  # of a histogram
LEVELS = 128  # magnitudes that INT8 has
_BYTES = 1 << 28  # of intermediate tensors held at once


def require_samples(inputs: Arrays | None, model: onnx.ModelProto, path: Path) -> dict[str, Array]:
    """The network's inputs among `inputs`, or ContentError: none, of another shape or type, or not finite."""
    again = "calibrate with the data and the input size that the network was exported for"
    if inputs is None or not inputs or count(inputs) == 0:
        raise ContentError(
            f"{path}: INT8 needs training samples to calibrate on, and there are none",
            "give data with a training set, or set build.calibration.images to 1 or more",
        )
    chosen = {}
    for value in model.graph.input:
        sizes, values = _sizes(value, path), inputs.get(value.name)
        if values is None:
            raise ContentError(f"{path} takes {value.name}, the samples have {', '.join(inputs)}", again)
        known = values.ndim == len(sizes) + 1 and all(
            not isinstance(size, int) or size == found for size, found in zip(sizes, values.shape[1:], strict=True)
        )
        if not known:
            expected, found = (" x ".join(map(str, each)) for each in (("N", *sizes), values.shape))
            raise ContentError(
                f"{path}: {value.name} is {found} in the samples, but the network takes {expected}", again
            )
        chosen[value.name] = values
    if bad := int((~finite(chosen)).sum()):
        raise ContentError(
            f"{path}: {bad} of {count(chosen)} calibration samples hold NaN or infinite values",
            "check the data and the normalisation (a std of 0?)",
        )
    return chosen


def ranges(
    model: onnx.ModelProto,
    tensors: list[str],
    inputs: Arrays,
    settings: Calibration,
    path: Path,
    required: Collection[str] = (),
) -> dict[str, Range]:
    """The range of each tensor over all samples, by the method that `settings` names; of one without values 0 to 0.

    A tensor that is NaN or infinite for some sample, such as an attention's mask, has none.

    minmax: from the smallest to the largest value. percentile: what encloses that share of the values, with equal
    shares left out below and above. entropy: the threshold at which 128 levels lose least of the distribution of
    magnitudes (Kullback-Leibler divergence; Migacz, 8-bit inference with TensorRT, GTC 2017).

    Raises:
        ContentError: one of the tensors `required` has none.
    """
    extremes: dict[str, Range] = {}
    endless: set[str] = set()
    for name, values in _Run(model, tensors, path).over(inputs):
        low, high = (float(values.min()), float(values.max())) if values.size else extremes.get(name, (0.0, 0.0))
        if not np.isfinite([low, high]).all():
            if name in required:
                raise _not_finite(model, name, path)
            endless.add(name)
        before = extremes.get(name, (low, high))
        extremes[name] = (min(low, before[0]), max(high, before[1]))
    tensors = [name for name in tensors if name not in endless]
    extremes = {name: extremes[name] for name in tensors}
    run = _Run(model, tensors, path)
    if settings.method == "minmax":
        return extremes
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    if settings.method == "entropy":
        tops = {name: max(-low, high) for name, (low, high) in extremes.items()}
        for name, values in run.over(inputs):
            counts[name] += histogram(np.abs(values), 0.0, tops[name])
        limits = {name: tops[name] * threshold(counts[name]) / BINS for name in tensors}
        return {name: (max(low, -limits[name]), min(high, limits[name])) for name, (low, high) in extremes.items()}
    for name, values in run.over(inputs):
        counts[name] += histogram(values, *extremes[name])
    return {name: percentile(counts[name], extremes[name], settings.percentile) for name in tensors}


def histogram(values: Array, low: float, high: float) -> npt.NDArray[np.int64]:
    """Count the values in BINS equal bins from `low` to `high`. Several times as fast as numpy's own."""
    width = (high - low) / BINS
    if width <= 0:
        return np.bincount([0], [values.size], BINS).astype(np.int64)
    index = ((values.ravel() - np.float32(low)) * np.float32(1 / width)).astype(np.int32)
    return np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)


def percentile(counts: npt.NDArray[np.int64], extremes: Range, share: float) -> Range:
    """The range that encloses `share` percent of the values, in whole bins."""
    low, high = extremes
    below = np.cumsum(counts)
    outside = (100 - share) / 200 * below[-1]
    first = int(np.searchsorted(below, outside, side="right"))
    last = int(np.searchsorted(below, below[-1] - outside, side="left"))
    width = (high - low) / BINS
    return low + first * width, min(high, low + (last + 1) * width)


def threshold(counts: npt.NDArray[np.int64]) -> int:
    """How many bins of a histogram of magnitudes INT8 should cover, LEVELS to BINS: the least divergence."""
    counts = counts.copy()
    counts[0] = counts[1]  # zeros, half of what a Relu gives, are exact with any threshold
    candidates = range(LEVELS, BINS + 1, 8)
    return min(candidates, key=lambda bins: _divergence(counts, bins))


def _divergence(counts: npt.NDArray[np.int64], bins: int) -> float:
    """Of the first `bins` bins, clipped values in the last, from the same spread evenly over LEVELS levels."""
    inside = counts[:bins].astype(np.float64)
    clipped = inside.copy()
    clipped[-1] += counts[bins:].sum()
    level = np.arange(bins) * LEVELS // bins
    filled = inside > 0
    sums = np.bincount(level, inside, LEVELS)
    spread = np.bincount(level, filled, LEVELS)
    coarse = np.where(filled, (sums / np.maximum(spread, 1))[level], 0)
    # A bin that only clipped values fill would make the divergence infinite: a tiny share, as is usual, for every one.
    p, q = (each / each.sum() + 1e-9 for each in (clipped, coarse)) if inside.any() else (np.ones(1), np.ones(1))
    return float((p * np.log(p / q)).sum())


class _Run:
    """Runs a network with chosen tensors as its outputs, as many samples at once as fit into `_BYTES`."""

    def __init__(self, model: onnx.ModelProto, tensors: list[str], path: Path) -> None:
        opened = onnx.ModelProto()
        opened.CopyFrom(model)
        del opened.graph.output[:]
        made = {name for node in model.graph.node for name in node.output}
        self.inner = [name for name in tensors if name in made]
        opened.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in self.inner)
        self.tensors = tensors
        self.session = Session(opened, path)

    def over(self, inputs: Arrays) -> Iterator[tuple[str, Array]]:
        """Name and values of each tensor, batch after batch."""
        start, size = 0, 1
        while start < count(inputs):
            batch = take(inputs, slice(start, start + size))
            computed = self.session.run(self.inner, batch) if self.inner else []  # without names it is an error
            found = dict(zip(self.inner, computed, strict=True)) | batch
            yield from ((name, found[name]) for name in self.tensors)
            start += size
            size = max(1, _BYTES // (sum(values.nbytes for values in found.values()) // count(batch)))


def outputs(
    model: onnx.ModelProto, inputs: Arrays, path: Path, *, fused: bool = False
) -> dict[str, npt.NDArray[np.float64]]:
    """What a network gives for inputs [N, …], by output.

    Args:
        model: the network.
        inputs: the batch, by name.
        path: the network's file, for messages.
        fused: as ONNX Runtime makes it fast, with integer kernels; else node by node, as it is written.
    """
    options = session_options(level="all" if fused else "none")
    names = [value.name for value in model.graph.output]
    found = Session(model, path, options, fused=fused).run(names, dict(inputs))
    return {name: np.asarray(values, np.float64) for name, values in zip(names, found, strict=True)}


class Session:
    """A network in ONNX Runtime on the CPU; ContentError if it cannot run the network.

    Args:
        model: the network.
        path: its file, for messages.
        options: of ONNX Runtime.
        fused: whether Q/DQ pairs become integer kernels, which differ between CPUs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        options: onnxruntime.SessionOptions | None = None,
        *,
        fused: bool = False,
    ) -> None:
        self.path = path
        options = options or session_options()
        options.add_session_config_entry("session.disable_quant_qdq", str(int(not fused)))
        with self._translated():
            self._session = open_session(model, options)

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        """The outputs of these names."""
        with self._translated():
            found: list[Array] = self._session.run(names, feeds)
        return found

    def _translated(self) -> AbstractContextManager[None]:
        return translated(
            f"{self.path}: ONNX Runtime, which holds new types against FP32, cannot run it",
            "export the network with a dynamic batch and operators that ONNX Runtime has, or choose a float target",
        )


def _sizes(value: onnx.ValueInfoProto, path: Path) -> tuple[int | str, ...]:
    """Sizes of one sample of an input; a name where any size will do."""
    dims = value.type.tensor_type.shape.dim
    if dims and dims[0].dim_value:
        raise ContentError(
            f"{path}: the network takes batches of {dims[0].dim_value} only, and INT8 is calibrated on any number",
            "export it with a dynamic batch, which engines need as well",
        )
    return tuple(dim.dim_value or dim.dim_param or "any" for dim in dims)[1:]


def _not_finite(model: onnx.ModelProto, tensor: str, path: Path) -> ContentError:
    maker = next((node for node in model.graph.node if tensor in node.output), None)
    place = onnx_files.described(maker) if maker is not None else "the network's input"
    return ContentError(
        f"{path}: tensor {tensor!r} of {place} is NaN or infinite for a calibration image",
        "check the network's weights: it cannot work in FP32 either",
    )
