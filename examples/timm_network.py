"""A network of timm's, with a copy whose weights are averaged while it is trained.

The average is what is deployed: it gets the masks with `sync`, and its weights go back into the model. Run it, in
seconds and without data:

    python examples/timm_network.py
"""

from __future__ import annotations

import timm
import torch
from timm.utils import ModelEmaV2
from torch import nn

from polar_deploy import Gates

STEPS = 16


def main() -> tuple[Gates, nn.Module]:
    """Train, cut, compare."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3, in_chans=1)
    gates = Gates(model, torch.zeros(1, 1, 32, 48), budget=0.5, steps=STEPS, ignore=["classifier"])
    average = ModelEmaV2(model, decay=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(STEPS):
        pictures = torch.rand(16, 1, 32, 48)
        label = torch.stack([third.mean((1, 2, 3)) for third in pictures.chunk(3, 3)], 1).argmax(1)
        loss = nn.functional.cross_entropy(model(pictures), label) + gates.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step()
        average.update(model)
        gates.sync(average.module)

    model.load_state_dict(average.module.state_dict())
    small = gates.cut()
    with torch.no_grad():
        off = float((small.eval()(pictures) - average.module.eval()(pictures)).abs().max())
    print(f"MACs: {gates.full['macs']:,}, of which 0.5 may stay; {gates.promise()['macs']:,} do")
    print(f"the small network differs from the averaged, gated one by {off:.1e}")
    return gates, small


if __name__ == "__main__":
    main()
