"""Real TensorRT on a GPU: engines of full and compressed networks are proven, right, and timed against each other.

    python -m benchmarks.gpu_engines [--networks resnet56] [--targets trt-fp16] [--graphs FOLDER]

ResNet-56 with the public CIFAR-10 weights and torchvision's ResNet-50 (untrained, 224 pixels), each whole and cut to
half of the inner channels, ResNet-56 also to 5 of 9 blocks a stage; for each of trt-fp32, -fp16 and -int8. Of the
trained network answers are compared with its FP32 graph's over the test set, of the others (nobody retrained them)
logits. Each pair is timed at batch 1, 8, 64 and 256, and each full engine against its own copy, which must not differ.
All rounds go to `benchmarks/results/gpu-NETWORK-TARGET.json`, one file a network and target, as soon as it is done.

Without a GPU or without TensorRT it ends with exit code 3. `--graphs` keeps networks and images, so that PyTorch
and ../shared are needed only where they are made. Some ten minutes a network on a large GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from benchmarks.common import SHARED, write_result
from polar_deploy import data, engines, surgery, targets
from polar_deploy.config import Build
from polar_deploy.documents.build import Built
from polar_deploy.engines import Array, Engine, nvml, timing
from polar_deploy.errors import MachineError
from polar_deploy.parity import Comparison
from polar_deploy.tasks.accuracy import Accuracy
from polar_deploy.tasks.classification import classifier
from polar_deploy.workspace import read_json

if TYPE_CHECKING:
    from polar_deploy.gating.network import GatedNetwork

TARGETS = ("trt-fp32", "trt-fp16", "trt-int8")
BATCHES = (1, 8, 64, 256)
OPTIONS = Build(batches=(BATCHES[0], 64, BATCHES[-1]))
AGREEMENT = {"fp16": 99.5, "int8": 97.5}  # percent; of the trained network
DROP = {"int8": 0.5}  # points
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the public weights
CLOSED = 4  # of 9 blocks in a stage


@dataclass(frozen=True)
class Network:
    """One of the networks: classes, pixels a side, what it is cut to, and whether there are weights for it."""

    classes: int
    size: int
    cuts: tuple[str, ...]
    trained: bool


@dataclass(frozen=True)
class Images:
    """Normalised images [N,3,S,S] to compare with and their labels [N]; those that fix the ranges of INT8."""

    test: Array
    labels: npt.NDArray[np.int64]
    calibration: Array


NETWORKS = {
    "resnet56": Network(10, 32, ("half", "blocks"), trained=True),
    "resnet50": Network(1000, 224, ("half",), trained=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bars that are asked for; 0 if all are met, 3 if they cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help="where the networks are, or are kept")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder, codes = asked.graphs or Path(scratch) / "graphs", []
        try:
            if asked.graphs:  # these can be made anywhere
                prepare(asked.networks, folder)
            for target in map(targets.parse, asked.targets):
                targets.check(target)
            prepare(asked.networks, folder)
            for name in asked.networks:
                for target in map(targets.parse, asked.targets):
                    codes.append(examine(name, target, folder / name, Path(scratch) / f"{name}-{target.name}"))
        except MachineError as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return max(codes)


def prepare(names: Sequence[str], folder: Path) -> None:
    """Make the networks that are not there."""
    for name in names:
        if not all((folder / name / f"{graph}.onnx").is_file() for graph in ("full", *NETWORKS[name].cuts)):
            export(name, folder / name)


def export(name: str, folder: Path) -> None:
    """Write `full.onnx`, each cut as `CUT.onnx`, and for a trained network the images."""
    import torch
    from polar_deploy.gating.network import GatedNetwork

    from benchmarks import surgery_models
    from polar_deploy import export as exporter
    from polar_deploy import models

    network = NETWORKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if network.trained:
        model = models.build(name, classifier(network.classes, network.size))
        models.load_weights(model, SHARED / "models" / f"{name}.npz")
        keep_images(folder / "images.npz")
    else:
        model = surgery_models.build(name)
    exporter.export(model, network.size, folder / "full.onnx")
    gated = GatedNetwork(model, network.size)
    for cut in network.cuts:
        gated.freeze(torch.as_tensor(pattern(gated, cut)))
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "gated.onnx"
            exporter.export(gated.static(), network.size, source, gated.sites)
            surgery.compress_file(source, folder / f"{cut}.onnx")


def keep_images(path: Path) -> None:
    """Write CIFAR-10's test set, and images of its training set for calibration, as they are."""
    from tests.support.shared import cifar_folder

    with tempfile.TemporaryDirectory() as folder:
        found = data.load("cifar10", cifar_folder(Path(folder), "cifar10"))
        chosen = np.sort(np.random.default_rng(0).permutation(len(found.train.labels))[: OPTIONS.calibration.images])
        np.savez_compressed(
            path, test=found.test.images[:], labels=found.test.labels, calibration=found.train.images[chosen]
        )


