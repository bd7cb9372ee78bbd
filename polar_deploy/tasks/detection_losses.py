"""What a dense detector learns from boxes and from a teacher, in PyTorch; imported when a network is trained.

As FCOS has it (Tian et al., arXiv 2006.09214, sections 2.1 to 2.3; torchvision.models.detection.fcos), where each cell
is its own anchor. `polar_deploy.tasks.boxes` says what the outputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from polar_deploy.tasks.boxes import CENTRENESS, DISTANCES, LOGITS, cells
from polar_deploy.tasks.task import Tensors

_RADIUS = 1.5  # strides around the middle of a box in which cells answer for it
_REACH = (
    4.0,
    8.0,
)  # strides to a box's farthest side: a map answers for boxes between these, the first and last for more
_TINY = 1e-9


def detection_loss(outputs: Tensors, boxes: Tensor, labels: Tensor, crowd: Tensor, size: int) -> Tensor:
    """Focal loss of the classes, GIoU loss of the boxes and cross-entropy of the centres, over the cells with objects.

    Args:
        outputs: `cls_logits`, `bbox_regression`, `bbox_ctrness`.
        boxes: [B, M, 4], in pixels of the input: left, top, right, bottom.
        labels: integers [B, M]; negative ones fill up.
        crowd: bool [B, M]: boxes of many objects, which teach nothing.
        size: pixels a side of the input.
    """
    logits, distances, centres = (outputs[name].float() for name in (LOGITS, DISTANCES, CENTRENESS))
    where = cells(size, logits.shape[1])
    middles, strides = (torch.as_tensor(each, dtype=torch.float32, device=logits.device) for each in where)
    usable = (labels >= 0) & ~crowd.bool()
    found = [assign(middles, strides, *each) for each in zip(boxes.float(), usable, strict=True)]
    chosen, wanted = (torch.stack(parts) for parts in zip(*found, strict=True))  # [B, cells], [B, cells, 4]
    positive = chosen >= 0
    objects = positive.sum().clamp_min(1)
    classes = torch.zeros_like(logits)
    at, cell = positive.nonzero(as_tuple=True)
    classes[at, cell, labels.long()[at, chosen[at, cell]]] = 1.0
    by_class = sigmoid_focal_loss(logits, classes, reduction="sum")
    wanted = wanted[positive]
    by_box = generalized_box_iou_loss(_around(distances[positive]), _around(wanted), reduction="sum")
    across, down = wanted[:, 0::2], wanted[:, 1::2]
    ratio = across.amin(1) / across.amax(1).clamp_min(_TINY) * down.amin(1) / down.amax(1).clamp_min(_TINY)
    by_centre = F.binary_cross_entropy_with_logits(centres[positive][:, 0], ratio.sqrt(), reduction="sum")
    loss: Tensor = (by_class + by_box + by_centre) / objects
    return loss


@torch.no_grad()
def assign(middles: Tensor, strides: Tensor, boxes: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Which box each cell answers for: the smallest that it lies in, near the middle of, and that suits its map.

    Args:
        middles: [cells, 2], x and y in pixels.
        strides: [cells], in pixels.
        boxes: [M, 4] of one picture, in pixels.
        usable: bool [M].

    Returns:
        Indices of boxes [cells], -1 for none; and distances to the sides of that box, in strides, [cells, 4].
    """
    corners = torch.cat([middles[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - middles[:, None]], dim=2)
    distances = corners / strides[:, None, None]  # [cells, M, 4]
    off = (middles[:, None] - (boxes[:, :2] + boxes[:, 2:])[None] / 2).abs().amax(2) / strides[:, None]
    farthest = distances.amax(2)
    least = torch.where(strides == strides.min(), 0.0, _REACH[0])[:, None]
    most = torch.where(strides == strides.max(), torch.inf, _REACH[1])[:, None]
    fits = (distances.amin(2) > 0) & (off < _RADIUS) & (farthest >= least) & (farthest < most) & usable[None]
    areas = torch.where(fits, (boxes[:, 2:] - boxes[:, :2]).prod(1)[None], torch.inf)
    smallest, chosen = areas.min(1)
    wanted = distances[torch.arange(len(middles), device=chosen.device), chosen]
    return torch.where(smallest < torch.inf, chosen, -1), wanted


def detection_divergence(outputs: Tensors, teacher: Tensors) -> Tensor:
    """Distillation: the teacher's probabilities as soft labels, its boxes where it is sure of an object.

    Classes by the quality focal loss, which looks at cells where both differ (Li et al., arXiv 2006.04388, equation 3);
    boxes by GIoU, centres by cross-entropy, each cell by the largest probability that the teacher gives a class there.
    """
    logits, distances, centres = (outputs[name].float() for name in (LOGITS, DISTANCES, CENTRENESS))
    wanted = {name: teacher[name].float() for name in (LOGITS, DISTANCES, CENTRENESS)}
    classes = wanted[LOGITS].sigmoid()
    sure = classes.amax(2)
    apart = F.binary_cross_entropy_with_logits(logits, classes, reduction="none")
    by_class = (apart * (logits.sigmoid() - classes).square()).sum()
    by_box = (sure * generalized_box_iou_loss(_around(distances), _around(wanted[DISTANCES]))).sum()
    centre = F.binary_cross_entropy_with_logits(centres, wanted[CENTRENESS].sigmoid(), reduction="none")[..., 0]
    loss: Tensor = (by_class + by_box + (sure * centre).sum()) / sure.sum().clamp_min(1)
    return loss


def _around(distances: Tensor) -> Tensor:
    """Boxes around the origin, in strides, of distances to their sides [..., 4]; IoU knows no scale."""
    return torch.cat([-distances[..., :2], distances[..., 2:]], dim=-1)
