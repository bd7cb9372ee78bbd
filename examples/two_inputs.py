"""Two named inputs, two named outputs: a picture and a few numbers go in, a class and a value come out.

The inputs of the network are given as a dictionary, the layers of the second head get no gate. Run it, in seconds and
without data:

    python examples/two_inputs.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polar_deploy import Gates

STEPS = 30


class TwoInputs(nn.Module):
    """A small convolutional network and a small multi-layer perceptron that are brought together."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.numbers = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.label = nn.Linear(40, 4)
        self.value = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, picture: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        """Scores [B, 4] and values [B, 1]."""
        both = torch.cat([self.picture(picture), self.numbers(numbers)], 1)
        return {"label": self.label(both), "value": self.value(both)}


def main() -> tuple[Gates, nn.Module]:
    """Train, cut, compare."""
    torch.manual_seed(0)
    model = TwoInputs()
    example = {"picture": torch.zeros(1, 3, 16, 24), "numbers": torch.zeros(1, 5)}
    gates = Gates(model, example, budget=0.5, steps=STEPS, align=1, ignore=["value.*"])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(STEPS):
        given = {"picture": torch.randn(16, 3, 16, 24), "numbers": torch.randn(16, 5)}
        label, value = given["numbers"][:, :4].argmax(1), given["picture"].mean((1, 2, 3))
        made = model(**given)
        loss = nn.functional.cross_entropy(made["label"], label) + (made["value"][:, 0] - value).square().mean()
        optimizer.zero_grad()
        (loss + gates.loss()).backward()
        optimizer.step()
        gates.step()

    small = gates.cut()
    with torch.no_grad():
        ours, gated = small.eval()(**given), model.eval()(**given)
    off = max(float((ours[name] - gated[name]).abs().max()) for name in gated)
    print(f"MACs: {gates.full['macs']:,}, of which 0.5 may stay; {gates.promise()['macs']:,} do")
    print(f"the small network differs from the gated one by {off:.1e}")
    return gates, small


if __name__ == "__main__":
    main()
