"""Run the compressed network of a bundle: classify pictures, or compute outputs of any inputs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy.bundle import device
from polar_deploy.bundle.manifest import CLASSIFICATION
from polar_deploy.errors import MachineError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from polar_deploy.bundle.read import Bundle
    from polar_deploy.engines import Engine

_AT_ONCE = 64  # pictures that are decoded before they are classified


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bundle run`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder, or the .zip")
    parser.add_argument(
        "samples", nargs="+", type=Path, metavar="FILE", help="pictures; for other tasks one .npz of arrays by input"
    )
    device.add_engine_arguments(parser)
    parser.add_argument("--fp32", action="store_true", help="run the FP32 graph in ONNX Runtime instead of the engine")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="labels for each picture (default: 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write outputs of other tasks there, as .npz")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the likeliest labels of each picture, or the outputs of a task that is no classification."""
    from polar_deploy.bundle.read import opened

    if arguments.top < 1:
        raise UsageError(f"--top {arguments.top} is below 1", "ask for one label or more")
    if missing := next((path for path in arguments.samples if not path.is_file()), None):
        raise UsageError(f"there is no file {missing}", "correct the path")
    with opened(arguments.bundle) as bundle:
        if bundle.manifest.task.name != CLASSIFICATION:
            return _compute(bundle, arguments)
        with _engine(bundle, arguments) as engine:
            found = classify(bundle, engine, arguments.samples, arguments.top)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for each in found:
        print(each["image"])
        for guess in each["top"]:
            print(f"  {100 * guess['probability']:6.2f} %  {guess['label']}")
    return 0


@contextmanager
def _engine(bundle: Bundle, arguments: argparse.Namespace) -> Iterator[Engine]:
    """The compressed network's engine on this device, or its FP32 graph where that is asked for."""
    from polar_deploy import engines

    options = device.read_options(arguments, bundle)
    if arguments.fp32:
        yield engines.reference_engine(bundle.path(bundle.manifest.networks.compressed.fp32))
        return
    with device.open_engines(bundle, options) as here:
        if not here.engines:
            raise MachineError(here.origin, "--fp32 runs the FP32 graph in ONNX Runtime instead")
        yield here.engines["compressed"]


def _compute(bundle: Bundle, arguments: argparse.Namespace) -> int:
    """Outputs of a task of its own, for inputs that are prepared already."""
    import numpy as np

    from polar_deploy.data.arrays import read_npz
    from polar_deploy.engines import infer_all
    from polar_deploy.workspace import atomic_path

    names = [each.name for each in bundle.manifest.inputs]
    if len(arguments.samples) > 1 or arguments.samples[0].suffix != ".npz":
        problem = f"the task is {bundle.manifest.task.name}, whose inputs are no pictures"
        raise UsageError(problem, f"give one .npz with the arrays {', '.join(names)}, a row for each sample")
    with _engine(bundle, arguments) as engine:
        found = infer_all(engine, read_npz(arguments.samples[0], *names))
    if arguments.output is not None:
        with atomic_path(arguments.output) as temporary, temporary.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
    if arguments.json:
        print(json.dumps({name: values.tolist() for name, values in found.items()}))
        return 0
    for name, values in found.items():
        spread = f", {values.min():.4g} to {values.max():.4g}" if values.size else ""
        print(f"{name}  {values.dtype} {list(values.shape)}{spread}")
    return 0


def classify(bundle: Bundle, engine: Engine, images: Sequence[Path], top: int) -> list[dict[str, Any]]:
    """[{"image", "top": [{"label", "class", "probability"}, …]}, …], the `top` likeliest labels of each picture."""
    import numpy as np

    from polar_deploy.data import LazyImages, normalise
    from polar_deploy.engines import infer_all

    manifest, paths = bundle.manifest, [str(path) for path in images]
    made = manifest.preprocessing
    assert made is not None  # as its task says
    pictures = LazyImages(Path(), np.array(paths, dtype=object), made.shorter_side, made.crop)
    found = []
    for start in range(0, len(paths), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(paths)))
        inputs = {manifest.inputs[0].name: normalise(pictures[rows], made.mean, made.std)}
        probabilities = softmax(infer_all(engine, inputs)[manifest.outputs[0].name])
        for row, each in zip(rows, probabilities, strict=True):
            best = np.argsort(-each, kind="stable")[:top]
            guesses = [{"label": bundle.labels[k], "class": int(k), "probability": float(each[k])} for k in best]
            found.append({"image": paths[row], "top": guesses})
    return found


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Probabilities [N,classes] of logits [N,classes]."""
    import numpy as np

    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
