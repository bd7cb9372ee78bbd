"""The gated network: the plain one while its gates are off, a static sub-network once they are frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polar_deploy.config import Gates
from polar_deploy.gating.cost import Constraint
from polar_deploy.gating.gate import Gate, Phase
from polar_deploy.gating.losses import find_price, polarization, steering
from polar_deploy.gating.network import GATES, GatedNetwork, gate_key
from tests.tiny import net


def _network(*, mode: str = "batch", seed: int = 0) -> tuple[nn.Module, GatedNetwork]:
    torch.manual_seed(seed)
    model = net(10)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # so that a closed channel would be seen if BatchNorm came behind it
            nn.init.uniform_(layer.bias, 0.2, 1.0)
    return model, GatedNetwork(model, 16, mode=mode)


def _images(batch: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def _half_open(network: GatedNetwork, seed: int = 0) -> Tensor:
    return (torch.rand(network.masks, generator=torch.Generator().manual_seed(seed)) > 0.5).float()


@pytest.mark.parametrize("training", [True, False])
def test_with_gates_off_the_output_is_that_of_the_plain_model_to_the_bit(training: bool) -> None:
    plain, _ = _network()
    _, network = _network()
    plain.train(training)
    network.train(training)
    assert torch.equal(network(_images()), plain(_images()))


def test_parameters_and_buffers_keep_their_names_and_are_shared() -> None:
    model, network = _network()
    own = {name: tensor for name, tensor in network.net.state_dict().items() if not name.startswith(f"{GATES}.")}
    expected = model.state_dict()
    assert own.keys() == expected.keys()
    assert all(own[name].data_ptr() == expected[name].data_ptr() for name in expected)


def test_every_parameter_belongs_to_the_network_or_to_the_gates() -> None:
    model, network = _network()
    weights, gates = network.network_parameters(), network.gate_parameters()
    assert {id(p) for p in weights} == {id(p) for p in model.parameters()}
    assert {id(p) for p in weights + gates} == {id(p) for p in network.parameters()}
    assert len(weights) + len(gates) == len(list(network.parameters()))


def test_blocks_can_go_without_gates() -> None:
    network = GatedNetwork(net(10), 16, blocks=False)
    assert [site.kind for site in network.sites] == ["channel"] * 3
    assert network.masks == 48


@pytest.mark.parametrize("phase", ["learning", "frozen"])
def test_a_forward_pass_is_deterministic(phase: Phase) -> None:
    outputs = []
    for _ in range(2):
        _, network = _network()
        network.freeze(_half_open(network))
        network.set_phase(phase)
        outputs.append(network(_images()))
    assert torch.equal(*outputs)


def test_the_phase_and_the_temperature_reach_every_gate() -> None:
    _, network = _network()
    network.set_phase("learning")
    network.set_temperature(0.7)
    assert {(gate.phase, gate.temperature) for gate in network.gates} == {("learning", 0.7)}


def test_a_closed_block_is_bypassed() -> None:
    model, network = _network()
    network.eval()
    gates = torch.ones(network.masks)
    closed = next(i for site, i in zip(network.sites, network.starts, strict=True) if site.name == "block2.add")
    gates[closed] = 0
    network.freeze(gates)
    x = model.block1(model.stem(_images()))
    x = model.block3(torch.relu(model.block2.shortcut(x)))
    expected = model.linear(model.pool(x).flatten(1))
    torch.testing.assert_close(network(_images()), expected, rtol=0, atol=0)


def test_a_closed_channel_is_as_good_as_a_removed_one() -> None:
    model, network = _network()
    network.eval()
    gates = torch.ones(network.masks)
    gates[:16] = _half_open(network)[:16]
    network.freeze(gates)
    given = network(_images())
    with torch.no_grad():
        model.block1.conv2.weight[:, gates[:16] == 0] = 0  # the column that reads a closed channel
        network.set_phase("off")
        torch.testing.assert_close(given, network(_images()))


def test_the_static_copy_computes_what_the_frozen_network_does() -> None:
    _, network = _network()
    network.freeze(_half_open(network))
    static = network.static().eval()
    network.eval()
    assert torch.equal(static(_images()), network(_images()))
    masks = {name: mask for name, mask in static.named_buffers() if name.endswith(".mask")}
    for site, start in zip(network.sites, network.starts, strict=True):
        gates = network.open()[start : start + site.gates]
        mask = masks[f"{GATES}.{gate_key(site)}.mask"]
        assert torch.equal(mask, gates.expand(site.width).reshape(1, site.width, 1, 1))
    assert not any(isinstance(layer, Gate) for layer in static.modules())


def test_the_state_of_all_gates_is_one_vector_in_the_order_of_the_sites() -> None:
    _, network = _network()
    gates = _half_open(network)
    network.freeze(gates)
    assert torch.equal(network.open(), gates)
    assert network.masks == 51
    assert [len(gate.open) for gate in network.gates] == [16, 1] * 3


def test_the_most_useful_quarter_of_each_layer_and_no_block_is_protected() -> None:
    _, network = _network()
    utility = torch.rand(51, generator=torch.Generator().manual_seed(3))
    protected = network.floor(utility, 0.25).reshape(3, 17)
    for row, worth in zip(protected, utility.reshape(3, 17), strict=True):
        best = set(sorted(range(16), key=lambda channel: -worth[channel].item())[:4])
        assert set(row.nonzero().flatten().tolist()) == best
    assert network.floor(utility, 0.0).sum() == 3  # one channel a layer at least


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_the_gates_loss_is_polarization_and_steering_at_the_price_of_the_target(mode: str) -> None:
    _, network = _network(mode=mode)
    constraint = Constraint({"macs": network.cost_model()}, {"macs": 0.5})
    settings = Gates(polarization=3.0, steering=0.7)
    for gate, site in zip(network.gates, network.sites, strict=True):
        nn.init.normal_(gate.logit.weight, std=1.0 if site.kind == "channel" else 0.1)
    network.set_phase("learning")
    network(_images()).square().mean().backward()  # gives the utilities
    network(_images())
    loss = network.gate_loss(constraint, 0.3, settings)

    logits = torch.cat([gate.logits for gate in network.gates], dim=1)
    share = (logits > 0).float().mean(0)
    torch.testing.assert_close(network.share(), share)
    assert torch.equal(network.open(), (share >= 0.5).float())
    utility, marginal = network.utility().double(), constraint.marginal(network.open())
    protected = network.floor(utility, settings.min_width)
    price = find_price(constraint, utility, marginal, protected, 0.3)
    expected = 3.0 * polarization(share) + 0.7 * steering(logits, utility, price, marginal, protected)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    network.zero_grad()
    loss.backward()
    assert all(parameter.grad is None for parameter in network.network_parameters())
    assert any(gate.logit.bias.grad.abs().sum() > 0 for gate in network.gates)


class _Reused(nn.Module):
    """One activation module behind two convolutions, and two activations that would share a gate's name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x))))).mean((2, 3))


