"""What a run works with: settings with all that was left open decided, as `polar_deploy.stages.resolve` does it."""

from __future__ import annotations

from polar_deploy.config import (
    BatchSize,
    Budget,
    Channels,
    Count,
    CountOrNone,
    Gates,
    Positive,
    PositiveShare,
    Settings,
    Share,
    Training,
)

HALF = Budget(macs=0.5)  # the default budget where latency cannot be one


class ResolvedTraining(Training):
    """Training with every default filled in."""

    epochs: Count
    full_epochs: Count
    batch_size: BatchSize
    gated_lr: Positive
    flip: bool
    crop_padding: CountOrNone
    crop_scale: PositiveShare


class ResolvedGates(Gates):
    """Gates with both ends of their closing known."""

    close_from: Share
    freeze_at: PositiveShare


class ResolvedSettings(Settings):
    """Settings of which nothing is left to be decided; what is still None is off, or not given."""

    data: str
    budget: Budget
    align: Channels
    training: ResolvedTraining
    gates: ResolvedGates
