"""Real TensorRT on a GPU: engines of full and compressed networks are proven, right, and timed against each other.

    python -m benchmarks.gpu_engines [--graphs FOLDER] [--targets trt-fp16]

ResNet-56 with the public CIFAR-10 weights, and torchvision's ResNet-18 with random ones at 224 pixels, each whole and
with half of its blocks' inner channels cut away, in trt-fp32, -fp16 and -int8. Answers of ResNet-56 are held against
those of its FP32 graph on 2,000 test images, logits of ResNet-18 on noise. Each pair is timed at batch 1 and 64, and
each full engine against its own copy, which must not differ. Eight minutes at most on a large GPU.

Without a GPU or TensorRT it ends with exit code 3. `--graphs` keeps networks and images, so that PyTorch and ../shared
are needed only where these are made; `--targets ort-fp32 ort-int8` tries the script on a CPU, and writes no result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.common import cifar_network, write_result
from polar_deploy import data, engines, surgery, targets
from polar_deploy.config import Build
from polar_deploy.engines import Array, Engine, nvml, timing
from polar_deploy.errors import MachineError
from polar_deploy.parity import Comparison
from polar_deploy.tasks.accuracy import Accuracy
from polar_deploy.tensors import Arrays
from polar_deploy.workspace import read_json

NETWORKS = {"resnet56": 32, "resnet18": 224}  # pixels a side
TRAINED = "resnet56"
TARGETS = ("trt-fp32", "trt-fp16", "trt-int8")
BATCHES = (1, 64)
OPTIONS = Build(batches=(BATCHES[0], BATCHES[-1], BATCHES[-1]))
IMAGES = {"test": 2_000, "calibration": OPTIONS.calibration.images}
NOISE = {"test": 64, "calibration": 64}
AGREEMENT = {"fp16": 99.5, "int8": 97.5}  # percent of the answers of the trained network
DROP = {"int8": 0.5}  # points
SECONDS, ROUNDS = (1.0, 6.0), 3  # of a comparison of times
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the public weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bars; 0 if all are met, 3 if they cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="where the networks are, or are kept")
    asked = parser.parse_args(arguments)
    chosen = [targets.parse(name) for name in asked.targets]
    with tempfile.TemporaryDirectory() as scratch:
        graphs = asked.graphs or Path(scratch) / "graphs"
        bars: dict[str, bool] = {}
        figures: dict[str, Any] = {}
        try:
            if asked.graphs:  # these can be made anywhere
                prepare(graphs)
            for target in chosen:
                targets.check(target)
            prepare(graphs)
            for name in NETWORKS:
                for target in chosen:
                    key, images = f"{name} {target.name}", dict(np.load(graphs / name / "images.npz"))
                    figures[key] = examine(target, graphs / name, Path(scratch) / key, images)
                    bars |= judge(key, target, figures[key], trained=name == TRAINED)
        except MachineError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    if all(target.backend.gpu is not None for target in chosen):
        return write_result("gpu-engines", bars, {"gpu": nvml.conditions().as_json(), "engines": figures})
    print("\n".join(f"{'met' if met else 'NOT MET'}: {bar}" for bar, met in bars.items()))
    return 0 if all(bars.values()) else 1


def prepare(folder: Path) -> None:
    """Make the networks that are not there: `full.onnx`, `half.onnx`, and `images.npz`."""
    for name, size in NETWORKS.items():
        if (folder / name / "images.npz").is_file():
            continue
        from benchmarks import surgery_models

        (folder / name).mkdir(parents=True, exist_ok=True)
        network = cifar_network(name, trained=True) if name == TRAINED else surgery_models.build(name)
        full = surgery_models.export(name, network, folder / "exported", size)
        random = np.random.default_rng(0)
        masks = {site: surgery_models.half(site.width, random) for site in _inner(full)}
        onnx.save(full, folder / name / "full.onnx")
        onnx.save(surgery.compress(surgery_models.gated(full, masks)).model, folder / name / "half.onnx")
        images = _pictures() if name == TRAINED else _noise(size)
        np.savez(folder / name / "images.npz", **images)


def _inner(model: onnx.ModelProto) -> list[Any]:
    """The sites inside of residual blocks: what one convolution writes and one alone reads."""
    from benchmarks import surgery_models

    readers = surgery_models.readers_of(model)
    read_by = {site: [node.op_type for node in readers[site.tensor]] for site in surgery_models.sites(model)}
    return [site for site, operators in read_by.items() if operators == ["Conv"]]


def _pictures() -> dict[str, Array]:
    """Of CIFAR-10's test set, evenly over the classes, and of its training set."""
    from tests.support.shared import cifar_folder

    with tempfile.TemporaryDirectory() as folder:
        found = data.load("cifar10", cifar_folder(Path(folder), "cifar10", IMAGES["calibration"], IMAGES["test"]))
        images = {name: getattr(found, part).images[:] for name, part in (("test", "test"), ("calibration", "train"))}
        return {name: data.normalise(each, MEAN, STD) for name, each in images.items()} | {"labels": found.test.labels}


