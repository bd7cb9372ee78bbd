"""Classify pictures with the compressed network of a bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy.bundle import device
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
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures")
    device.add_engine_arguments(parser)
    parser.add_argument("--fp32", action="store_true", help="run the FP32 graph in ONNX Runtime instead of the engine")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="labels for each picture (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the likeliest labels of each picture."""
    from polar_deploy import engines
    from polar_deploy.bundle.read import opened

    if arguments.top < 1:
        raise UsageError(f"--top {arguments.top} is below 1", "ask for one label or more")
    if missing := next((path for path in arguments.images if not path.is_file()), None):
        raise UsageError(f"there is no picture {missing}", "correct the path")
    with opened(arguments.bundle) as bundle:
        options = device.read_options(arguments, bundle)
        if arguments.fp32:
            graph = engines.reference_engine(bundle.path(bundle.manifest.networks.compressed.fp32))
            found = classify(bundle, graph, arguments.images, arguments.top)
        else:
            with device.open_engines(bundle, options) as here:
                if not here.engines:
                    raise MachineError(here.origin, "--fp32 runs the FP32 graph in ONNX Runtime instead")
                found = classify(bundle, here.engines["compressed"], arguments.images, arguments.top)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    for each in found:
        print(each["image"])
        for guess in each["top"]:
            print(f"  {100 * guess['probability']:6.2f} %  {guess['label']}")
    return 0


def classify(bundle: Bundle, engine: Engine, images: Sequence[Path], top: int) -> list[dict[str, Any]]:
    """[{"image", "top": [{"label", "class", "probability"}, …]}, …], the `top` likeliest labels of each picture."""
    import numpy as np

    from polar_deploy.data import LazyImages, normalise
    from polar_deploy.engines import infer_all

    made, paths = bundle.manifest.preprocessing, [str(path) for path in images]
    pictures = LazyImages(Path(), np.array(paths, dtype=object), made.shorter_side, made.crop)
    found = []
    for start in range(0, len(paths), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(paths)))
        probabilities = softmax(infer_all(engine, normalise(pictures[rows], made.mean, made.std)))
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
