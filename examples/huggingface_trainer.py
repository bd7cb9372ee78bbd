"""Hugging Face: gates as a callback of the `Trainer`, on a network of its library.

Their state goes into the trainer's checkpoints. Run it, in seconds and without data:

    python examples/huggingface_trainer.py
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from polar_deploy import Gates
from polar_deploy.integrations.transformers import GatesCallback


def main() -> tuple[Gates, nn.Module]:
    """Train, cut, compare."""
    torch.manual_seed(0)
    pictures = torch.rand(256, 1, 32, 48)
    label = torch.stack([third.mean((1, 2, 3)) for third in pictures.chunk(3, 3)], 1).argmax(1)
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pictures, label, strict=True)]
    widths = {"embedding_size": 12, "hidden_sizes": [12, 24], "depths": [2, 2]}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, layer_type="basic", **widths))
    example = {"pixel_values": pictures[:1]}
    callback = GatesCallback(lambda model, steps: Gates(model, example, budget=0.5, steps=steps))
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=32,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()

    gates = callback.gates
    assert gates is not None
    small = gates.cut()
    with torch.no_grad():
        off = float((small.eval()(pictures).logits - model.eval()(pictures).logits).abs().max())
    print(f"MACs: {gates.full['macs']:,}, of which 0.5 may stay; {gates.promise()['macs']:,} do")
    print(f"the small network differs from the gated one by {off:.1e}")
    return gates, small


if __name__ == "__main__":
    main()