def test_an_activation_used_twice_has_two_gates() -> None:
    network = GatedNetwork(_Reused(), 8)
    assert [(site.name, site.width) for site in network.sites] == [("act", 6), ("act#2", 5)]
    gates = _half_open(network)
    network.freeze(gates)
    model, x = network.traced.module, _images()[:, :, :8, :8]
    x = torch.relu(model.get_submodule("a")(x)) * gates[:6, None, None]
    x = torch.relu(model.get_submodule("b")(x)) * gates[6:, None, None]
    torch.testing.assert_close(network(_images()[:, :, :8, :8]), model.get_submodule("c")(x).mean((2, 3)))


class _Mixed(nn.Module):
    """On 8 x 8 pixels: a convolution in groups, a Concat, squeeze-excite, a Flatten, sums that broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1, groups=2)
        self.a, self.b = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 4, 1)
        self.c, self.squeeze, self.d = nn.Conv2d(9, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 7, 1)
        self.scale = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.linear = nn.Linear(7 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x)) * self.scale + 1
        x = torch.cat([torch.relu(self.a(x)), nn.functional.relu(self.b(x))], dim=1)
        x = self.c(x).relu()
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        mean = self.scale.mean((1, 2, 3)).reshape(1, -1).sum()
        return self.linear(self.d(x).relu().reshape(-1, 7 * 64)) + mean


def test_the_cost_of_groups_concat_squeeze_excite_and_flatten() -> None:
    network = GatedNetwork(_Mixed(), 8)
    model = network.cost_model()
    assert [(site.name, site.width) for site in network.sites] == [
        ("relu", 5),
        ("relu#2", 4),
        ("relu#3", 8),
        ("relu#4", 7),
    ]
    grouped = 64 * 9 * 3 * 6  # half of the channels each
    assert model.full == 64 * 9 * 3 * 6 + grouped + 64 * (6 * 5 + 6 * 4 + 9 * 8 + 8 * 7) + 8 * 8 + 7 * 64 * 10
    saved = []
    for start in network.starts:
        gates = torch.ones(network.masks)
        gates[start] = 0
        saved.append(model.full - model.absolute(gates))
    # A row of a or b and a column of c; a row of c, a row and a column of the attention and a column of d; a row of d
    # and 64 columns of the linear layer.
    attention = 8 * 8 - 7 * 7
    assert saved == [64 * 6 + 64 * 8, 64 * 6 + 64 * 8, 64 * 9 + attention + 64 * 7, 64 * 8 + 64 * 10]


def test_a_static_copy_leaves_the_network_as_it_was() -> None:
    network = GatedNetwork(net(10), 16)
    network.freeze(torch.ones(network.masks))
    network.eval()
    images = torch.randn(4, 3, 16, 16)
    before = network(images)
    network.static()
    assert not any(layer.training for layer in network.modules())
    assert torch.equal(network(images), before)
