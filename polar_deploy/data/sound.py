"""Every picture file of a data set is looked at before a network is trained on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from polar_deploy.data.checks import check_every_class
from polar_deploy.data.dataset import Dataset, Split
from polar_deploy.data.parts import left_out, require_sound
from polar_deploy.data.pictures import LazyImages
from polar_deploy.errors import ContentError


def sound(dataset: Dataset, *, skip_broken: bool = False) -> Dataset:
    """`dataset` after a look at its picture files, their headers and last bytes; images from elsewhere are not seen.

    Args:
        dataset: any.
        skip_broken: whether files that are no sound pictures are left out, which its notes then tell. All are decoded
            then, so that none is found to be broken in the middle of a run.

    Raises:
        ContentError: a file is no sound picture; or, without such files, a class has too few images.
    """
    problems = [_problems(split, thorough=skip_broken) for split in (dataset.train, dataset.test)]
    broken = [each for part in problems for each in part if each is not None]
    if not broken:
        return dataset
    if not skip_broken:
        require_sound(broken, "files in all are no sound pictures", "files")
    kept = [np.flatnonzero([each is None for each in part]) for part in problems]
    train, test = (_only(split, rows) for split, rows in zip((dataset.train, dataset.test), kept, strict=True))
    for split, least, name in ((train, 2, "training"), (test, 1, "test")):
        check_every_class(split.labels, dataset.spec.classes, f"{name} set without broken files", least)
    validation = dataset.validation
    if validation is not None:
        validation = np.flatnonzero(np.isin(kept[0], validation))
    note = left_out(broken, "broken pictures", "a broken picture is left out:")
    return replace(dataset, train=train, test=test, validation=validation, notes=(*dataset.notes, note))


def _problems(split: Split, *, thorough: bool) -> list[ContentError | None]:
    if isinstance(split.images, LazyImages):
        return split.images.problems(thorough=thorough)
    return [None] * len(split.labels)


def _only(split: Split, rows: np.ndarray) -> Split:
    if not isinstance(split.images, LazyImages):
        return split
    return Split(replace(split.images, files=split.images.files[rows]), split.labels[rows])
