"""full: train the full network, or take the weights that were given. It is the baseline of every comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polar_deploy.stages.artefacts import FULL_CHECKPOINT, FULL_LOG, FULL_WEIGHTS
from polar_deploy.stages.stage import TORCH, Stage, fingerprint

if TYPE_CHECKING:
    from torch import nn

    from polar_deploy.documents.training_log import Epoch
    from polar_deploy.stages.context import RunContext
    from polar_deploy.workspace import Fingerprint

_GATED_ALONE = {"epochs", "gated_lr", "init_from", "distill", "distill_share", "distill_temperature"}


def _run(run: RunContext) -> None:
    from polar_deploy import models

    network, given = train(run)
    if given is not None:
        given.write_all(run.path(FULL_LOG), [given])
    models.save_weights(network, run.path(FULL_WEIGHTS))


def train(run: RunContext) -> tuple[nn.Module, Epoch | None]:
    """The full network, and what is to be logged of one that was given; every process of a run does this."""
    from polar_deploy.documents.training_log import Epoch
    from polar_deploy.stages.training import training_job
    from polar_deploy.training.full import train_full
    from polar_deploy.training.loop import evaluate

    given, network = run.settings.full_weights, run.network()
    if run.leads:
        load_given(run, network)
    fit = training_job(run, "full", "full", network, run.settings.training.full_epochs, _fingerprint(run))
    if given is None:
        train_full(fit, run.progress)
        return network, None
    score = evaluate(run.task, fit.network, fit.validation)
    return network, Epoch(epoch=0, given=True, val_score=score)


def load_given(run: RunContext, network: nn.Module) -> None:
    """Put the weights that were given into a network, if any were.

    Raises:
        UsageError: they are not where they should be.
        ContentError: they are of another network.
    """
    from polar_deploy import models

    if run.settings.full_weights is not None:
        models.load_weights(network, run.settings.full_weights)


def _fingerprint(run: RunContext) -> Fingerprint:
    training = run.settings.training
    if run.settings.full_weights is not None:
        return fingerprint(
            run.basis | {"given": True, "train_on_validation": training.train_on_validation}, trained=True
        )
    return fingerprint(run.basis | training.model_dump(mode="json", exclude=_GATED_ALONE), trained=True)


def _given(run: RunContext) -> list[Path]:
    weights = run.settings.full_weights
    return [] if weights is None else [weights]


STAGE = Stage(
    "full",
    _run,
    _fingerprint,
    reads=(),
    given=_given,
    writes=(FULL_WEIGHTS, FULL_LOG),
    trained=(FULL_WEIGHTS, FULL_LOG),
    scratch=(FULL_CHECKPOINT,),
    packages=TORCH,
    builds_network=True,
    reads_data=True,
)
