"""Networks on which a second opinion about channels was wrong once: what is promised is what surgery leaves.

Each is counted twice without the code under test: the whole network by PyTorch's own FLOP counter, and what is left of
a random state by ONNX Runtime's graph after surgery.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polar_deploy import Gates
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.export import Example
from polar_deploy.gating.analysis import analyse
from polar_deploy.gating.choice import Limits
from polar_deploy.gating.rehearsal import random_state
from polar_deploy.surgery import compress_file, cost


class TokenBlock(nn.Module):
    """ConvNeXt's block: depthwise, LayerNorm and MLP with the channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.expand, self.act, self.project = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.expand(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        return x + self.project(hidden).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 24, 4, 4), nn.Sequential(TokenBlock(24), TokenBlock(24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def norm_behind_activation() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(after)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def depthwise_between() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)),
        *(nn.Conv2d(16, 24, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Odd(nn.Module):
    """Two convolutions, something odd, a head."""

    def __init__(self, odd: nn.Module, width: int, head: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.odd, self.head = odd, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        if isinstance(self.odd, nn.MultiheadAttention):
            tokens = x.flatten(2).transpose(1, 2)
            return self.head(self.odd(tokens, tokens, tokens, need_weights=False)[0].mean(1))
        return self.head(torch.relu(self.odd(x)).mean((2, 3)))


class ByHand(nn.Module):
    """A head without a module: `x @ w + b`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.w, self.c = nn.Parameter(torch.randn(24, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)) @ self.w + self.c


class Tied(nn.Module):
    """Four convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        for conv in list(self.convs)[1:]:
            conv.weight, conv.bias = self.convs[0].weight, self.convs[0].bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """One convolution called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(3):
            x = torch.relu(self.again(x))
        return self.head(x.mean((2, 3)))


class Aliased(nn.Module):
    """One convolution under two names, called by both, the second one first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.two, self.head = self.one, nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.two(torch.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))


class NormAct(nn.BatchNorm2d):
    """As in timm: a norm with an activation in it, whose forward looks at `training`."""

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or self.running_mean is None
        return torch.relu(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, batch, 0.1, self.eps)
        )


def norm_with_activation() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), NormAct(16), nn.Conv2d(16, 16, 3), NormAct(16)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


class Branches(nn.Module):
    """A sum of branches as in RepVGG: 3x3, 1x1 and a bare norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.last, self.head = nn.Conv2d(16, 24, 3), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norms[0](self.wide(x)) + self.norms[1](self.narrow(x)) + self.norms[2](x))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Shuffled(nn.Module):
    """ShuffleNet's: branches of halves of the channels, which are shuffled, so that layers are of several sites."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 48, 3, padding=1), nn.Linear(48, 10)
        self.branches = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for branch in self.branches:
            kept, read = x.chunk(2, 1)
            x = F.channel_shuffle(torch.cat([kept, torch.relu(branch(read))], 1), 2)
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt's bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.grouped, self.expand = nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.Conv2d(32, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.expand(torch.relu(self.grouped(torch.relu(self.reduce(x))))))
        return self.head(x.mean((2, 3)))


class ScaledShortcut(nn.Module):
    """Residual blocks whose shortcut is multiplied by one number a channel: with the branch gone it would fold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(16, 1, 1)) for _ in range(2))
        self.hidden = nn.ModuleList(nn.Conv2d(16, 24, 3, padding=1) for _ in range(3))
        self.back = nn.ModuleList(nn.Conv2d(24, 16, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, (hidden, back) in enumerate(zip(self.hidden, self.back, strict=True)):
            shortcut = x * self.scales[index] if index < 2 else x
            x = shortcut + back(torch.relu(hidden(x)))
        return self.head(x.mean((2, 3)))


class NormFirst(nn.Module):
    """Norms before the layers, and shortcuts with a layer, as in MaxViT and RegNetV: a norm stands directly behind a
    convolution once a branch, or the other reader of that, is closed; and nobody folds it any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Linear(24, 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (16, 24, 24))
        self.shortcut = nn.Conv2d(16, 24, 1)
        self.first, self.second = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.shortcut(x) + self.first(torch.relu(self.norms[0](x)))
        x = self.norms[1](x)
        x = x + self.second(torch.relu(x))
        return self.head(torch.relu(self.norms[2](x)).mean((2, 3)))


