"""What recurrent layers and products of two inputs cost: a budget is a share of what a network truly computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polar_deploy.export import Example
from polar_deploy.gating.analysis import analyse

STEPS = 7
SEQUENCE = torch.zeros(2, STEPS, 6)
EMBED = STEPS * 6 * 16 + 16 * 4  # MACs of the layers around, see `Sequence`


class Sequence(nn.Module):
    """A layer on a sequence between two linear ones."""

    def __init__(self, cells: nn.Module, width: int) -> None:
        super().__init__()
        self.embed, self.wide, self.cells = nn.Linear(6, 16), nn.Linear(width, 16), cells
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.cells(torch.relu(self.embed(x)))
        return self.head(torch.relu(self.wide((made[0] if isinstance(made, tuple) else made).mean(1))))


class Attention(nn.Module):
    """Attention by einsum: every projection has a weight [channels, heads, dimensions]."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(16, 2, 8)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (torch.einsum("blc,chd->bhld", x, w) for w in (self.query, self.key, self.value))
        weights = torch.einsum("bhld,bhmd->bhlm", query, key).softmax(-1)
        return torch.einsum("bhlm,bhmd,hdc->blc", weights, value, self.out)


class Pair(nn.Module):
    """Both inputs of a bilinear layer are one."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Bilinear(16, 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x, x)


def cells(kind: Callable[..., nn.Module], **how: Any) -> nn.Module:
    return kind(16, 12, batch_first=True, **how)


# By hand, at batch 1: a step of a cell multiplies its input and its state by a matrix a gate; an LSTM has four gates, a
# GRU three. What PyTorch's own counter knows is asked of it, too.
CASES: dict[str, tuple[Callable[[], nn.Module], int, int, bool]] = {
    "LSTM": (lambda: cells(nn.LSTM), 12, STEPS * 4 * 12 * (16 + 12), False),
    "GRU": (lambda: cells(nn.GRU), 12, STEPS * 3 * 12 * (16 + 12), True),
    "RNN": (lambda: cells(nn.RNN), 12, STEPS * 12 * (16 + 12), True),
    "two layers in both directions": (
        *(lambda: cells(nn.LSTM, num_layers=2, bidirectional=True), 24),
        *(STEPS * 2 * 4 * 12 * (16 + 12 + 24 + 12), False),
    ),
    # projections, scores, what they weigh, and the last projection
    "einsum": (Attention, 16, 4 * STEPS * 16 * 16 + 2 * 2 * STEPS * STEPS * 8, True),
    "bilinear": (Pair, 5, STEPS * (16 * 16 * 5 + 16 * 5), False),  # the first input by the weight, then by the other
}


@pytest.mark.parametrize("case", CASES)
def test_macs_are_those_of_the_formula(case: str) -> None:
    build, width, macs, is_known = CASES[case]
    torch.manual_seed(0)
    network = Sequence(build(), width).eval()
    expected = EMBED + width * 16 + macs
    if is_known:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(SEQUENCE[:1])
        assert counter.get_total_flops() == 2 * expected
    costs = analyse(network, Example.of(SEQUENCE)).choices
    assert costs.costs["macs"].full == expected
    assert costs.measure(torch.ones(costs.gates, dtype=torch.bool).numpy())["macs"] == expected
