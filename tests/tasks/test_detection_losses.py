"""What a detector learns: each box from cells near its middle, on the map that suits its size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polar_deploy.tasks.boxes import CENTRENESS, DISTANCES, LOGITS, cells, decode
from polar_deploy.tasks.detection_losses import assign, detection_divergence, detection_loss

SIZE = 64
COUNT = 8 * 8 + 4 * 4  # strides of 8 and 16


def assigned(*boxes: tuple[float, ...], usable: tuple[bool, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    where = [torch.as_tensor(each, dtype=torch.float32) for each in cells(SIZE, COUNT)]
    chosen, wanted = assign(*where, torch.tensor(boxes), torch.tensor(usable or [True] * len(boxes)))
    return chosen, wanted


def test_a_box_is_learned_by_cells_near_its_middle() -> None:
    chosen, wanted = assigned((4.0, 4.0, 44.0, 44.0))  # around (24, 24)
    middles = cells(SIZE, COUNT).middles[chosen == 0]
    assert middles.tolist() == [[x, y] for y in (20, 28) for x in (20, 28)]
    assert wanted[(chosen == 0).nonzero()[0, 0]].tolist() == [2, 2, 3, 3]


def test_a_large_box_is_for_the_coarse_map() -> None:
    chosen, _ = assigned((0.0, 0.0, 64.0, 64.0))  # 4 strides of 8 to its farthest side at least; 8 are not reached
    small, large = chosen[:64], chosen[64:]
    assert (small >= 0).any()
    assert not (large >= 0).any()  # less than 4 strides of 16
    chosen, _ = assigned((0.0, 0.0, 10.0, 10.0))
    assert (chosen[:64] >= 0).sum() == 1


def test_the_smaller_of_two_boxes_counts_and_crowds_teach_nothing() -> None:
    both = (0.0, 0.0, 40.0, 40.0), (12.0, 12.0, 28.0, 28.0)
    chosen, _ = assigned(*both)
    assert [chosen.tolist().count(box) for box in (0, 1)] == [8, 1]
    chosen, _ = assigned(*both, usable=(True, False))
    assert [chosen.tolist().count(box) for box in (0, 1)] == [9, 0]


def perfect(boxes: torch.Tensor, labels: list[int]) -> dict[str, torch.Tensor]:
    """Outputs that say exactly what the loss asks for."""
    where = [torch.as_tensor(each, dtype=torch.float32) for each in cells(SIZE, COUNT)]
    chosen, wanted = assign(*where, boxes, torch.tensor([True] * len(boxes)))
    logits, centre = torch.full((1, COUNT, 2), -12.0), torch.full((1, COUNT, 1), -9.0)
    for cell in (chosen >= 0).nonzero()[:, 0].tolist():
        logits[0, cell, labels[int(chosen[cell])]] = 12
        left, top, right, bottom = wanted[cell].tolist()
        ratio = (min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)) ** 0.5
        centre[0, cell, 0] = float(np.log(ratio / (1 - ratio))) if ratio < 1 else 12
    return {LOGITS: logits, DISTANCES: wanted.clamp_min(0)[None], CENTRENESS: centre}


def test_what_the_loss_asks_for_is_decoded_to_the_boxes_again() -> None:
    boxes, labels = torch.tensor([[3.0, 5.0, 33.0, 29.0], [40.0, 36.0, 60.0, 62.0]]), [1, 0]
    outputs = perfect(boxes, labels)
    (found,) = decode({name: value.numpy() for name, value in outputs.items()}, SIZE)
    assert {tuple(np.round(box).tolist()) for box in found.boxes} == {tuple(box) for box in boxes.tolist()}
    crowd = torch.zeros(1, 2, dtype=torch.bool)
    best = detection_loss(outputs, boxes[None], torch.tensor([labels]), crowd, SIZE)
    off = {**outputs, DISTANCES: outputs[DISTANCES] + 0.5}
    other = {**outputs, LOGITS: outputs[LOGITS].flip(2)}
    for worse in (off, other):
        assert detection_loss(worse, boxes[None], torch.tensor([labels]), crowd, SIZE) > best + 0.1
    assert detection_divergence(outputs, outputs) < detection_divergence(off, outputs) - 0.1


def test_pictures_without_objects_have_a_loss_and_gradients() -> None:
    outputs = {
        LOGITS: torch.zeros(2, COUNT, 2, requires_grad=True),
        DISTANCES: torch.ones(2, COUNT, 4, requires_grad=True),
        CENTRENESS: torch.zeros(2, COUNT, 1, requires_grad=True),
    }
    loss = detection_loss(outputs, torch.zeros(2, 1, 4), torch.full((2, 1), -1), torch.zeros(2, 1, dtype=bool), SIZE)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * COUNT * 2 * 0.75 * 0.25 * np.log(2))  # focal, each half sure
    assert all(torch.isfinite(each.grad).all() for each in outputs.values())
