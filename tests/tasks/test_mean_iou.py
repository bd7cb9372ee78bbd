"""Mean IoU against an example by hand, and against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from polar_deploy.tasks.losses import pixel_cross_entropy
from polar_deploy.tasks.mean_iou import MeanIoU


def logits(answers: np.ndarray, classes: int) -> np.ndarray:
    return np.moveaxis(np.eye(classes, dtype=np.float32)[answers], -1, 1)


def test_by_hand() -> None:
    answers = np.array([[[0, 0, 1], [1, 1, 2]], [[0, 0, 0], [0, 0, 0]]])
    masks = np.array([[[0, 1, 1], [1, 255, 1]], [[0, 0, 0], [0, 0, 255]]], np.uint8)
    metric = MeanIoU(4, "out", "mask", 255)
    statistics = metric.statistics({"out": logits(answers, 4)}, {"mask": masks})
    # intersection, answers, masks of the classes 0 to 3, by eye
    assert statistics.tolist() == [
        [1, 2, 0, 0, 2, 2, 1, 0, 1, 4, 0, 0],
        [5, 0, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0],
    ]
    # 0: 6 of 7; 1: 2 of 4; 2: 0 of 1; 3 is nowhere
    assert metric.of_all(statistics) == pytest.approx(100 * (6 / 7 + 2 / 4 + 0) / 3)
    assert metric.by_class(statistics) == {0: (2, pytest.approx(600 / 7)), 1: (1, pytest.approx(50))}
    share, _ = metric.chance(statistics)
    assert share == pytest.approx(100 * (6 / 10) / 2)  # class 0 everywhere: 6 of 10 pixels; class 1: none


def looped(answers: np.ndarray, masks: np.ndarray, classes: int, ignored: int) -> float:
    """Pixel by pixel."""
    scores = []
    for label in range(classes):
        both = either = 0
        for answer, mask in zip(answers.ravel().tolist(), masks.ravel().tolist(), strict=True):
            if mask == ignored:
                continue
            both += answer == label and mask == label
            either += answer == label or mask == label
        if either:
            scores.append(both / either)
    return 100 * sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(5))
def test_as_in_plain_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes, shape = int(rng.integers(2, 7)), (4, 7, 5)
    answers, masks = rng.integers(0, classes, shape), rng.integers(0, classes, shape)
    masks[rng.random(shape) < 0.2] = 255
    metric = MeanIoU(classes, "out", "mask", 255)
    statistics = metric.statistics({"out": logits(answers, classes)}, {"mask": masks.astype(np.uint8)})
    assert statistics.shape == (4, 3 * classes)
    assert metric.of_all(statistics) == pytest.approx(looped(answers, masks, classes, 255))
    twice = np.array([[2.0, 0, 1, 0]])  # a resample: the first one twice, the third once
    chosen = [0, 0, 2]
    expected = looped(answers[chosen], masks[chosen], classes, 255)
    assert metric.scores(statistics, twice)[0] == pytest.approx(expected)


def test_what_is_not_finite_is_no_answer() -> None:
    values = logits(np.zeros((1, 1, 4), int), 2)
    values[0, 1, 0, 3] = np.nan
    metric = MeanIoU(2, "out", "mask", 255)
    statistics = metric.statistics({"out": values}, {"mask": np.zeros((1, 1, 4), np.uint8)})
    assert statistics.tolist() == [[3, 0, 3, 0, 4, 0]]


def test_samples_without_a_judged_pixel_have_no_score() -> None:
    metric = MeanIoU(2, "out", "mask", 255)
    empty = metric.statistics({"out": logits(np.zeros((1, 2, 2), int), 2)}, {"mask": np.full((1, 2, 2), 255, np.uint8)})
    assert math.isnan(metric.of_all(empty))
    assert metric.worst(empty, empty, 3) == []


def test_the_loss_leaves_ignored_pixels_out() -> None:
    values = torch.tensor([[[[0.0, 5.0]], [[math.log(3), -5.0]]]])  # [1, 2, 1, 2]: 3 : 1 for class 1, then wrong
    mask = torch.tensor([[[1, 255]]], dtype=torch.uint8)
    assert float(pixel_cross_entropy(values, mask, 255)) == pytest.approx(-math.log(3 / 4))
    assert float(pixel_cross_entropy(values, torch.full_like(mask, 255), 255)) == 0
