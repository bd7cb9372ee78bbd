"""Where gates are placed, on networks of every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from polar_deploy import models
from polar_deploy.errors import UsageError
from polar_deploy.gating.graph import trace
from polar_deploy.gating.network import GatedNetwork
from polar_deploy.gating.sites import find_sites
from tests.tiny import net


def _sites(model: nn.Module, size: int = 64, *, blocks: bool = True) -> dict[str, tuple[str, int]]:
    return {site.name: (site.kind, site.width) for site in find_sites(trace(model, size), blocks=blocks)}


def test_cifar_resnet_gates_inner_activations_and_blocks_with_identity_shortcuts() -> None:
    sites = _sites(models.build("resnet20", 10, 32), 32)
    expected = {f"layer{s}.{b}.relu1": ("channel", 8 * 2**s) for s in (1, 2, 3) for b in range(3)}
    # Option A pads channels where the stream widens: layer2.0 and layer3.0 cannot be dropped.
    expected |= {f"layer{s}.{b}.add": ("block", 8 * 2**s) for s in (1, 2, 3) for b in range(3) if s == 1 or b > 0}
    assert sites == expected


def test_bottlenecks_have_two_inner_sites_and_blocks_with_projections_count() -> None:
    sites = _sites(get_model("resnet50", weights=None))
    assert sites["layer1.0.relu"] == ("channel", 64)
    assert sites["layer1.0.relu#2"] == ("channel", 64)
    assert "layer1.0.relu#3" not in sites  # behind the add: the residual stream
    assert sites["layer1.0.add"] == ("block", 256)
    assert sum(kind == "block" for kind, _ in sites.values()) == 16


def test_blocks_can_be_left_out() -> None:
    assert {kind for kind, _ in _sites(models.build("resnet20", 10, 32), 32, blocks=False).values()} == {"channel"}


def test_of_two_activations_around_a_depthwise_convolution_the_last_is_gated() -> None:
    sites = _sites(get_model("mobilenet_v2", weights=None))
    assert "features.2.conv.1.2" in sites  # behind the depthwise convolution
    assert "features.2.conv.0.2" not in sites  # before it


def test_squeeze_excite_branches_have_no_gates() -> None:
    sites = _sites(get_model("mobilenet_v3_small", weights=None))
    assert sites
    assert not any(".fc" in name or "avgpool" in name or ".activation" in name for name in sites)


@pytest.mark.parametrize(
    ("name", "channels", "blocks"),
    [("vgg11_bn", 10, 0), ("densenet121", 58, 0), ("squeezenet1_1", 25, 0), ("resnext50_32x4d", 1, 16)],
)
def test_other_families(name: str, channels: int, blocks: int) -> None:
    kinds = [kind for kind, _ in _sites(get_model(name, weights=None)).values()]
    assert (kinds.count("channel"), kinds.count("block")) == (channels, blocks)


class _Shared(nn.Module):
    """One convolution called twice, one activation behind an unknown operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv(x))
        x = self.relu(torch.roll(self.conv(x), 1, dims=1))
        return self.linear(x.mean((2, 3)))


def test_walls_get_no_gate() -> None:
    with pytest.raises(UsageError, match="no place for a gate"):
        GatedNetwork(_Shared(), 16)


class _Mode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.conv(x), training=self.training)


class _Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(("model", "message"), [(_Mode(), "differs between training"), (_Values(), "cannot be traced")])
def test_untraceable_models_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trace(model, 16)


def test_tracing_leaves_the_mode_of_the_model() -> None:
    model = net(10).train()
    trace(model, 16)
    assert all(layer.training for layer in model.modules())


class _Viewed(nn.Module):
    """`x.view(x.size(0), -1)`: how most hand-written networks flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.linear = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(torch.relu(self.a(x))).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.linear(x.view(x.size(0), -1))


def test_networks_that_flatten_with_view_and_size() -> None:
    network = GatedNetwork(_Viewed(), 8)
    assert network.cost_model().full == 36 * 27 * 6 + 16 * 9 * 6 * 5 + 5 * 4
    assert [site.width for site in network.sites] == [6, 5]
