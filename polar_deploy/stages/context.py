"""What the stages of one run share: settings, folder, data, the network and what can go from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy import targets
from polar_deploy.progress import Progress
from polar_deploy.stages.artefacts import FULL_WEIGHTS
from polar_deploy.workspace import Workspace

if TYPE_CHECKING:
    from torch import nn

    from polar_deploy.devices import Chosen
    from polar_deploy.export import Example
    from polar_deploy.gating.analysis import Analysis
    from polar_deploy.resolved import ResolvedSettings
    from polar_deploy.stages.distributed import Team
    from polar_deploy.tasks import Data, Task
    from polar_deploy.tasks.data import Indices
    from polar_deploy.tracking import Trackers


@dataclass
class RunContext:
    """One run: its settings, its folder (made when first needed), and what is read or found only once.

    Attributes:
        default_budget: whether nobody asked for its budget; another may take its place.
        leads: whether this process runs the stages; else it helps to train, and its folder has no weights.
        team: the others, if there are any.
        track: services that are told of the run, see `polar_deploy.tracking`.
        trackers: these, while stages run.
    """

    settings: ResolvedSettings
    folder: Path
    progress: Progress
    default_budget: bool = False
    leads: bool = True
    team: Team | None = None
    track: Sequence[str] = ()
    trackers: Trackers | None = None

    def path(self, name: str | PathLike[str]) -> Path:
        """Where a file of the run's folder lies."""
        return self.folder / name

    @cached_property
    def workspace(self) -> Workspace:
        """The run's folder."""
        return Workspace(self.folder)

    @property
    def target(self) -> targets.Target:
        """What the engines are built for."""
        return targets.parse(self.settings.target)

    @property
    def budget(self) -> dict[str, float]:
        """The costs that are limited, each as a share of the full network's."""
        return self.settings.budget.asked()

    @cached_property
    def device(self) -> Chosen | None:
        """The device whose widths are taken."""
        from polar_deploy import devices

        name = self.settings.device
        return None if name is None else devices.choose(name, self.target.precision)

    @property
    def measures_latency(self) -> bool:
        """Whether a latency table tells the latency that the budget limits, and not the device's file."""
        return "latency" in self.budget and self.settings.latency_is_measured

    @cached_property
    def task(self) -> Task:
        """What the network is for."""
        from polar_deploy import tasks

        return tasks.make(self.settings)

    @cached_property
    def data(self) -> Data:
        """The data set, read once."""
        data = self.task.data()
        for note in data.notes:
            self.progress.note(note)
        return data

    @cached_property
    def split(self) -> tuple[Indices, Indices]:
        """Indices (training, validation) into the training set; validation is empty for a final run."""
        import numpy as np

        if self.settings.training.train_on_validation:
            return np.arange(len(self.data.train)), np.arange(0)
        return self.data.split(self.settings.seed)

    @cached_property
    def basis(self) -> dict[str, Any]:
        """What everything that is trained depends on, as plain JSON."""
        settings = self.settings.model_dump(mode="json", include={"model", "task", "input_size", "normalize", "seed"})
        return settings | {"data": self.data.fingerprint()}

    # ----------------------------------------------------------------- the network: these need torch

    def network(self) -> nn.Module:
        """The untrained network, its start values drawn from the run's seed."""
        import torch

        from polar_deploy import models

        torch.manual_seed(self.settings.seed)
        return models.build(self.settings.model, self.task)

    def full_network(self) -> nn.Module:
        """The full network with the weights of the full stage."""
        from polar_deploy import models

        network = self.network()
        if self.leads:
            models.load_weights(network, self.path(FULL_WEIGHTS))
        return network  # the others are given them, see `stages.training`

    def example(self) -> Example:
        """Arguments of the network's forward, two samples of zeros."""
        from polar_deploy import models
        from polar_deploy.export import Example

        return Example.of(tuple(models.zeros(self.task).values()))

    @cached_property
    def analysis(self) -> Analysis:
        """What can go from the network, whatever its weights; rehearsed, so that promises hold.

        Raises:
            UsageError: there is no place for a gate.
            ContentError: the network cannot be exported, or promise and result differ.
        """
        from polar_deploy.gating.analysis import analyse
        from polar_deploy.gating.deploy import masked
        from polar_deploy.gating.rehearsal import rehearse

        network, asked = self.network(), self.settings.gates
        found = analyse(network, self.example(), blocks=asked.blocks, heads=asked.heads)
        with masked(network, found):
            rehearse(network, found)
        return found
