"""Gates in Hugging Face's `Trainer`.

    gates = GatesCallback(lambda model, steps: Gates(model, example_inputs, budget=0.5, steps=steps))
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[gates])
    trainer.train()
    gates.gates.export("gated.onnx"); small = gates.gates.cut()

In mode "batch", the default, the gates add nothing to the loss. In mode "sample" they do, and a callback cannot: there,
`compute_loss` has to, which makes the loss in every `Trainer`:

    class GatedTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            loss = loss + gates.loss()
            return (loss, outputs) if return_outputs else loss
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from polar_deploy.errors import ContentError
from polar_deploy.gating.gates import Gates
from polar_deploy.workspace import atomic_path

FILE = "polar_deploy_gates.pt"  # in a checkpoint's folder


class GatesCallback(TrainerCallback):
    """Steps `Gates` after each step of the optimizer, and keeps their state in a file of each checkpoint.

    At the end of the training gates are fixed, if they are not yet.

    Args:
        make: `Gates` that exist, or a function of the trainer's model, on its device, and of the number of optimizer
            steps that the trainer is going to make.

    Attributes:
        gates: None until the training begins.
    """

    def __init__(self, make: Gates | Callable[[nn.Module, int], Gates]) -> None:
        self.gates: Gates | None = make if isinstance(make, Gates) else None
        self._make = make

    def loss(self) -> Tensor:
        """What the gates add to the loss of the forward pass before; zero before the training and in mode "batch"."""
        return self.gates.loss() if self.gates is not None else torch.zeros(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the gates; as they stood in the checkpoint, where the trainer goes on from one.

        Raises:
            ContentError: it goes on from a checkpoint that holds no gates.
        """
        if self.gates is None:
            assert not isinstance(self._make, Gates)
            self.gates = self._make(kwargs["model"], state.max_steps)
        if state.global_step > 0:
            saved = torch.load(_checkpoint(args, state), map_location="cpu", weights_only=True)
            self.gates.load_state_dict(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a step of the optimizer; the trainer has another event for batches that are only accumulated."""
        if self.gates is not None:
            self.gates.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the state into the folder of the checkpoint that was just written."""
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if self.gates is not None and state.is_world_process_zero and folder.is_dir():
            with atomic_path(folder / FILE) as temporary:
                torch.save(self.gates.state_dict(), temporary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fix the gates."""
        if self.gates is not None and self.gates.phase != "frozen":
            self.gates.freeze()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The file that holds the gates of the checkpoint that the trainer goes on from.

    A trainer does not tell a callback which one that is: it is the one named in its arguments, or that of the step.
    """
    folders = [Path(str(args.output_dir), f"checkpoint-{state.global_step}")]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    raise ContentError(
        f"{folders[0]} holds no {FILE}, the state of the gates",
        "go on from a checkpoint in output_dir that was written with this callback, or start anew",
    )
