"""mAP: what pycocotools says, also of data sets in which pictures occur several times."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from polar_deploy.errors import ContentError
from polar_deploy.tasks.boxes import CENTRENESS, DISTANCES, LOGITS, cells, decode, iou
from polar_deploy.tasks.mean_ap import MeanAveragePrecision

SIZE, CLASSES, STRIDE = 64, 3, 8
METRIC = MeanAveragePrecision(CLASSES, SIZE, "boxes", "labels", "crowd")


def scene(pictures: int, seed: int) -> dict[str, np.ndarray]:
    """One to four objects a picture, one of ten a crowd; the last picture has none."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (pictures, 4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(12, 24, (pictures, 4, 2))], axis=2)
    labels = rng.integers(0, CLASSES, (pictures, 4))
    labels[np.arange(4) >= rng.integers(1, 5, (pictures, 1))] = -1
    labels[-1] = -1
    return {"boxes": boxes.astype(np.float32), "labels": labels, "crowd": rng.random((pictures, 4)) < 0.1}


def guesses(targets: dict[str, np.ndarray], noise: float, seed: int) -> dict[str, np.ndarray]:
    """Outputs that know the boxes, but for some noise, in the cells nearest to their middles."""
    rng = np.random.default_rng(seed)
    where = cells(SIZE, (SIZE // STRIDE) ** 2)
    pictures, count = len(targets["labels"]), len(where.strides)
    logits = rng.normal(-2.5, 1.5, (pictures, count, CLASSES))
    distances = rng.uniform(0.3, 2.5, (pictures, count, 4))
    for row in range(pictures):
        for box, label in zip(targets["boxes"][row], targets["labels"][row], strict=True):
            if label >= 0:
                cell = np.abs(where.middles - (box[:2] + box[2:]) / 2).sum(1).argmin()
                off = box + rng.normal(0, noise, 4)
                middle = where.middles[cell]
                distances[row, cell] = np.concatenate([middle - off[:2], off[2:] - middle]) / STRIDE
                logits[row, cell, label] = rng.normal(2, 1.5)
    centre = rng.normal(1, 1, (pictures, count, 1))
    return {LOGITS: logits, DISTANCES: distances.clip(0), CENTRENESS: centre}


def by_pycocotools(targets: dict[str, np.ndarray], outputs: dict[str, np.ndarray], times: np.ndarray) -> float:
    """AP in percent of a data set that has picture i `times[i]` times, as pycocotools alone computes it."""
    objects, answers, images = [], [], []
    found = decode(outputs, SIZE)
    for row in np.repeat(np.arange(len(times)), times).tolist():
        images.append({"id": len(images) + 1})
        for box, label, crowd in zip(*(targets[name][row] for name in ("boxes", "labels", "crowd")), strict=True):
            if label >= 0:
                objects.append(_entry(len(images), box, label, len(objects)) | {"iscrowd": int(crowd)})
        for box, score, label in zip(*found[row], strict=True):
            answers.append(_entry(len(images), box, label, len(answers)) | {"score": score, "iscrowd": 0})
    categories = [{"id": label + 1} for label in range(CLASSES)]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for entries in (objects, answers):
            side = COCO()
            side.dataset = {"images": images, "categories": categories, "annotations": entries}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])


def _entry(image: int, box: np.ndarray, label: int, number: int) -> dict[str, object]:
    left, top, right, bottom = map(float, box)
    area = (right - left) * (bottom - top)
    where = {"bbox": [left, top, right - left, bottom - top], "area": area}
    return {"id": number + 1, "image_id": image, "category_id": int(label) + 1, **where}


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_the_score_is_pycocotools_ap(noise: float) -> None:
    targets = scene(24, 1)
    outputs = guesses(targets, noise, 2)
    statistics = METRIC.statistics(outputs, targets)
    wanted = by_pycocotools(targets, outputs, np.ones(24, int))
    assert 3 < wanted < 90
    assert METRIC.of_all(statistics) == pytest.approx(wanted, abs=1e-9)
    batches = [METRIC.statistics(*({k: v[part] for k, v in each.items()} for each in (outputs, targets))) for part in
               (slice(0, 5), slice(5, 24))]  # fmt: skip
    assert np.array_equal(np.concatenate(batches), statistics)


