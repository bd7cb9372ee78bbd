"""Batches: what an engine was not built for is refused, and any number of images is split into what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from polar_deploy.engines.base import fitting, infer_all, specs
from polar_deploy.errors import ContentError
from polar_deploy.tensors import Arrays, TensorSpec


class Profiled:
    """Takes 4 to 16 images; answers with each one's first pixel."""

    inputs: ClassVar = {"image": TensorSpec((3, 2, 2))}
    outputs: ClassVar = {"first": TensorSpec((1,))}

    def __init__(self, least: int = 4, largest: int | None = 16) -> None:
        self.batches = (least, largest)
        self.sizes: list[int] = []

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        given = fitting(inputs, self, "a.plan")["image"]
        self.sizes.append(len(given))
        return {"first": given[:, 0, 0, :1]}


def images(count: int, side: int = 2) -> dict[str, np.ndarray]:
    values = np.arange(count, dtype=np.float32)
    return {"image": np.broadcast_to(values[:, None, None, None], (count, 3, side, side))}


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "a.plan was built for batches of 4 to 16, but got 3 samples"),
        (17, "a.plan was built for batches of 4 to 16, but got 17 samples"),
        (0, "a.plan was built for batches of 4 to 16, but got 0 samples"),
    ],
)
def test_batches_outside_of_the_profile_are_refused(count: int, message: str) -> None:
    with pytest.raises(ContentError) as error:
        fitting(images(count), Profiled(), "a.plan")
    assert error.value.what == message


@pytest.mark.parametrize("count", [4, 16])
def test_the_ends_of_the_profile_are_taken(count: int) -> None:
    fitting(images(count), Profiled(), "a.plan")


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ContentError, match=r"takes image as float32 \[B, 3, 2, 2\], but got float32 \[4, 3, 3, 3\]"):
        fitting(images(4, side=3), Profiled(), "a.plan")
    with pytest.raises(ContentError, match=r"but got float32 \[4\]"):
        fitting({"image": np.zeros(4, np.float32)}, Profiled(), "a.plan")


class Mixed(Profiled):
    """Takes an image and an index."""

    inputs: ClassVar = {"image": TensorSpec((3, 2, 2)), "index": TensorSpec((), "int64")}


def test_inputs_are_chosen_by_name_and_held_against_their_types() -> None:
    given = {"other": np.zeros(1), "index": np.arange(4), **images(4)}
    assert list(fitting(given, Mixed(), "a.plan")) == ["image", "index"]
    wrong = {
        "takes index, but got image": images(4),
        r"takes index as int64 \[B\], but got int32 \[4\]": images(4) | {"index": np.arange(4, dtype=np.int32)},
        r"different batches \(image: 4, index: 5\)": images(4) | {"index": np.arange(5)},
    }
    for message, inputs in wrong.items():
        with pytest.raises(ContentError, match=message):
            fitting(inputs, Mixed(), "a.plan")
    halves = images(4)["image"].astype(np.float16)  # floats of any type are floats
    assert fitting({"image": halves, "index": np.arange(4)}, Mixed(), "a.plan")["image"] is halves


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("input", {"a": ("float32", [1, 3])}),
        ("input", {"a": ("float32", ["batch", "width"])}),
        ("input", {"a": (None, ["batch", 3])}),
        ("output", {"a": ("float32", [])}),
        ("output", {}),
    ],
)
def test_only_the_batch_varies(kind: str, told: dict[str, tuple[str | None, list[object]]]) -> None:
    with pytest.raises(ContentError, match=rf"net\.onnx: each {kind} must have a batch .*as first axis"):
        specs(kind, told, Path("net.onnx"))


def test_outputs_may_be_of_any_length() -> None:
    found = specs("output", {"boxes": ("float32", [None, "count", 4])}, Path("net.onnx"))
    assert found == {"boxes": TensorSpec((None, 4))}


@pytest.mark.parametrize(
    ("least", "largest", "count", "sizes"),
    [(4, 16, 33, [16, 16, 4]), (4, 16, 2, [4]), (1, None, 300, [128, 128, 44]), (256, None, 300, [256, 256])],
)
def test_any_number_of_images_is_answered_in_order(
    least: int, largest: int | None, count: int, sizes: list[int]
) -> None:
    engine = Profiled(least, largest)
    np.testing.assert_array_equal(infer_all(engine, images(count))["first"][:, 0], np.arange(count))
    assert engine.sizes == sizes
