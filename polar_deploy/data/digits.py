"""scikit-learn's 1797 handwritten digits of 8 × 8 pixels. They come with the library: the demo needs no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polar_deploy.data.arrays import resize
from polar_deploy.data.dataset import Dataset, DataSpec, Split, stratified
from polar_deploy.errors import MachineError

SPEC = DataSpec(
    "digits",
    classes=10,
    input_size=16,
    mean=(0.305, 0.305, 0.305),
    std=(0.318, 0.318, 0.318),
    flip=False,  # a mirrored digit is another sign
    crop_padding=1,
    epochs=30,
)
_FILE = "datasets/data/digits.csv.gz"  # in the library
_TEST_SHARE = 0.4  # 719 pictures: with 360, not even two networks that agree on all prove a drop below one point
_SPLIT_SEED = 1797  # of the test set: the same pictures in every run, whatever the run's seed


def load(spec: DataSpec, data_dir: Path | None) -> Dataset:
    """The digits in RGB at `spec.input_size`, 60 % of every class for training; `data_dir` is not needed."""
    grey, labels = _read()
    pixels = np.rint(grey.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    images = resize(np.repeat(pixels, 3, axis=3), spec.input_size)
    train, test = stratified(labels, _TEST_SHARE, np.random.default_rng(_SPLIT_SEED))
    names = tuple(str(digit) for digit in range(10))
    return Dataset(spec, Split(images[train], labels[train]), Split(images[test], labels[test]), names)


def _read() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """What the library's `load_digits` gives, [1797, 64] from 0 to 16, and labels; its import alone takes a second."""
    library = find_spec("sklearn")
    if library is None or library.origin is None:
        raise MachineError("scikit-learn, which holds the digits, is missing", "pip install scikit-learn")
    file = Path(library.origin).parent / _FILE
    if file.is_file():
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # of a version that keeps them somewhere else

    grey, labels = load_digits(return_X_y=True)
    return grey, labels.astype(np.int64)
