"""Accuracy on the device: of a test set in a folder, whose pictures are prepared as the manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.bundle.manifest import CLASSIFICATION
from polar_deploy.errors import UsageError

if TYPE_CHECKING:
    from polar_deploy.bundle.device import AvailableEngines
    from polar_deploy.bundle.manifest import Preprocessing
    from polar_deploy.bundle.read import Bundle
    from polar_deploy.data import Split
    from polar_deploy.documents.parity import Accuracy
    from polar_deploy.documents.verified import CompressedAccuracy
    from polar_deploy.engines import Engine
    from polar_deploy.parity import Judgement
    from polar_deploy.tasks.classification import Pictures

_PUBLISHED = {"cifar10", "cifar100", "tiny-imagenet", "imagenet"}  # data sets that lie in folders


def test_set(bundle: Bundle, folder: Path) -> Pictures:
    """The test set in `folder`: test.npz, a folder of pictures for each label, or the published files of the data set.

    Raises:
        UsageError: there is none of these. ContentError: what is there is damaged.
    """
    from polar_deploy.config import Normalize
    from polar_deploy.tasks.classification import Pictures

    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "give one with the test set")
    normal = pictures_of(bundle)
    return Pictures(_split(bundle, folder), Normalize(mean=normal.mean, std=normal.std))


def pictures_of(bundle: Bundle) -> Preprocessing:
    """How a classifier's pictures are made; UsageError for a bundle of another task."""
    manifest = bundle.manifest
    if manifest.task.name != CLASSIFICATION or manifest.preprocessing is None:
        problem = f"the bundle is for the task {manifest.task.name}, and only classifiers of pictures are measured here"
        raise UsageError(problem, "leave --data out; golden samples and latency are verified for any task")
    return manifest.preprocessing


def measure(
    bundle: Bundle, here: AvailableEngines, graphs: Mapping[str, Engine], test: Pictures
) -> tuple[Accuracy | CompressedAccuracy | None, Judgement | None]:
    """Count what the engines, and the FP32 graphs, get right on the whole test set.

    Args:
        bundle: what was asked of it.
        here: the engines on this device.
        graphs: their FP32 graphs; {} without ONNX Runtime.
        test: the test set.

    Returns:
        Percent right and the drop in points, as far as there is a full network; and the answer, if there is one.
    """
    from polar_deploy import parity
    from polar_deploy.documents.verified import CompressedAccuracy
    from polar_deploy.tasks import accuracy

    if not here.engines:
        return None, parity.Judgement("undecided", "the engines are not run here")
    named = {f"{name} onnx": graph for name, graph in graphs.items()}
    manifest = bundle.manifest
    metric = accuracy.Accuracy(manifest.outputs[0].name)
    found = {name: each.paired for name, each in parity.compare_all(here.engines, named, test, metric).items()}
    if pair := found.get("accuracy"):
        precision = {name: found[name] for name in here.engines if name in found}
        return pair.accuracy(), parity.judge_accuracy(pair, manifest.verdict.asked.settings(), precision)
    if pair := found.get("compressed"):
        return CompressedAccuracy(samples=pair.samples, compressed=pair.scores[1]), None
    return None, None


def _split(bundle: Bundle, folder: Path) -> Split:
    from polar_deploy import data

    if (folder / "test.npz").is_file():
        return _arrays(bundle, folder / "test.npz")
    if _are_folders(bundle.labels) and all((folder / label).is_dir() for label in bundle.labels):
        return _pictures(bundle, folder)
    name = bundle.manifest.provenance.data.name
    if name in _PUBLISHED:  # and nothing else: a stranger's manifest shall import nothing
        return data.load(name, folder, input_size=pictures_of(bundle).crop, download=False).test
    first = ", ".join(map(repr, bundle.labels[:3]))
    raise UsageError(
        f"{folder} has no test set: neither test.npz nor folders with the labels' names ({first}, …)",
        "write test.npz with images uint8 [N, H, H, 3] and labels int [N], or a folder of pictures for each label",
    )


def _are_folders(labels: list[str]) -> bool:
    """Whether each label can name a folder of its own; a stranger's may lead elsewhere."""
    return len({*labels}) == len(labels) and all(label == Path(label).name for label in labels)


def _arrays(bundle: Bundle, path: Path) -> Split:
    from polar_deploy.data import Split
    from polar_deploy.data.arrays import read_npz, resize
    from polar_deploy.data.checks import check_images, check_labels

    arrays, made = read_npz(path, "images", "labels"), pictures_of(bundle)
    images = resize(check_images(arrays["images"], f"{path}: images"), made.shorter_side)
    margin = round((made.shorter_side - made.crop) / 2)
    images = images[:, margin : margin + made.crop, margin : margin + made.crop]
    return Split(images, check_labels(arrays["labels"], len(images), len(bundle.labels), f"{path}: labels"))


def _pictures(bundle: Bundle, folder: Path) -> Split:
    from polar_deploy.data import LazyImages, Split
    from polar_deploy.data.folders import SUFFIXES, image_names

    found = [
        (f"{label}/{name}", index) for index, label in enumerate(bundle.labels) for name in image_names(folder / label)
    ]
    if not found:
        raise UsageError(f"the folders in {folder} hold no pictures", f"put {', '.join(SUFFIXES)} files there")
    names, labels = zip(*found, strict=True)
    made = pictures_of(bundle)
    images = LazyImages(folder, np.array(names, dtype=object), made.shorter_side, made.crop)
    return Split(images, np.array(labels, np.int64))