class TokenMixer(nn.Module):
    """ResMLP's: a layer over the tokens, whose result is scaled channel by channel on its way to the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.ones(16))
        self.across, self.hidden, self.back = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.scale * self.across(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.back(F.gelu(self.hidden(x)))
        return self.head(x.mean(1))


class Padded(nn.Module):
    """The shortcut of the first ResNets: channels that the input does not have are zeros, before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(24, 10)
        self.hidden, self.back = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.again, self.last = nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.pad = nn.ConstantPad3d((0, 0, 0, 0, 3, 5), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.back(torch.relu(self.hidden(x))) + self.pad(x))
        return self.head(torch.relu(x + self.last(torch.relu(self.again(x)))).mean((2, 3)))


class ClassToken(nn.Module):
    """Attention of a learned token over the picture's, with a table of relative positions: CaiT and Swin in one.

    While the attention is closed the token is the same for all samples; and the table is smaller than what is read off
    it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token = nn.Conv2d(3, 16, 2, 2), nn.Parameter(torch.randn(1, 1, 16))
        self.table, self.places = nn.Parameter(torch.randn(127, 2)), torch.arange(64) + 63 - torch.arange(64)[:, None]
        self.query, self.pairs, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.norm, self.hidden, self.back = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        bias = self.table[self.places].permute(2, 0, 1)[None]
        token = self.token.expand(x.shape[0], -1, -1)
        token = token + self.out(self.attention(torch.cat([token, x], 1), bias))
        token = token + self.back(F.gelu(self.hidden(self.norm(token))))
        return self.head(token[:, 0])

    def attention(self, x: Tensor, bias: Tensor) -> Tensor:
        query = self.query(x[:, :1]).reshape(-1, 1, 2, 8).transpose(1, 2)
        keys, values = self.pairs(x).reshape(x.shape[0], -1, 2, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = query @ keys.transpose(2, 3)
        weights = torch.cat([weights[..., :1], weights[..., 1:] + bias.mean(2, keepdim=True)], -1).softmax(-1)
        return (weights @ values).transpose(1, 2).reshape(x.shape[0], 1, 16)


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gates on tokens": (Tokens, 32),
    "a norm behind the activation": (norm_behind_activation, 16),
    "a depthwise convolution between activation and norm": (depthwise_between, 16),
    "weights that are standardised": (lambda: Odd(Standardised(16, 64, 3, padding=1), 64), 16),
    "a transposed convolution": (lambda: Odd(nn.ConvTranspose2d(16, 64, 2, 2), 64), 16),
    "attention": (lambda: Odd(nn.MultiheadAttention(16, 2, batch_first=True), 16), 16),
    "a product by hand": (ByHand, 16),
    "tied weights": (Tied, 16),
    "a layer that is called again": (Recurrent, 16),
    "a layer with two names": (Aliased, 16),
    "a norm with an activation in it": (norm_with_activation, 16),
    "a sum of branches": (Branches, 16),
    "groups": (Grouped, 16),
    "a shortcut with factors": (ScaledShortcut, 16),
    "a token of its own": (ClassToken, 16),
    "a shortcut with more channels": (Padded, 16),
    "a norm before the layer": (NormFirst, 16),
    "a factor behind the branch": (TokenMixer, 16),
}


NOT_AS_A_MODULE = {
    "weights that are standardised": "weight is computed with before it is used",
    "a factor behind the branch": "cannot be cut as a module: RuntimeError: The size of tensor",
    "a token of its own": "cannot be cut as a module: RuntimeError: The size of tensor",  # the token is read twice
}


def shaken(network: nn.Module) -> nn.Module:
    """With statistics, scales and biases that are not those of a new network: an exporter drops a bias of zeros."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))
    return network


@cache
def gated(name: str) -> tuple[nn.Module, Gates, Tensor]:
    """A network, its gates and images for it; made once, since looking at a network takes seconds."""
    build, pixels = KINDS[name]
    torch.manual_seed(0)
    network = shaken(build()).eval()
    images = torch.randn(2, 3, pixels, pixels)
    return network, Gates(network, images, budget=0.97, min_width=0.0), images


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Gates, Tensor]:
    return request.param, *gated(request.param)


