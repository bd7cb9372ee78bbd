"""Lightning: gates as a callback; the module knows nothing of them.

Their state goes into the trainer's checkpoints. Run it, in seconds and without data:

    python examples/lightning_loop.py
"""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from polar_deploy import Gates
from polar_deploy.integrations.lightning import GatesCallback


class Classifier(pl.LightningModule):
    """A small network that tells which third of a picture is the brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 4 * 6, 3)),
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        pictures, label = batch
        return nn.functional.cross_entropy(self.net(pictures), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One for all."""
        return torch.optim.Adam(self.parameters(), 3e-3)


def main() -> tuple[Gates, nn.Module]:
    """Train, cut, compare."""
    pl.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pictures = torch.rand(256, 1, 16, 24)
    label = torch.stack([third.mean((1, 2, 3)) for third in pictures.chunk(3, 3)], 1).argmax(1)
    loader = DataLoader(TensorDataset(pictures, label), batch_size=16, shuffle=True)
    module = Classifier()
    callback = GatesCallback(lambda module, steps: Gates(module.net, pictures[:1], budget=0.5, steps=steps, align=4))
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[callback], **silent).fit(module, loader)

    gates = callback.gates
    assert gates is not None
    small = gates.cut()
    with torch.no_grad():
        off = float((small.eval()(pictures) - module.net.eval()(pictures)).abs().max())
    print(f"MACs: {gates.full['macs']:,}, of which 0.5 may stay; {gates.promise()['macs']:,} do")
    print(f"the small network differs from the gated one by {off:.1e}")
    return gates, small


if __name__ == "__main__":
    main()
