from __future__ import annotations

import numpy as np
import pytest

from polar_deploy import data
from polar_deploy.data import digits as module
from polar_deploy.errors import MachineError


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits")


def test_sizes_and_classes(digits: data.Dataset) -> None:
    assert digits.train.images.shape[1:] == digits.test.images.shape[1:] == (16, 16, 3)
    assert len(digits.train.labels) + len(digits.test.labels) == 1797
    shares = np.bincount(digits.test.labels) / (np.bincount(digits.train.labels) + np.bincount(digits.test.labels))
    np.testing.assert_allclose(shares, 0.4, atol=0.003)
    assert digits.class_names[7] == "7"


def test_the_normalisation_is_its_own(digits: data.Dataset) -> None:
    pixels = np.asarray(digits.train.images) / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), digits.spec.mean, atol=1e-3)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), digits.spec.std, atol=1e-3)


def test_the_pictures_are_sklearns() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    pairs = zip(source.images, source.target, strict=True)
    small = data.load("digits", input_size=8)
    assert small.spec.input_size == 8
    both = np.concatenate([small.train.images, small.test.images])
    labels = np.concatenate([small.train.labels, small.test.labels])
    expected = {(np.rint(i * 255 / 16).astype(np.uint8).tobytes(), int(n)) for i, n in pairs}
    assert {(i[..., 1].tobytes(), int(n)) for i, n in zip(both, labels, strict=True)} == expected
    assert not {i.tobytes() for i in small.train.images} & {i.tobytes() for i in small.test.images}


def test_a_library_that_keeps_them_elsewhere_is_asked(digits: data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FILE", "elsewhere.csv")
    assert data.load("digits").fingerprint() == digits.fingerprint()


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="scikit-learn, which holds the digits, is missing"):
        data.load("digits")


def test_the_test_set_is_always_the_same(digits: data.Dataset) -> None:
    assert digits.fingerprint() == data.load("digits").fingerprint()
    assert digits.fingerprint() != data.load("digits", input_size=12).fingerprint()