def test_a_resample_is_a_data_set_that_has_pictures_several_times() -> None:
    targets = scene(16, 3)
    outputs = guesses(targets, 1.5, 4)
    statistics = METRIC.statistics(outputs, targets)
    weights = np.random.default_rng(0).multinomial(16, np.full(16, 1 / 16), 4)
    wanted = [by_pycocotools(targets, outputs, row) for row in weights]
    assert METRIC.scores(statistics, weights.astype(float)).tolist() == pytest.approx(wanted, abs=1e-9)


def test_classes_are_told_and_no_detection_is_nothing() -> None:
    targets = scene(12, 5)
    nothing = {name: np.full_like(values, -20) for name, values in guesses(targets, 1, 6).items()}
    statistics = METRIC.statistics(nothing, targets)
    assert METRIC.of_all(statistics) == 0
    judged = (targets["labels"] >= 0) & ~targets["crowd"]
    for label, (pictures, score) in METRIC.by_class(statistics).items():
        assert pictures == ((targets["labels"] == label) & judged).any(axis=1).sum()
        assert score == 0
    broken = guesses(targets, 1, 6)
    broken[DISTANCES][0, 0, 0] = np.nan
    assert np.isfinite(METRIC.statistics(broken, targets)).all()


def test_pairs_are_resampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polar_deploy.tasks.metric.RESAMPLES", 200)
    targets = scene(40, 7)
    better, worse = (METRIC.statistics(guesses(targets, noise, 8), targets) for noise in (0.7, 2.5))
    low, high = METRIC.drop_interval(better, worse)(1.0)
    assert 0 < low < METRIC.of_all(better) - METRIC.of_all(worse) < high
    assert METRIC.drop_interval(better, better)(1.0) == (0, 0)


def test_boxes_are_decoded_where_torchvision_has_them() -> None:
    """One cell of the second map, whose middle is (24, 8): strides of 16, and distances of 1, 0.25, 1, 0.5 of them."""
    count = 8 * 8 + 4 * 4
    outputs = {
        LOGITS: np.full((1, count, 2), -9.0),
        DISTANCES: np.ones((1, count, 4)),
        CENTRENESS: np.zeros((1, count, 1)),
    }
    outputs[LOGITS][0, 64 + 1, 1] = 9
    outputs[DISTANCES][0, 64 + 1] = (1, 0.25, 1, 0.5)
    (found,) = decode(outputs, SIZE)
    assert found.boxes.tolist() == [[8, 4, 40, 16]]
    assert found.labels.tolist() == [1]
    assert found.scores.tolist() == pytest.approx([np.sqrt(1 / (1 + np.exp(-9)) / 2)])


def test_of_boxes_that_overlap_the_best_of_a_class_stays() -> None:
    outputs = {
        LOGITS: np.full((1, 64, 2), -9.0),
        DISTANCES: np.full((1, 64, 4), 2.0),
        CENTRENESS: np.full((1, 64, 1), 5.0),
    }
    outputs[LOGITS][0, [27, 28], 0] = 2, 3  # neighbours: IoU 24 · 32 / (40 · 32)
    outputs[LOGITS][0, 27, 1] = 1
    (found,) = decode(outputs, SIZE)
    assert found.labels.tolist() == [0, 0, 1]  # 0.6 is not more than 0.6
    outputs[DISTANCES][0, 27] = (2, 2, 2.5, 2)
    (found,) = decode(outputs, SIZE)
    assert found.labels.tolist() == [0, 1]
    assert iou(found.boxes[:1], found.boxes[1:]) > 0.6


@pytest.mark.parametrize(("size", "strides"), [(320, (8, 16, 32)), (100, (8, 16, 32, 64)), (32, (4,)), (640, (32,))])
def test_maps_follow_from_the_number_of_cells(size: int, strides: tuple[int, ...]) -> None:
    where = cells(size, sum((-(-size // stride)) ** 2 for stride in strides))
    assert sorted({*where.strides.tolist()}) == list(strides)
    assert where.middles[1].tolist() == [1.5 * strides[0], 0.5 * strides[0]]


def test_numbers_of_cells_that_no_maps_have() -> None:
    with pytest.raises(ContentError, match=r"answers for 77 cells.*on 64 pixels"):
        cells(64, 77)
