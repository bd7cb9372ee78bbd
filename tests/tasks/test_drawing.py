"""Pictures of worst samples: what was seen, what should be said of it, what both networks say."""

from __future__ import annotations

import numpy as np

from polar_deploy.config import Normalize, Training
from polar_deploy.tasks import classification, detection, drawing, segmentation
from polar_deploy.tasks.boxes import CENTRENESS, DISTANCES, LOGITS, Detections

NORMAL = Normalize(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255 - NORMAL.mean) / NORMAL.std).transpose(0, 3, 1, 2).astype(np.float32)


def test_a_picture_is_shown_as_it_was() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    task = classification.classifier(3, 8, normal=NORMAL)
    assert task.show is not None
    assert np.array_equal(task.show({"input": normalised(pixels)}, {}, {}), pixels)


def test_masks_have_a_colour_for_each_class_and_black_for_none() -> None:
    classes = np.array([[[0, 1, 2, 255, 3]]])
    colours = drawing.masks(classes, 3)[0, 0].tolist()
    assert len({tuple(each) for each in colours[:3]} | {(0, 0, 0)}) == 4
    assert colours[3] == colours[4] == [0, 0, 0]


def test_segmentation_has_picture_mask_and_both_answers() -> None:
    task = segmentation.segmenter(2, 8, Training(), classification.no_data, NORMAL)
    mask = np.zeros((1, 8, 8), np.uint8)
    mask[0, :4] = 1
    right = np.stack([mask == 0, mask == 1], axis=1).astype(np.float32)
    pixels = np.full((1, 8, 8, 3), 200, np.uint8)
    assert task.show is not None
    outputs = {"full": {"out": right}, "compressed": {"out": 1 - right}}
    drawn = task.show({"input": normalised(pixels)}, {"mask": mask}, outputs)
    picture, wanted, full, compressed = (drawn[0, :, 12 * n : 12 * n + 8] for n in range(len(task.panels)))
    assert np.array_equal(picture, pixels[0])
    assert np.array_equal(full, wanted)
    assert np.array_equal(compressed, wanted[::-1])


def test_detection_has_objects_and_both_answers() -> None:
    task = detection.detector(2, 32, classification.no_data, NORMAL)
    targets = {
        "boxes": np.array([[[4.0, 4.0, 20.0, 20.0], [0, 0, 0, 0]]], np.float32),
        "labels": np.array([[1, -1]]),
        "crowd": np.zeros((1, 2), bool),
    }
    found = {LOGITS: np.full((1, 16, 2), -9.0), DISTANCES: np.ones((1, 16, 4)), CENTRENESS: np.full((1, 16, 1), 9.0)}
    found[LOGITS][0, 5, 1] = 9  # of stride 8: the cell at (12, 12), a box from 4 to 20
    nothing = {**found, LOGITS: np.full((1, 16, 2), -9.0)}
    assert task.show is not None
    pixels = np.full((1, 32, 32, 3), 200, np.uint8)
    drawn = task.show({"input": normalised(pixels)}, targets, {"full": found, "compressed": nothing})
    objects, full, compressed = (drawn[0, :, 100 * n : 100 * n + 96] for n in range(len(task.panels)))
    assert np.array_equal(full, objects)  # three times as large, so that lines are thin
    coloured = np.argwhere((objects != 200).any(axis=2))
    assert [coloured.min(), coloured.max()] == [12, 60]
    assert (compressed == 200).all()


def test_boxes_that_are_not_sure_are_left_out() -> None:
    box = np.array([[1.0, 1.0, 9.0, 9.0]])
    picture = np.zeros((96, 96, 3), np.uint8)
    for score, drawn in ((0.2, False), (0.4, True)):
        found = Detections(box, np.array([score]), np.array([0]))
        assert drawing.with_boxes(picture, found).any() == drawn
