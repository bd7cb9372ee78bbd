"""Gates on heads of attention: found, priced, taken out of the graph and, where its modules let it, of the network."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from polar_deploy import Gates
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.surgery import compress_file

WIDTH, HEADS, SIZE = 32, 4, 8
X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """Attention whose queries, keys and values come out of one layer, as timm writes it."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, SIZE, heads * SIZE
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * self.inner), nn.Linear(self.inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        split = self.qkv(x).reshape(samples, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(self.mixed(*split.unbind(0)).transpose(1, 2).reshape(samples, tokens, self.inner))

    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(queries, keys, values)


class Written(Fused):
    """The products written out."""

    def mixed(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return (queries @ keys.transpose(2, 3) * self.head_dim**-0.5).softmax(-1) @ values


class Apart(nn.Module):
    """A layer each for queries, keys and values, as Hugging Face writes it."""

    def __init__(self, heads: int = HEADS) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, SIZE, heads * SIZE
        self.query, self.key, self.value = (nn.Linear(WIDTH, self.all_head_size) for _ in range(3))
        self.proj = nn.Linear(self.all_head_size, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_attention_heads, self.attention_head_size)
        three = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = scaled_dot_product_attention(*three).transpose(1, 2)
        return self.proj(mixed.reshape(*x.shape[:2], self.all_head_size))


class Counted(Fused):
    """The number of heads is written into its forward."""

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        split = self.qkv(x).reshape(samples, tokens, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        return self.proj(self.mixed(*split.unbind(0)).transpose(1, 2).reshape(samples, tokens, width))


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.head = attention, nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(self.norm(x))).mean(1))


def gated(attention: nn.Module) -> tuple[Net, Gates]:
    torch.manual_seed(0)
    network = Net(attention).eval()
    return network, Gates(network, X[:1], budget="macs=0.9", steps=10, heads=True)


def close(gates: Gates, *heads: int) -> None:
    opened = np.ones(len(gates.opened), bool)
    opened[list(heads)] = False
    gates.freeze(opened)


def without(network: Net, *closed: int) -> Tensor:
    """What the network gives if nothing of these heads reaches the layer behind: computed by hand."""
    copied = copy.deepcopy(network)
    for head in closed:
        copied.attention.proj.weight.data[:, head * SIZE : (head + 1) * SIZE] = 0
    return copied(X)


@pytest.mark.parametrize("kind", [Fused, Written, Apart])
def test_a_closed_head_goes_from_graph_and_module(kind: type[nn.Module], tmp_path: Path) -> None:
    network, gates = gated(kind())
    (site,) = gates.sites
    assert (site.width, gates.ungated.keys()) == (HEADS, {"embed", "attention.proj", "head"})
    expected = without(network, 1, 3)
    close(gates, 1, 3)
    tokens, left = X.shape[1], 2 * SIZE
    macs = tokens * WIDTH * (WIDTH + 4 * left) + 2 * left * tokens**2 + WIDTH * 5
    weights = (WIDTH + 1) * WIDTH + 4 * WIDTH * left + 3 * left + WIDTH + 2 * WIDTH + (WIDTH + 1) * 5
    scales = gates.promise()["params"] - weights  # of scores: so many constants as the exporter writes
    assert gates.promise()["macs"] == macs
    assert 0 <= scales <= 2

    small = gates.cut()
    assert small.attention.proj.weight.shape == (WIDTH, left)
    assert next(value for name, value in vars(small.attention).items() if name.startswith("num_")) == 2
    gates.export(tmp_path / "gated.onnx")
    report = compress_file(tmp_path / "gated.onnx", tmp_path / "small.onnx")
    assert report["macs"][1] == macs
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        for given in (network(X), small(X), torch.from_numpy(made)):
            torch.testing.assert_close(given, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_head_that_its_forward_counts_goes_from_the_graph_alone(tmp_path: Path) -> None:
    _, gates = gated(Counted())
    close(gates, 0)
    with pytest.raises(ContentError, match=r"Net cannot be cut as a module: .*in attention"):
        gates.cut()
    gates.export(tmp_path / "gated.onnx")
    compress_file(tmp_path / "gated.onnx", tmp_path / "small.onnx")
    left = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert (WIDTH, 3 * 3 * SIZE) in left


def test_heads_have_gates_where_they_are_asked_for() -> None:
    network = Net(Fused()).eval()
    with pytest.raises(UsageError, match="budget"):  # nothing but the whole branch could go
        Gates(network, X[:1], budget="macs=0.1")
    gates = Gates(network, X[:1], budget="macs=0.5")
    assert [site.name for site in gates.sites] == []
    assert [block.name for block in gates.blocks] == ["attention.proj:out"]
