"""From what was asked for to what a run works with: every default that depends on data, target or machine."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError

from polar_deploy import targets, tasks
from polar_deploy.config import CLOSING, Budget, Settings, fixed_at
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.resolved import HALF, ResolvedSettings
from polar_deploy.stages.artefacts import GATES
from polar_deploy.workspace import read_json


def choose_target(settings: Settings) -> Settings:
    """The settings with "auto" replaced by the fastest target that is built and run here."""
    if settings.target != "auto":
        return settings
    return settings.model_copy(update={"target": targets.choose().name})


def default_folder(settings: Settings) -> Path:
    """runs/MODEL-DATA-TARGET-BUDGET-sSEED: no time stamp, so that the same command resumes."""
    budget = "_".join(f"{name}{share:g}" for name, share in settings.budget.asked().items()) if settings.budget else ""
    model, data_name = settings.model.replace(":", "."), re.sub(r"[^\w-]+", ".", tasks.data_name(settings))
    parts = (model, data_name[-60:].strip(".-"), settings.target, budget, f"s{settings.seed}")
    return Path("runs") / "-".join(filter(None, parts))


def resolve(settings: Settings, folder: Path) -> ResolvedSettings:
    """Fill in every default that depends on the data set, the target, or an earlier part of the run.

    Args:
        settings: as given; the target has a name.
        folder: the run's, which need not be there.

    Raises:
        UsageError: no such data set or target, or settings that contradict each other.
    """
    suits, target = tasks.defaults(settings), targets.parse(settings.target)
    training = settings.training
    epochs = training.epochs or suits.epochs
    filled = {
        "epochs": epochs,
        "full_epochs": training.full_epochs or epochs,
        "batch_size": training.batch_size or suits.batch_size,
        "gated_lr": training.gated_lr or (training.lr / 2 if training.init_from == "full" else training.lr),
        "flip": suits.flip if training.flip is None else training.flip,
        "crop_padding": suits.crop_padding if training.crop_padding is None else training.crop_padding,
        "crop_scale": training.crop_scale or suits.crop_scale,
    }
    decided = {
        "data": suits.data,
        "input_size": settings.input_size or suits.input_size,
        "normalize": settings.normalize or suits.normalize,
        "budget": settings.budget or _default_budget(settings, target, folder),
        "align": _alignment(settings, target),
        "training": training.model_dump() | filled,
        "gates": settings.gates.model_dump() | _closing(settings),
    }
    return ResolvedSettings.model_validate(dict(settings) | decided)


def _closing(settings: Settings) -> dict[str, float]:
    """When gates begin to close, and when they are fixed, as shares of the gated run."""
    close_from, freeze_at = settings.gates.close_from, settings.gates.freeze_at
    trained = settings.training.init_from == "full"
    if close_from is None:
        close_from = 0.05 if trained else 0.3
        close_from = close_from if freeze_at is None else min(close_from, freeze_at / 2)
    closing = CLOSING[settings.gates.mode] if trained else 0.25
    return {"close_from": close_from, "freeze_at": fixed_at(close_from, freeze_at, closing)}


def _alignment(settings: Settings, target: targets.Target) -> int:
    """What widths are multiples of: of anything, where a device says which they are."""
    if settings.device is None:
        return settings.align or target.align
    if settings.align not in (None, 1):
        raise UsageError(
            f"both a device ({settings.device}) and an alignment ({settings.align}) say which widths to take",
            "leave --align out, or --device",
        )
    return 1


def _default_budget(settings: Settings, target: targets.Target, folder: Path) -> Budget:
    """Latency, which is what users feel, where it can be measured or a device's file tells it; else MACs.

    Of a run that has gates already, theirs: it may have been trained on another machine.
    """
    try:
        return Budget.model_validate(read_json(folder / GATES)["budget"])
    except (UsageError, ContentError, ValidationError, KeyError, TypeError):  # none, or none that could be used
        measurable = not targets.lacks_to_build(target) + targets.lacks_to_run(target)
        known = settings.latency_table is not None or settings.device is not None
        return Budget(latency=0.6) if measurable or known else HALF