def _noise(size: int) -> dict[str, Array]:
    random = np.random.default_rng(0)
    images = {name: random.standard_normal((count, 3, size, size), np.float32) for name, count in NOISE.items()}
    return images | {"labels": np.zeros(NOISE["test"], np.int64)}


def examine(target: targets.Target, graphs: Path, folder: Path, images: Arrays) -> dict[str, Any]:
    """Build, prove, compare and time a network and its half for one target.

    Args:
        target: what to build for.
        graphs: where `full.onnx` and `half.onnx` lie.
        folder: for the engines.
        images: "test" with "labels", and "calibration".
    """
    folder.mkdir(parents=True)
    loaded: dict[str, Engine] = {}
    found: dict[str, Any] = {"engines": {}, "read_from": {}, "accuracy": {}}
    for name in ("full", "half"):
        source = graphs / f"{name}.onnx"
        taken = onnx.load(source).graph.input[0].name
        samples = {taken: images["calibration"]} if target.precision == "int8" else None
        entry = engines.build(source, folder, name, target, OPTIONS, samples)
        loaded[name] = engines.open_built(entry, folder, name, target)
        found["engines"][name] = entry.as_json()
        found["read_from"][name] = read_json(folder / f"{name}.layers.json")["read_from"]
        found["accuracy"][name] = _against_graph(loaded[name], source, images)
    test = dict.fromkeys(loaded["full"].inputs, images["test"])
    found["latency"] = [_timed(loaded["full"], loaded["half"], test, batch) for batch in BATCHES]
    found["same"] = [_timed(loaded["full"], loaded["full"].duplicate(), test, batch) for batch in BATCHES]
    return found


def _against_graph(engine: Engine, graph: Path, images: Arrays) -> dict[str, Any]:
    """An engine's answers and logits against those of its own FP32 graph."""
    reference = engines.reference_engine(graph)
    comparison = Comparison(Accuracy(next(iter(reference.outputs))))
    test = dict.fromkeys(reference.inputs, images["test"])
    expected, found = (engines.infer_all(each, test, BATCHES[-1]) for each in (reference, engine))
    comparison.add(expected, found, {"label": images["labels"]})
    return comparison.loss().as_json()


def _timed(a: Engine, b: Engine, inputs: Arrays, batch: int) -> dict[str, Any]:
    given = {name: values[:batch] for name, values in inputs.items()}
    measured = timing.compare(a, b, given, seconds=SECONDS, max_rounds=ROUNDS)
    captured = [getattr(each.timer(given), "captured", None) for each in (a, b)]
    return {
        "batch": batch,
        **measured.best.as_json(),
        "decided": measured.decided,
        "different": measured.different,
        "throttled": measured.best.throttled,
        "captured": captured,
    }


def judge(what: str, target: targets.Target, found: dict[str, Any], *, trained: bool) -> dict[str, bool]:
    """The bars, of which those on accuracy are for a trained network."""
    precision, full = target.precision, found["accuracy"]["full"]
    bars = {
        f"{what}: layers run in {precision}": all(
            each["precision"]["found"].get(precision, 0) > 0 for each in found["engines"].values()
        ),
        f"{what}: a copy is no other engine": not any(each["different"] for each in found["same"]),
        f"{what}: all logits are finite": not any(each["nonfinite"] for each in found["accuracy"].values()),
    }
    if target.backend.name == "trt":
        proven = {*found["read_from"].values()} == {"engine inspector"}
        bars[f"{what}: types are those that the engine's inspector tells"] = proven
    if trained and precision in AGREEMENT:
        least = AGREEMENT[precision]
        bars[f"{what}: {full['agreement']:.2f} % of the answers are the graph's, {least} asked"] = (
            full["agreement"] >= least
        )
    if trained and precision in DROP:
        bars[f"{what}: drops by {full['drop']:.2f} points, {DROP[precision]} allowed"] = full["drop"] <= DROP[precision]
    return bars


if __name__ == "__main__":
    sys.exit(main())
