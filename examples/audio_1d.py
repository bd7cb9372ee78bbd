"""Audio: convolutions in one dimension with residual branches, under two budgets at once.

The task is to tell which of four tones a noisy signal holds. Run it, in seconds and without data:

    python examples/audio_1d.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polar_deploy import Gates

STEPS, LENGTH = 40, 256


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv1d(width, width, 9, padding=4), nn.BatchNorm1d(width), nn.ReLU())
        self.outer = nn.Conv1d(width, width, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape [B, width, L]."""
        return torch.relu(x + self.outer(self.inner(x)))


def signals(count: int) -> tuple[Tensor, Tensor]:
    """Tones [count, 1, LENGTH] in noise, and which of four each is."""
    tone = torch.randint(4, (count,))
    time = torch.linspace(0, 6.28, LENGTH)
    phase = 6.28 * torch.rand(count, 1)
    wave = torch.sin((4.0 + 4.0 * tone[:, None]) * time + phase)
    return (wave + 0.5 * torch.randn(count, LENGTH))[:, None], tone


def main() -> tuple[Gates, nn.Module]:
    """Train, cut, compare."""
    torch.manual_seed(0)
    stem = (nn.Conv1d(1, 16, 9, stride=4, padding=4), nn.ReLU())
    head = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4))
    model = nn.Sequential(*stem, Residual(16), Residual(16), *head)
    gates = Gates(model, torch.zeros(1, 1, LENGTH), budget="macs=0.5,params=0.6", steps=STEPS)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(STEPS):
        x, y = signals(32)
        loss = nn.functional.cross_entropy(model(x), y) + gates.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step()

    small = gates.cut()
    x, y = signals(256)
    with torch.no_grad():
        ours, gated = small.eval()(x), model.eval()(x)
    print(f"full {gates.full}, budget {gates.budget}, left {gates.promise()}: {gates.cost()}")
    print(f"{float((ours.argmax(1) == y).float().mean()):.0%} of the tones are right")
    print(f"the small network differs from the gated one by {float((ours - gated).abs().max()):.1e}")
    return gates, small


if __name__ == "__main__":
    main()
