"""Segmentation: a U-Net for pictures of one channel that are not square, in a loop of one's own.

It has skips that are concatenated, and both kinds of up-sampling. Run it, in seconds and without data:

    python examples/unet_one_channel.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polar_deploy import Gates

STEPS = 24


def double(before: int, after: int) -> nn.Sequential:
    """Two convolutions with their norms."""
    first = (nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
    second = (nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
    return nn.Sequential(*first, *second)


class UNet(nn.Module):
    """From [B, 1, H, W] to two classes a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = double(1, 8), double(8, 16), double(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Upsample(scale_factor=2)
        self.merge2, self.merge1, self.head = double(32, 16), double(24, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, 2, H, W]."""
        one = self.down1(x)
        two = self.down2(self.pool(one))
        y = self.up2(self.middle(self.pool(two)))
        y = self.up1(self.merge2(torch.cat([y, two], 1)))
        scores: Tensor = self.head(self.merge1(torch.cat([y, one], 1)))
        return scores


def main() -> tuple[Gates, nn.Module]:
    """Train, cut, compare."""
    torch.manual_seed(0)
    model = UNet()
    gates = Gates(model, torch.zeros(1, 1, 48, 64), budget=0.5, steps=STEPS)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(STEPS):
        pictures = torch.randn(4, 1, 48, 64)
        loss = nn.functional.cross_entropy(model(pictures), (pictures[:, 0] > 0).long()) + gates.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step()

    small = gates.cut()
    with torch.no_grad():
        off = float((small.eval()(pictures) - model.eval()(pictures)).abs().max())
    print(f"MACs: {gates.full['macs']:,}, of which 0.5 may stay; {gates.promise()['macs']:,} do")
    print(f"the small network differs from the gated one by {off:.1e}")
    return gates, small


if __name__ == "__main__":
    main()
