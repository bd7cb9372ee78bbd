"""The training run of a stage."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from polar_deploy.gating import processes
from polar_deploy.tasks.classification import PictureData
from polar_deploy.training.batches import Batches, ImageBatches, SampleBatches
from polar_deploy.training.loop import TrainingJob, choose_device, prepare
from polar_deploy.training.mixed import MixedPrecision

if TYPE_CHECKING:
    from torch import nn

    from polar_deploy.stages.context import RunContext
    from polar_deploy.tasks.data import Indices
    from polar_deploy.workspace import Fingerprint


def training_job(
    run: RunContext, stage: str, folder: str, network: nn.Module, epochs: int, fingerprint: Fingerprint
) -> TrainingJob:
    """What the training run of a stage needs besides its method.

    Args:
        stage: its name, for whoever watches.
        folder: of the run's, for checkpoint and log.
        network: moved to the device that trains; of several processes each has the weights of the first one.
        fingerprint: a checkpoint of another one is not gone on from.
    """
    if run.team is not None:
        run.team.call(run, stage)
    device = choose_device()
    training, validation = run.split

    def batches(indices: Indices) -> Batches:
        data = run.data
        if isinstance(data, PictureData):
            images, labels = data.dataset.train.images, data.dataset.train.labels
            return ImageBatches(images, labels, indices, run.settings, device)
        return SampleBatches(data.train, indices, run.settings, device)

    return TrainingJob(
        stage=stage,
        task=run.task,
        network=processes.share_network(prepare(network, run.settings, device)),
        train=batches(training),
        validation=batches(validation) if len(validation) else None,
        settings=run.settings,
        epochs=epochs,
        folder=run.path(folder),
        key=str(fingerprint),
        device=device,
        mixed=MixedPrecision(run.settings.training.amp, device),
        fresh=lambda: prepare(run.network(), run.settings, device),
        on_epoch=partial(run.trackers.epoch, stage) if run.trackers else None,
    )
