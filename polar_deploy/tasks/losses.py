"""Losses, in PyTorch. With `detection_losses` the only module of tasks that imports it, when a network is trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in FP32.

    Args:
        logits: [B, classes, …].
        labels: int64 [B, …].
        smoothing: share of a label that is spread over all classes.
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def pixel_cross_entropy(logits: Tensor, masks: Tensor, ignored: int, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the pixels that are not ignored, in FP32; 0 where all are.

    Args:
        logits: [B, classes, H, W].
        masks: integers [B, H, W]: classes, or `ignored`.
        smoothing: as for `cross_entropy`.
    """
    wanted = masks.long()
    total = F.cross_entropy(logits.float(), wanted, ignore_index=ignored, reduction="sum", label_smoothing=smoothing)
    return total / (wanted != ignored).sum().clamp_min(1)


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Distillation: mean KL divergence to a teacher's classes at a temperature (Hinton et al., arXiv 1503.02531).

    Args:
        logits: the student's, [B, classes, …].
        wanted: the teacher's, of the same shape.
        temperature: of both; the result is scaled by its square, as gradients are by its inverse.
    """
    given = F.log_softmax(logits.float() / temperature, dim=1)
    target = F.log_softmax(wanted.float() / temperature, dim=1)
    positions = logits.numel() // (logits.shape[0] * logits.shape[1])  # of a map; 1 for a vector
    return F.kl_div(given, target, reduction="batchmean", log_target=True) * temperature**2 / positions


def percent_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of samples [B] whose largest logit [B, classes] is their label's, in percent."""
    return 100 * (logits.argmax(1) == labels).float().mean()


def scaled_mse(outputs: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Distillation for any outputs: mean over outputs of the squared difference, as a share of the teacher's variance.

    Integer outputs teach nothing, and are left out.
    """
    parts = [
        F.mse_loss(outputs[name].float(), value.float()) / value.float().var().clamp_min(torch.finfo().eps)
        for name, value in wanted.items()
        if value.is_floating_point()
    ]
    return torch.stack(parts).mean()
