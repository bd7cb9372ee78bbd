"""Branches that end in a module that gives back several things: PyTorch's attention and its recurrent layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from polar_deploy import Gates
from polar_deploy.surgery import compress_file

X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """Something between two linear layers, [samples, tokens, 16]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(12, 16), inner, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)).mean(1))


class Branch(nn.Module):
    """The first thing that a module gives back is added to what it reads; another branch follows."""

    def __init__(self, branch: nn.Module, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.branch, self.read = nn.LayerNorm(16), branch, read
        self.hidden, self.back = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.read(self.branch, self.norm(x))
        return x + self.back(torch.relu(self.hidden(x)))


class Pair(NamedTuple):
    shifted: Tensor
    scores: Tensor


class Named(nn.Module):
    """Gives back a named tuple, of which one field is read."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scores = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Pair:
        return Pair(nn.functional.linear(x, self.weight), self.scores(x))


def alone(attention: nn.Module, x: Tensor) -> Tensor:
    return attention(x, x, x, need_weights=False)[0]


def with_weights(attention: nn.Module, x: Tensor) -> Tensor:
    return attention(x, x, x)[0]


def by_keywords(attention: nn.Module, x: Tensor) -> Tensor:
    return attention(query=x, key=x, value=x)[0]


def to_others(attention: nn.Module, x: Tensor) -> Tensor:
    return attention(x, x[:, :3], x[:, :3], need_weights=False)[0]


def first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def shifted(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).shifted


def attending(read: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return Branch(nn.MultiheadAttention(16, 2, batch_first=True), read)


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


# the network inside, the block that is closed, and how many Softmax are left
CASES: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "attention": (lambda: attending(alone), "branch", 0),
    "attention with weights": (lambda: attending(with_weights), "branch", 0),
    "attention by keywords": (lambda: attending(by_keywords), "branch", 0),
    "attention to other tokens": (lambda: attending(to_others), "branch", 0),
    "a recurrent layer": (lambda: Branch(nn.LSTM(16, 16, batch_first=True), first), "branch", 0),
    "a named tuple": (lambda: Branch(Named(), shifted), "branch", 0),
    "an encoder": (lambda: encoder(norm_first=False), "layers.0.self_attn", 1),
    "an encoder, norms first": (lambda: encoder(norm_first=True), "layers.0.self_attn", 1),
    "an encoder's other branch": (lambda: encoder(norm_first=True), "layers.1.linear2", 2),
}


class Nothing(nn.Module):
    """Calls a module, and gives back zeros in the place of its first tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.module(*args, **kwargs)
        if isinstance(made, Tensor):
            return torch.zeros_like(made)
        values = [torch.zeros_like(made[0]), *made[1:]]
        return type(made)(*values) if hasattr(made, "_fields") else tuple(values)

    def __getattr__(self, name: str) -> Any:  # encoder layers look at what is in their layers
        return super().__getattr__(name) if name == "module" else getattr(self.module, name)


@pytest.fixture(params=CASES)
def closed(request: pytest.FixtureRequest) -> tuple[nn.Module, Gates, str, int]:
    """A network with all gates open but that of one branch."""
    build, path, softmaxes = CASES[request.param]
    torch.manual_seed(0)
    network = Around(build()).eval()
    gates = Gates(network, X, "macs=0.9", 10, rehearse=2)
    (block,) = (block for block in gates.blocks if block.name == f"inner.{path}:out")
    opened = np.ones(len(gates.opened), bool)
    opened[block.gate] = False
    gates.freeze(opened)
    return network, gates, f"inner.{path}", softmaxes


def test_a_closed_branch_is_gone_from_module_and_graph(
    closed: tuple[nn.Module, Gates, str, int], tmp_path: Path
) -> None:
    network, gates, path, softmaxes = closed
    small = gates.cut()
    gates.export(tmp_path / "gated.onnx")
    gates.detach()
    without = copy.deepcopy(network)
    without.set_submodule(path, Nothing(without.get_submodule(path)))
    for module in without.modules():  # with a hook, an encoder layer calls its layers
        module.register_forward_hook(lambda *_: None)
    x = torch.randn(5, 7, 12)
    with torch.no_grad():
        wanted = without(x)
        assert not torch.allclose(wanted, network(x), atol=1e-3)
        torch.testing.assert_close(small(x), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(small(x[:, :4]), without(x[:, :4]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small(x).detach(), wanted, rtol=1e-5, atol=1e-6)  # an encoder goes another way then
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in network.parameters())
    torch.save(small, tmp_path / "small.pt")
    loaded = torch.load(tmp_path / "small.pt", weights_only=False)
    torch.testing.assert_close(loaded(x).detach(), wanted, rtol=1e-5, atol=1e-6)
    compress_file(tmp_path / "gated.onnx", tmp_path / "small.onnx")
    graph = onnx.load(tmp_path / "small.onnx").graph
    assert sum(node.op_type == "Softmax" for node in graph.node) == softmaxes
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_gates_learn_behind_attention() -> None:
    torch.manual_seed(0)
    network = Around(CASES["attention"][0]()).train()
    gates = Gates(network, X, "macs=0.6", 12)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(12):
        loss = network(X).square().mean() + gates.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step()
    assert gates.cost()["macs"] <= 0.6
    small = gates.cut().eval()
    with torch.no_grad():
        torch.testing.assert_close(small(X), network.eval()(X), rtol=1e-5, atol=1e-6)
