"""Gates in Lightning's `Trainer`.

    gates = GatesCallback(lambda module, steps: Gates(module.net, example_inputs, budget=0.5, steps=steps))
    trainer = Trainer(max_epochs=10, callbacks=[gates])
    trainer.fit(module, loader)
    gates.gates.export("gated.onnx"); small = gates.gates.cut()

Gates are made when the trainer knows how many steps it makes, and after the model went to its device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from polar_deploy.errors import UsageError
from polar_deploy.gating.gates import Gates


class GatesCallback(pl.Callback):
    """Steps `Gates` after each step of the optimizer, and keeps their state in the trainer's checkpoints.

    What `Gates.loss` adds is added to the loss here. At the end of the training gates are fixed, if they are not yet.

    Args:
        make: `Gates` that exist, or a function of the LightningModule, on its device, and of the number of optimizer
            steps that the trainer is going to make.

    Attributes:
        gates: None until the trainer starts to fit.
    """

    def __init__(self, make: Gates | Callable[[pl.LightningModule, int], Gates]) -> None:
        self.gates: Gates | None = make if isinstance(make, Gates) else None
        self._make = make
        self._restored: dict[str, Any] | None = None
        self._steps = 0  # of the optimizer that were seen

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the gates, as they stood in the checkpoint that the trainer goes on from."""
        if self.gates is None:
            assert not isinstance(self._make, Gates)
            steps = trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UsageError("the trainer has no end, and gates need one", "give it max_steps or max_epochs")
            self.gates = self._make(pl_module, int(steps))
        self._take()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from here: the trainer may go on from a checkpoint."""
        self._steps = trainer.global_step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add what the gates add; nothing in mode "batch"."""
        if self.gates is not None and self.gates.mode == "sample":
            loss.add_(self.gates.loss() / trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a batch with which the optimizer made its step: not all do where gradients are accumulated."""
        if self.gates is not None and trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.gates.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the gates."""
        if self.gates is not None and self.gates.phase != "frozen":
            self.gates.freeze()

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        return self.gates.state_dict() if self.gates is not None else self._restored or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the trainer's checkpoint, which most strategies read before there are gates."""
        self._restored = state_dict or None
        if self.gates is not None:
            self._take()

    def _take(self) -> None:
        if self.gates is not None and self._restored is not None:
            self.gates.load_state_dict(self._restored)
            self._restored = None
