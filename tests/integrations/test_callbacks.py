"""The callbacks in the real trainers: a step a step of the optimizer, state in checkpoints, fixed at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polar_deploy import Gates
from polar_deploy.errors import ContentError

EXAMPLE = torch.zeros(1, 1, 6, 8)
X = torch.randn(48, 1, 6, 8, generator=torch.Generator().manual_seed(0))
Y = (X.mean((1, 2, 3)) > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, 2))


@pytest.fixture(scope="module")
def analysis() -> Any:
    """Of `network`, looked at once."""
    gates = Gates(network(), EXAMPLE, rehearse=0)
    gates.detach()
    return gates.analysis


def same(one: Any, other: Any) -> bool:
    leaves = [torch.utils._pytree.tree_leaves(state) for state in (one, other)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*leaves, strict=True))


def test_the_package_imports_none_of_what_takes_long() -> None:
    names = {"lightning", "transformers", "torch._dynamo"}  # the last one takes as long to import as PyTorch
    program = f"import sys, polar_deploy; polar_deploy.Gates; print({names} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def _fit(analysis: Any, *others: Any, resume: str | None = None, mode: str = "batch") -> tuple[Any, Any]:
    """Fit with Lightning, 18 steps of two batches each; module and callback."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from polar_deploy.integrations.lightning import GatesCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    options = {"mode": mode, "freeze_at": 0.5, "rehearse": 0, "analysis": analysis}
    callback = GatesCallback(lambda module, steps: Gates(module.net, EXAMPLE, steps=steps, **options))
    silent = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", accumulate_grad_batches=2, callbacks=[callback, *others], **silent
    )
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=4), ckpt_path=resume)
    return module, callback


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.filterwarnings("ignore")
def test_lightning_steps_with_the_optimizer_and_goes_on_from_a_checkpoint(
    analysis: Any, tmp_path: Path, mode: str
) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Save(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    torch.manual_seed(3)
    whole, callback = _fit(analysis, Save(), mode=mode)
    gates = callback.gates
    assert gates.schedule.steps == gates.state_dict()["step"] == 18
    assert gates.phase == "frozen"
    assert gates.promise()["macs"] <= 0.5 * gates.full["macs"]
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)["callbacks"]["GatesCallback"]
    assert (saved["step"], saved["phase"]) == (6, "learning")

    again, resumed = _fit(analysis, mode=mode, resume=str(tmp_path / "0.ckpt"))
    assert same(resumed.gates.state_dict(), gates.state_dict())
    assert same(again.state_dict(), whole.state_dict())


class Classifier(nn.Module):
    """As the `Trainer` of Hugging Face wants it: a loss comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _train(analysis: Any, folder: Path, *, resume: bool | str = False, mode: str = "batch") -> tuple[Any, Any]:
    """Train with Hugging Face, 18 steps of two batches each, a checkpoint after six; model and callback."""
    import transformers

    from polar_deploy.integrations.transformers import GatesCallback

    class GatedTrainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
            loss = loss + callback.loss()
            return (loss, outputs) if return_outputs else loss

    options = {"mode": mode, "freeze_at": 0.5, "rehearse": 0, "analysis": analysis}
    callback = GatesCallback(lambda model, steps: Gates(model.net, EXAMPLE, steps=steps, **options))
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=6,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1000, seed=5, optim="sgd", learning_rate=0.05,
    )  # fmt: skip
    model, data = Classifier(), [{"x": x, "labels": int(y)} for x, y in zip(X, Y, strict=True)]
    GatedTrainer(model, arguments, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)
    return model, callback


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_steps_with_the_optimizer_and_goes_on_from_a_checkpoint(
    analysis: Any, tmp_path: Path, mode: str
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(3)
    whole, callback = _train(analysis, tmp_path, mode=mode)
    gates = callback.gates
    assert gates.schedule.steps == gates.state_dict()["step"] == 18
    assert gates.phase == "frozen"
    assert gates.promise()["macs"] <= 0.5 * gates.full["macs"]
    saved = torch.load(tmp_path / "checkpoint-6" / "polar_deploy_gates.pt", weights_only=True)
    assert (saved["step"], saved["phase"]) == (6, "learning")

    again, resumed = _train(analysis, tmp_path, mode=mode, resume=str(tmp_path / "checkpoint-6"))
    assert same(resumed.gates.state_dict(), gates.state_dict())
    assert same(again.state_dict(), whole.state_dict())

    (tmp_path / "checkpoint-6" / "polar_deploy_gates.pt").unlink()
    with pytest.raises(ContentError, match=r"holds no polar_deploy_gates\.pt"):
        _train(analysis, tmp_path, mode=mode, resume=str(tmp_path / "checkpoint-6"))
