"""The user's own data: a "package.module:function" that returns a Dataset."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from polar_deploy.data.arrays import resize
from polar_deploy.data.checks import as_array, check_every_class, check_images, check_labels
from polar_deploy.data.dataset import Dataset, DataSpec, LazySource, Split
from polar_deploy.data.names import call_reference
from polar_deploy.errors import ContentError, UsageError


@lru_cache(maxsize=1)  # spec and load of one run ask for the same one
def load(reference: str, data_dir: Path | None) -> Dataset:
    """`function(data_dir=data_dir)`, checked.

    Raises:
        UsageError: there is no such function.
        ContentError: it failed, or what it returned is no sound Dataset.
    """
    dataset = call_reference(reference, data_dir=data_dir)
    if not isinstance(dataset, Dataset):
        problem = f"'{reference}' returned a {type(dataset).__name__}, not a Dataset"
        raise ContentError(problem, "return polar_deploy.data.Dataset")
    classes = dataset.spec.classes
    if len(dataset.class_names) != classes:
        problem = f"'{reference}' has {len(dataset.class_names)} class names for {classes} classes"
        raise ContentError(problem, "name every class once")
    train = _checked(dataset.train, dataset.spec, f"{reference}: train")
    test = _checked(dataset.test, dataset.spec, f"{reference}: test")
    check_every_class(train.labels, classes, reference)
    return replace(dataset, train=train, test=test)


def _checked(split: Split, spec: DataSpec, where: str) -> Split:
    images: object = split.images
    if isinstance(images, np.ndarray):
        check_images(images, f"{where}.images")
    elif not isinstance(images, LazySource):
        problem = f"{where}.images is a {type(images).__name__}, neither a numpy array nor a source of images"
        raise ContentError(problem, "return a uint8 array, or an object with shape, __getitem__ and fingerprint")
    if tuple(images.shape[1:]) != (spec.input_size, spec.input_size, 3):
        problem = f"{where}.images has the shape {list(images.shape)}, but the spec says {spec.input_size} pixels"
        raise ContentError(problem, "make the images and DataSpec.input_size agree")
    labels = check_labels(as_array(split.labels, f"{where}.labels"), images.shape[0], spec.classes, f"{where}.labels")
    return Split(split.images, labels)


def resized(dataset: Dataset, input_size: int | None) -> Dataset:
    """`dataset` at `input_size` pixels a side; UsageError where its images are read lazily."""
    if input_size in (None, dataset.spec.input_size):
        return dataset
    splits = []
    for split in (dataset.train, dataset.test):
        if not isinstance(split.images, np.ndarray):
            problem = f"'{dataset.spec.name}' reads its images at {dataset.spec.input_size} pixels, not at {input_size}"
            raise UsageError(problem, "leave input_size out, or let the function return images of that size")
        splits.append(Split(resize(split.images, input_size), split.labels))
    return replace(dataset, spec=replace(dataset.spec, input_size=input_size), train=splits[0], test=splits[1])
