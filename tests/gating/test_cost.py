"""The cost polynomial, against numbers worked out by hand and against other people's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.ops import SqueezeExcitation

from polar_deploy import models
from polar_deploy.export import export
from polar_deploy.gating.cost import Constraint
from polar_deploy.gating.network import GatedNetwork
from polar_deploy.surgery import compress, cost
from tests.tiny import layer_macs, net


@pytest.fixture(scope="module")
def tiny() -> GatedNetwork:
    return GatedNetwork(net(10), 16)


def _gates(network: GatedNetwork, inner: tuple[int, int, int], blocks: tuple[bool, bool, bool]) -> torch.Tensor:
    gates = torch.zeros(network.masks)
    for site, start in zip(network.sites, network.starts, strict=True):
        block = int(site.name.removeprefix("block")[0]) - 1
        gates[start : start + (inner[block] if site.kind == "channel" else blocks[block])] = 1
    return gates


@pytest.mark.parametrize("name_macs", [("resnet20", 40.55e6), ("resnet56", 125.49e6), ("resnet110", 252.89e6)])
def test_cifar_resnets_cost_what_the_literature_says(name_macs: tuple[str, float]) -> None:
    name, macs = name_macs
    model = GatedNetwork(models.build(name, 10, 32), 32).cost_model("macs")
    assert model.full == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize(("name", "gmacs", "params"), [("resnet18", 1.814, 11.68e6), ("mobilenet_v2", 0.3008, 3.49e6)])
def test_torchvision_networks_cost_what_torchvision_says(name: str, gmacs: float, params: float) -> None:
    network = GatedNetwork(get_model(name, weights=None), 224)
    assert network.cost_model("macs").full == pytest.approx(gmacs * 1e9, rel=2e-3)
    assert network.cost_model("params").full == pytest.approx(params, rel=2e-3)  # BatchNorms folded


@pytest.mark.parametrize(
    ("inner", "blocks"),
    [
        ((16, 16, 16), (True, True, True)),
        ((5, 16, 16), (True, True, True)),
        ((5, 7, 9), (True, True, True)),
        ((5, 7, 9), (False, True, True)),
        ((16, 16, 16), (False, False, False)),
    ],
)
def test_cost_is_that_of_the_smaller_network(
    tiny: GatedNetwork, inner: tuple[int, int, int], blocks: tuple[bool, bool, bool]
) -> None:
    assert tiny.cost_model("macs").absolute(_gates(tiny, inner, blocks)) == layer_macs(inner, blocks)


def test_params_count_weights_and_folded_biases(tiny: GatedNetwork) -> None:
    stem = 27 * 12 + 12
    block1 = 9 * 12 * 5 + 5 + 9 * 5 * 12 + 12
    block2 = 9 * 12 * 7 + 7 + 9 * 7 * 24 + 24 + 12 * 24
    head = 24 * 10 + 10
    gates = _gates(tiny, (5, 7, 9), (True, True, False))
    assert tiny.cost_model("params").absolute(gates) == stem + block1 + block2 + head


def test_slopes_are_exact_differences(tiny: GatedNetwork) -> None:
    asked = {"macs": 0.5, "params": 0.7}
    constraint = Constraint({name: tiny.cost_model(name) for name in asked}, asked)
    gates = (torch.rand(tiny.masks, generator=torch.Generator().manual_seed(0)) > 0.3).double()
    excess, slopes = constraint.slopes(gates)
    for gate in range(0, tiny.masks, 5):
        flipped = gates.clone()
        flipped[gate] = 1 - gates[gate]
        sign = 1 - 2 * gates[gate]
        for row, name in enumerate(asked):
            cost = float(constraint.models[name](flipped))
            assert float(excess[row] + sign * slopes[row, gate]) == pytest.approx(
                (cost - asked[name]) / (1 - asked[name])
            )


def test_excess_is_one_when_full_and_zero_at_the_budget(tiny: GatedNetwork) -> None:
    constraint = Constraint({"macs": tiny.cost_model("macs")}, {"macs": 0.5})
    assert float(constraint(torch.ones(tiny.masks))) == pytest.approx(1.0)
    gates = _gates(tiny, (8, 8, 7), (True, True, True))
    assert float(constraint(gates)) == pytest.approx((layer_macs((8, 8, 7)) / layer_macs() - 0.5) / 0.5)


def test_depthwise_concat_and_shared_readers() -> None:
    """mobilenet_v2's expansion, depthwise and projection shrink together; a closed gate removes all three rows."""
    network = GatedNetwork(get_model("mobilenet_v2", weights=None), 32)
    model = network.cost_model("macs")
    site, start = next(
        (s, o) for s, o in zip(network.sites, network.starts, strict=True) if s.name == "features.2.conv.1.2"
    )
    gates = torch.ones(network.masks)
    gates[start] = 0
    # features.2: 16 -> 96 expanded at 16 x 16, depthwise with stride 2 to 8 x 8, projected to 24
    assert site.width == 96
    assert model.full - model.absolute(gates) == 16 * 256 + 9 * 64 + 24 * 64


class _SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.squeeze, self.head = SqueezeExcitation(8, 4), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.squeeze(self.act(self.stem(x)))).mean((2, 3))


def test_the_cost_of_squeeze_excite_is_what_surgery_leaves(tmp_path: Path) -> None:
    network = GatedNetwork(_SqueezeExcite(), 16)
    gates = (torch.arange(8) % 2 == 0).float()
    network.freeze(gates)
    model = export(network.static(), 16, tmp_path / "m.onnx", network.sites)
    assert network.cost_model().absolute(gates) == 14 * 14 * (27 * 4 + 4 * 6) + 4 * 4 + 4 * 4
    assert network.cost_model().absolute(gates) == cost(compress(model).model).macs
