from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polar_deploy import data
from polar_deploy.data import own
from polar_deploy.errors import ContentError, UsageError

CODE = """
import numpy as np
from polar_deploy.data import DataSpec, Dataset, Split

def make(data_dir, size=8, labels=(0, 1, 0, 1), names=("cat", "dog"), images=None):
    spec = DataSpec("mine", 2, 8, (0.5,) * 3, (0.5,) * 3, flip=False, crop_padding=0, epochs=3)
    images = np.full((4, size, size, 3), 7, np.uint8) if images is None else images
    split = Split(images, np.array(labels))
    return Dataset(spec, split, split, names)

class Lazy:
    shape = (4, 8, 8, 3)
    def __getitem__(self, index):
        return np.zeros((len(index), 8, 8, 3), np.uint8)
    def fingerprint(self):
        return "always the same"

def lazy(data_dir): return make(data_dir, images=Lazy())
def from_dir(data_dir): return make(data_dir, names=(data_dir.name, "dog"))
def wrong_size(data_dir): return make(data_dir, size=9)
def wrong_label(data_dir): return make(data_dir, labels=(0, 1, 2, 1))
def wrong_names(data_dir): return make(data_dir, names=("cat",))
def wrong_images(data_dir): return make(data_dir, images=[[1]])
def lone_class(data_dir): return make(data_dir, labels=(0, 0, 0, 1))
def nothing(data_dir): return None
def fails(data_dir): return 1 / 0
def no_argument(): return 1
def other_argument(folder, *, shuffle=False): return 1
def one_more(data_dir, split): return 1
def any_argument(**how): return make(**how)
value = 3
"""


@pytest.fixture(autouse=True)
def _in_a_folder_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_pets").mkdir()
    (tmp_path / "my_pets" / "code.py").write_text(CODE)
    (tmp_path / "my_pets" / "broken.py").write_text("x = (")
    (tmp_path / "my_pets" / "lacks.py").write_text("import surely_not_installed")
    own.load.cache_clear()
    yield
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_pets"]:
        del sys.modules[module]
    own.load.cache_clear()


def test_the_function_in_the_current_folder(tmp_path: Path) -> None:
    assert data.spec("my_pets.code:make").epochs == 3
    dataset = data.load("my_pets.code:make")
    assert dataset.train.labels.dtype == np.int64
    bigger = data.load("my_pets.code:make", input_size=16)
    assert bigger.spec.input_size == 16
    assert np.array_equal(bigger.test.images, np.full((4, 16, 16, 3), 7, np.uint8))
    assert data.load("my_pets.code:from_dir", tmp_path / "pets").class_names == ("pets", "dog")


def test_a_wrong_signature_is_answered_with_the_right_one() -> None:
    with pytest.raises(ContentError) as error:
        data.load("my_pets.code:other_argument")
    assert error.value.todo == "define it as `def other_argument(data_dir):`, or give its other arguments defaults"
    assert data.load("my_pets.code:any_argument").class_names == ("cat", "dog")


def test_images_may_be_lazy() -> None:
    dataset = data.load("my_pets.code:lazy", input_size=8)
    assert dataset.train.images[np.array([1, 2])].shape == (2, 8, 8, 3)
    assert dataset.fingerprint() == data.load("my_pets.code:lazy").fingerprint()
    with pytest.raises(UsageError, match="reads its images at 8 pixels, not at 16"):
        data.load("my_pets.code:lazy", input_size=16)


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("my_pets.code:wrong_size", ContentError, r"train.images has the shape \[4, 9, 9, 3\], but the spec says 8"),
        ("my_pets.code:wrong_label", ContentError, r"train.labels\[2\] is 2, outside 0 to 1"),
        ("my_pets.code:wrong_names", ContentError, "has 1 class names for 2 classes"),
        ("my_pets.code:wrong_images", ContentError, "train.images is a list, neither"),
        ("my_pets.code:lone_class", ContentError, "class 1 has 1 training images"),
        ("my_pets.code:nothing", ContentError, "returned a NoneType, not a Dataset"),
        ("my_pets.code:fails", ContentError, r"code.py, line \d+: ZeroDivisionError: division by zero"),
        (
            "my_pets.code:no_argument",
            ContentError,
            r"is defined as no_argument\(\), which cannot be called with data_dir: .*'data_dir'",
        ),
        ("my_pets.code:other_argument", ContentError, r"as other_argument\(folder, \*, shuffle=False\), which cannot"),
        ("my_pets.code:one_more", ContentError, "missing a required argument: 'split'"),
        (
            "my_pets.code:absent",
            UsageError,
            r"code has no function absent\n.*it defines \(\S+code\.py has .*wrong_size, ",
        ),
        ("my_pets.code.py:absent", UsageError, "no module my_pets.code.py here.*\n.*write my_pets.code:absent"),
        ("my_pets.code:value", UsageError, "my_pets.code has no function value"),
        ("my_pets.absent:make", UsageError, "there is no module my_pets.absent here"),
        ("absent.code:make", UsageError, "there is no module absent here"),
        ("my_pets.broken:make", ContentError, r"failed at .*broken.py, line 1: SyntaxError"),
        ("my_pets.lacks:make", ContentError, "lacks.py, line 1: ModuleNotFoundError: .*surely_not_installed"),
        ("code.py:make:x", UsageError, "not of the form package.module:function"),
        (":make", UsageError, "not of the form"),
    ],
)
def test_what_is_wrong_is_named(reference: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        data.load(reference)
    assert f"{reference}" in str(error.value)
