"""Every layer with weights has a gate, or is named with the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polar_deploy.export import Example
from polar_deploy.gating.analysis import analyse

PICTURES, TOKENS, WORDS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 16), torch.zeros(2, 7, dtype=torch.long)
OUTPUT = "its channels are an output of the network"
COMPUTED = "both of its factors are computed, and their channels are not those of attention heads"
INSIDE = "its input is computed inside of the module that it belongs to"
OUTSIDE = "it is computed under torch.no_grad, or outside of any module that could carry a mask"
HEAD = {"head": OUTPUT}


class Attending(nn.Module):
    """PyTorch's attention behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class ByHand(nn.Module):
    """Attention as people write it, with a table of positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 5, 16))
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x + self.places)
        split = [each(x).unflatten(2, (2, 8)).transpose(1, 2) for each in (self.query, self.key, self.value)]
        weights = (split[0] @ split[1].transpose(2, 3)).softmax(-1)
        return self.head(self.out((weights @ split[2]).transpose(1, 2).flatten(2)).mean(1))


class Recurring(nn.Module):
    """Convolutions that feed a recurrent layer."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 16, 3), nn.Conv1d(16, 16, 3)
        self.cells, self.head = kind(16, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x.flatten(2)))))
        return self.head(self.cells(x.transpose(1, 2))[0].mean(1))


class Auxiliary(nn.Module):
    """A head for training alone, a depthwise convolution in front, a weight without a module, one in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.conv, self.aux = nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 16, 1), nn.Linear(16, 4)
        self.filters, self.head = nn.Parameter(torch.randn(16, 16, 1, 1)), nn.Linear(16, 4)
        self.wide, self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight, self.back = self.one.weight, nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(nn.functional.conv2d(torch.relu(self.conv(self.depthwise(x))), self.filters)).mean((2, 3))
        x = self.back(torch.relu(self.two(torch.relu(self.one(torch.relu(self.wide(x)))))))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Frozen(nn.Module):
    """The first part is computed without gradients: nobody would learn what its gates are worth."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


class Words(nn.Module):
    """A table, and a layer that reads nothing but it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.table(words).mean(1))))


def reads(kind: str, name: str) -> str:
    return f"{kind} {name} reads it, where no mask can be put"


def fed(kind: str) -> dict[str, str]:
    return {"second": reads(kind, "cells"), "cells": f"{kind} cells: units that stay read its units at the next step"}


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, str], set[str]]] = {
    "attention": (Attending, PICTURES, {"conv": reads("MatMul", "attention"), "attention": INSIDE}, {"attention"}),
    "attention by hand": (
        *(ByHand, TOKENS),
        {
            "places": "its channels are those of an input of the network, one by one",
            **dict.fromkeys(("query", "key"), f"MatMul node_matmul: {COMPUTED}"),
            "value": f"MatMul node_matmul_1: {COMPUTED}",
        },
        {"out"},
    ),
    "LSTM": (lambda: Recurring(nn.LSTM), torch.zeros(2, 3, 9), fed("LSTM"), {"first"}),
    "GRU": (lambda: Recurring(nn.GRU), torch.zeros(2, 3, 9), fed("GRU"), {"first"}),
    "all sorts": (
        *(Auxiliary, PICTURES),
        {
            "depthwise": "its channels are those of an input of the network, one by one",
            "conv": reads("Conv", "filters"),
            "filters": OUTSIDE,
            "aux": "nothing uses it in evaluation mode, with these example inputs",
        },
        {"filters", "wide", "back"},
    ),
    "no gradients": (Frozen, PICTURES, {"first": OUTSIDE, "second": OUTSIDE}, {"second", "hidden"}),
    "a table": (Words, WORDS, {}, {"table", "hidden"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_has_a_gate_or_is_named(case: str) -> None:
    build, example, expected, gated = CASES[case]
    torch.manual_seed(0)
    found = analyse(build().eval(), Example.of(example))
    assert found.ungated == HEAD | expected
    assert {site.name for site in found.choices.sites} == gated


def test_what_can_go_only_with_its_branch_is_said() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = analyse(nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 4)).eval(), Example.of(TOKENS))
    stream = "LayerNormalization 1.norm1: its statistics run over all channels"
    assert found.ungated == {
        "0": stream,
        "1.self_attn": f"{INSIDE}; the branch that it is in can go whole",
        "1.self_attn.out_proj": f"{stream}; the branch that it is in can go whole",
        "1.linear2": f"{stream}; the branch that it is in can go whole",
        "2": OUTPUT,
    }