def pattern(gated: GatedNetwork, cut: str) -> npt.NDArray[np.float32]:
    """Which gates are open, 0 or 1: half of the channels of each layer inside of a block, or 5 of 9 blocks a stage."""
    random, opened = np.random.default_rng(0), np.ones(gated.masks, np.float32)
    stages: dict[str, list[int]] = {}
    for site, start in zip(gated.sites, gated.starts, strict=True):
        stage = site.name.partition(".")[0]
        if site.kind == "block":
            stages.setdefault(stage, []).append(start)
        elif cut == "half" and stage.startswith("layer"):
            opened[start + random.permutation(site.width)[: site.width // 2]] = 0
    if cut == "blocks":
        for starts in stages.values():
            opened[random.permutation(starts)[:CLOSED]] = 0
    return opened


def examine(name: str, target: targets.Target, graphs: Path, folder: Path) -> int:
    """Build, prove, compare and time one network for one target; write the figures."""
    network, images = NETWORKS[name], load(name, graphs)
    names = ("full", *network.cuts)
    folder.mkdir(parents=True)
    source = onnx.load(graphs / f"{names[0]}.onnx", load_external_data=False).graph.input[0].name
    calibration = {source: images.calibration} if target.precision == "int8" else None
    built = {each: engines.build(graphs / f"{each}.onnx", folder, each, target, OPTIONS, calibration) for each in names}
    Built(schema=2, target=target.name, engines=built).write(folder / "build.json")
    loaded: dict[str, Engine] = {each: engines.load(folder, each, target) for each in names}
    layers = {each: read_json(folder / f"{each}.layers.json") for each in names}
    accuracy = {each: against_graph(loaded[each], graphs / f"{each}.onnx", images) for each in names}
    figures = {
        "network": {"name": name, **asdict(network)},
        "target": target.name,
        "gpu": nvml.conditions(),
        "engines": {each: entry.as_json() for each, entry in built.items()},
        "layers": {
            each: {key: value for key, value in found.items() if key != "layers"} for each, found in layers.items()
        },
        "accuracy": accuracy,
        "latency": {each: time(loaded["full"], loaded[each], images) for each in network.cuts},
        "same": time(loaded["full"], loaded["full"].duplicate(), images, energy=False),
    }
    return write_result(f"gpu-{name}-{target.name}", judge(name, target, figures), figures)


def load(name: str, folder: Path) -> Images:
    """CIFAR-10 for a trained network, noise for another one."""
    network = NETWORKS[name]
    if network.trained:
        kept = np.load(folder / "images.npz")
        test, training = (data.normalise(kept[each], MEAN, STD) for each in ("test", "calibration"))
        return Images(test, kept["labels"], training)
    shape = (2, BATCHES[-1], 3, network.size, network.size)
    test, training = np.random.default_rng(0).standard_normal(shape, np.float32)
    return Images(test, np.zeros(len(test), np.int64), training)


def against_graph(engine: Engine, graph: Path, images: Images) -> dict[str, Any]:
    """An engine's answers and logits against those of its own FP32 graph."""
    graph_engine = engines.reference_engine(graph)
    found = Comparison(Accuracy(next(iter(graph_engine.outputs))))
    reference, other = (
        engines.infer_all(each, named(each, images.test), BATCHES[-1]) for each in (graph_engine, engine)
    )
    found.add(reference, other, {"label": images.labels})
    assert found.paired is not None
    return {**found.loss().as_json(), "nonfinite": found.paired.nonfinite["compressed"]}


def named(engine: Engine, images: Array) -> dict[str, Array]:
    """Images as the only input of an engine."""
    return dict.fromkeys(engine.inputs, images)


def time(a: Engine, b: Engine, images: Images, *, energy: bool = True) -> list[dict[str, Any]]:
    """Time two engines at each batch: all rounds, which one counts, and the energy of both where the GPU counts it."""
    rows = []
    for batch in BATCHES:
        inputs = named(a, images.test[:batch])
        found = timing.compare(a, b, inputs)
        rows.append(
            {
                **asdict(found),
                "decided": found.decided,
                "different": found.different,
                "throttled": found.best.throttled,
                "captured": [
                    getattr(each.timer(named(each, images.test[:batch])), "captured", None) for each in (a, b)
                ],
                "energy_mj": [timing.energy(each, named(each, images.test[:batch])) for each in (a, b) if energy],
            }
        )
    return rows


def judge(name: str, target: targets.Target, figures: dict[str, Any]) -> dict[str, bool]:
    """The bars, of which those on accuracy are for a trained network."""
    what, precision, full = f"{name} {target.name}", target.precision, figures["accuracy"]["full"]
    proven = [
        figures["layers"][each]["read_from"] == "engine inspector" and entry["precision"]["found"].get(precision, 0) > 0
        for each, entry in figures["engines"].items()
    ]
    bars = {
        f"{what}: {precision} layers are proven by the inspector": all(proven),
        f"{what}: A/A is clean": not any(row["different"] for row in figures["same"]),
        f"{what}: all logits are finite": not any(row["nonfinite"] for row in figures["accuracy"].values()),
    }
    if NETWORKS[name].trained and precision in AGREEMENT:
        least = AGREEMENT[precision]
        bars[f"{what}: agreement {full['agreement']:.2f} % >= {least} %"] = full["agreement"] >= least
    if NETWORKS[name].trained and precision in DROP:
        most = DROP[precision]
        bars[f"{what}: drop {full['drop']:.2f} <= {most} points"] = full["drop"] <= most
    return bars


if __name__ == "__main__":
    sys.exit(main())