def test_all_macs_are_counted(kind: tuple[str, nn.Module, Gates, Tensor]) -> None:
    _, network, gates, images = kind
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(images[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert gates.full["macs"] == counter.get_total_flops() / 2


def test_what_is_promised_comes_out(kind: tuple[str, nn.Module, Gates, Tensor], tmp_path: Path) -> None:
    name, network, gates, images = kind
    gates.freeze(random_state(gates.analysis.choices, 5))  # the rehearsal had 0 and 1
    gated, small = tmp_path / "gated.onnx", tmp_path / "small.onnx"
    gates.export(gated)
    compress_file(gated, small)
    left = cost(onnx.load(small))
    assert gates.promise() == {"macs": left.macs, "params": left.params}
    assert left.macs < gates.full["macs"]

    import onnxruntime

    session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = network(images).numpy()
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_the_module_can_be_cut_too(kind: tuple[str, nn.Module, Gates, Tensor]) -> None:
    name, network, gates, images = kind
    gates.freeze(random_state(gates.analysis.choices, 2))
    if name in NOT_AS_A_MODULE:
        with pytest.raises(ContentError, match=NOT_AS_A_MODULE[name]):
            gates.cut()
        return
    small = gates.cut()
    parameters = [sum(p.numel() for p in each.parameters()) for each in (small, network)]
    assert parameters[0] < parameters[1]
    with torch.no_grad():
        torch.testing.assert_close(small(images), network(images), rtol=1e-4, atol=1e-5)
        with FlopCounterMode(display=False) as counter:
            small(images[:1])
    if not any(not gates.opened[block.gate] for block in gates.blocks) and name != "attention":
        assert counter.get_total_flops() / 2 == gates.promise()["macs"]
    with torch.no_grad():  # what it learns can be put back
        for parameter in small.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        learned = small(images)
        assert not torch.allclose(learned, network(images), rtol=1e-2)
        gates.merge(small)
        torch.testing.assert_close(network(images), learned, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="are open"):
        gates.merge(KINDS[name][0]())


def test_a_layer_that_reads_padded_zeros_can_be_cut() -> None:
    """The first block is closed, so that the second one reads zeros where the shortcut pads: it writes there itself."""
    torch.manual_seed(0)
    network, images = shaken(Padded()).eval(), torch.randn(2, 3, 16, 16)
    known = gated("a shortcut with more channels")[1].analysis
    gates = Gates(network, images, budget=0.97, min_width=0.0, rehearse=0, analysis=known)
    opened = np.random.default_rng(0).random(len(gates.opened)) < 0.6
    blocks = {block.name: block.gate for block in gates.blocks}
    assert blocks.keys() == {"back:out", "last:out"}
    opened[blocks["back:out"]], opened[blocks["last:out"]] = False, True
    gates.freeze(opened)
    small = gates.cut()
    assert small.last.weight.shape[0] < 24
    with torch.no_grad():
        torch.testing.assert_close(small(images), network(images), rtol=1e-4, atol=1e-5)
    opened[list(blocks.values())] = False  # the padded channels would be nobody's
    assert (
        all(any(opened[gates.blocks[index].gate] for index in kept) for kept in gates.analysis.choices.alive) is False
    )


def test_gates_are_where_they_should_be() -> None:
    """Hidden units of an MLP and not picture rows; whole groups; what is read by hand has none."""
    found = {}
    for name in ("gates on tokens", "groups", "a product by hand", "tied weights"):
        found[name] = {site.name: (site.kind, site.width, site.size) for site in gated(name)[1].sites}
    assert found == {
        "gates on tokens": {"blocks.0.expand": ("channel", 96, 1), "blocks.1.expand": ("channel", 96, 1)},
        "groups": {"stem": ("stream", 24, 1), "reduce": ("channel", 4, 4)},
        "a product by hand": {"a": ("channel", 16, 1)},
        "tied weights": {"stem": ("channel", 16, 1)},
    }


def test_a_layer_of_several_sites_keeps_a_multiple_of_the_alignment() -> None:
    """Whatever each of the sites keeps."""
    choices = analyse(Shuffled().eval(), Example.of(torch.zeros(2, 3, 8, 8))).choices
    allowed = Limits.of(choices, 8, 0.0).widths
    layers = [layer.macs.factors[0] for layer in choices.layers if len(layer.macs.factors[0].tables) > 1]
    assert layers
    for written in layers:
        own = sorted(written.tables)
        kept = itertools.product(*(allowed[site] for site in own))
        totals = {written.constant + sum(written.tables[s][n] for s, n in zip(own, each, strict=True)) for each in kept}
        assert len(totals) > 1
        assert all(total % 8 == 0 for total in totals), totals


@pytest.mark.parametrize(
    "kind", ["gates on tokens", "groups", "attention", "a transposed convolution", "a product by hand"]
)
def test_what_a_layer_fetches_are_its_weights(kind: str) -> None:
    build, side = KINDS[kind]
    network = build().eval()
    choices = analyse(network, Example.of(torch.zeros(2, 3, side, side))).choices
    widths = tuple(site.width for site in choices.sites)
    fetched = (layer.weights * math.prod(factor(widths) for factor in layer.macs.factors) for layer in choices.layers)
    assert sum(fetched) == sum(weight.numel() for weight in network.parameters() if weight.ndim > 1)
