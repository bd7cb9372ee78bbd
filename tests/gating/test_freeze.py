"""The freeze: which widths a layer may take, and the knapsack against every choice there is on a small network."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from polar_deploy.errors import UsageError
from polar_deploy.gating.cost import WINDOW, Constraint
from polar_deploy.gating.freeze import Knapsack, alignment_of, smallest, unreachable, widths
from polar_deploy.gating.network import GatedNetwork
from tests.tiny import layer_macs, net

PARAMS = (27 * 12 + 12) + (9 * 24 * 16 + 16 + 12) + (9 * 36 * 16 + 16 + 24 + 12 * 24) + (9 * 48 * 16 + 16 + 24) + 250


@pytest.fixture(scope="module")
def tiny() -> GatedNetwork:
    return GatedNetwork(net(10), 16)


def _constraint(tiny: GatedNetwork, **asked: float) -> Constraint:
    return Constraint({name: tiny.cost_model(name) for name in asked}, asked)


def _solve(
    tiny: GatedNetwork, utility: Tensor, state: Tensor, *, align: int = 1, min_width: float = 0.25, **asked: float
) -> Tensor:
    constraint = _constraint(tiny, **asked)
    return Knapsack(tiny.sites, constraint, utility, state, align=align, min_width=min_width).solve()


def _kept(gates: Tensor) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Inner widths and blocks of the tiny network's gate vector: 16 channels, one block, three times."""
    parts = gates.reshape(3, 17)
    inner, blocks = parts[:, :16].sum(1).int().tolist(), parts[:, 16].bool().tolist()
    return (inner[0], inner[1], inner[2]), (blocks[0], blocks[1], blocks[2])


def _share(gates: Tensor) -> float:
    return layer_macs(*_kept(gates)) / layer_macs()


def _params_share(gates: Tensor) -> float:
    (a, b, c), blocks = _kept(gates)
    total = (27 * 12 + 12) + 12 * 24 + 250  # the stem, block2's shortcut, the head
    total += blocks[0] * (9 * 24 * a + a + 12) + blocks[1] * (9 * 36 * b + b + 24) + blocks[2] * (9 * 48 * c + c + 24)
    return total / PARAMS


def _random(seed: int) -> tuple[Tensor, Tensor, float]:
    """A utility [51], a state [51] with a third of the gates closed, a budget."""
    generator = torch.Generator().manual_seed(seed)
    utility = torch.rand(51, generator=generator) ** 4
    state = (torch.rand(51, generator=generator) > 0.3).float()
    return utility, state, 0.3 + 0.6 * torch.rand(1, generator=generator).item()


def _all_shares(align: int, min_width: float) -> list[float]:
    """MACs of every reachable network."""
    inner = itertools.product(widths(16, align, min_width), repeat=3)
    states = itertools.product(inner, itertools.product((False, True), repeat=3))
    return [layer_macs(*state) / layer_macs() for state in states]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "align", "step"),
    [
        (16, 8, 8),
        (12, 8, 1),  # narrower than 16: of 16, 8 and 1 only 1 is at most 6
        (15, 8, 1),
        (64, 32, 32),
        (63, 32, 16),
        (32, 32, 16),
        (31, 32, 8),
        (16, 32, 8),
        (12, 32, 1),
        (100, 1, 1),
        (1, 1, 1),
        (1, 8, 1),
        (10, 4, 4),
        (7, 4, 1),
    ],
)
def test_narrow_layers_have_a_finer_alignment(width: int, align: int, step: int) -> None:
    assert alignment_of(width, align) == step


@pytest.mark.parametrize(
    ("width", "align", "min_width", "expected"),
    [
        (16, 8, 0.25, [8, 16]),
        (64, 8, 0.25, [16, 24, 32, 40, 48, 56, 64]),
        (64, 8, 0.3, [24, 32, 40, 48, 56, 64]),
        (64, 32, 0.0, [32, 64]),
        (6, 1, 0.5, [3, 4, 5, 6]),
        (6, 1, 0.0, [1, 2, 3, 4, 5, 6]),
        (20, 8, 0.25, [8, 16, 20]),  # its own width stays allowed
        (20, 8, 0.9, [20]),
        (16, 8, 1.0, [16]),
        (1, 8, 0.0, [1]),
    ],
)
def test_widths(width: int, align: int, min_width: float, expected: list[int]) -> None:
    assert widths(width, align, min_width) == expected


@pytest.mark.parametrize(("align", "min_width"), [(1, 0.25), (1, 0.0), (4, 0.25), (8, 0.25)])
@pytest.mark.parametrize("seed", range(4))
def test_any_start_ends_in_an_allowed_network_within_the_budget(
    tiny: GatedNetwork, align: int, min_width: float, seed: int
) -> None:
    utility, state, asked = _random(seed)
    gates = _solve(tiny, utility, state, align=align, min_width=min_width, macs=asked)
    assert set(gates.tolist()) <= {0.0, 1.0}
    assert set(_kept(gates)[0]) <= set(widths(16, align, min_width))
    assert _share(gates) <= asked


@pytest.mark.parametrize("start", ["open", "random"])
@pytest.mark.parametrize("seed", range(1, 7))
def test_without_block_gates_the_budget_is_used_up(seed: int, start: str) -> None:
    utility, state, asked = _random(seed)
    network = GatedNetwork(net(10), 16, blocks=False)
    channels = (torch.arange(51) % 17 < 16).nonzero().flatten()
    state = (torch.ones(51) if start == "open" else state)[channels]
    kept = torch.ones(51)
    kept[channels] = _solve(network, utility[channels], state, macs=asked).float()
    reachable = (layer_macs(inner) / layer_macs() for inner in itertools.product(range(4, 17), repeat=3))
    assert any(asked - WINDOW <= share <= asked for share in reachable)  # type: ignore[arg-type]
    assert asked - WINDOW <= _share(kept) <= asked


def test_a_state_that_meets_the_budget_is_kept(tiny: GatedNetwork) -> None:
    utility, state, _ = _random(0)
    state[:17] = torch.tensor([1.0] * 9 + [0] * 7 + [1])
    assert torch.equal(_solve(tiny, utility, state, macs=_share(state)).float(), state)


def test_room_in_the_budget_is_filled_without_closing_anything(tiny: GatedNetwork) -> None:
    utility, _, _ = _random(1)
    state = torch.ones(51)
    state[:8] = state[20:30] = 0
    gates = _solve(tiny, utility, state, macs=_share(state) + 0.1)
    assert (gates >= state).all()
    assert _share(state) + 0.1 - WINDOW <= _share(gates) <= _share(state) + 0.1


def test_the_channels_that_stay_are_the_open_ones_and_of_those_the_most_useful(tiny: GatedNetwork) -> None:
    utility, state, _ = _random(2)
    state[16], state[33], state[50] = 1, 1, 1
    gates = _solve(tiny, utility, state, macs=0.4)
    for start in (0, 17, 34):
        here = slice(start, start + 16)
        order = sorted(range(16), key=lambda channel: (-state[here][channel].item(), -utility[here][channel].item()))
        width = int(gates[here].sum())
        assert sorted(gates[here].nonzero().flatten().tolist()) == sorted(order[:width])


def test_what_is_worth_least_for_its_cost_goes_first(tiny: GatedNetwork) -> None:
    utility = torch.ones(51)
    utility[:17] = 0  # block1 with all its channels, half of all MACs
    gates = _solve(tiny, utility, torch.ones(51), macs=0.5)
    assert gates[16] == 0
    assert (gates[17:] == 1).all()


def test_a_block_is_worth_what_its_channels_are(tiny: GatedNetwork) -> None:
    utility = torch.ones(51)
    utility[16] = 0  # block1's own gate says that it is useless, its channels say otherwise
    utility[0] = 0.1
    gates = _solve(tiny, utility, torch.ones(51), macs=layer_macs((15, 16, 16)) / layer_macs() + 1e-9)
    assert torch.equal(gates, torch.ones(51).double().index_fill(0, torch.tensor(0), 0))


@pytest.mark.parametrize("asked", [{"macs": 0.5, "params": 0.6}, {"macs": 0.7, "params": 0.4}])
def test_every_budget_is_met_and_the_tightest_used_up(tiny: GatedNetwork, asked: dict[str, float]) -> None:
    utility = _random(3)[0].index_fill(0, torch.tensor([16, 33, 50]), 100.0)  # blocks stay
    gates = _solve(tiny, utility, torch.ones(51), **asked)
    slack = {"macs": asked["macs"] - _share(gates), "params": asked["params"] - _params_share(gates)}
    assert 0 <= min(slack.values()) <= WINDOW


def test_budgets_that_no_single_step_lowers_are_still_met(tiny: GatedNetwork) -> None:
    """Two costs that are equally high and depend on different layers: closing either alone does not help."""
    costs = {"macs": lambda gates: gates[:16].mean(), "params": lambda gates: gates[34:50].mean()}
    constraint = Constraint(costs, {"macs": 0.5, "params": 0.5})  # type: ignore[arg-type]
    solved = Knapsack(tiny.sites, constraint, torch.ones(51), torch.ones(51), align=1, min_width=0.25).solve()
    assert float(constraint(solved)) <= 0
    assert _kept(solved)[0][0] == 8


@pytest.mark.parametrize(("align", "min_width"), [(1, 0.25), (8, 0.0)])
def test_a_budget_below_the_least_is_refused_and_the_advice_holds(
    tiny: GatedNetwork, align: int, min_width: float
) -> None:
    least = min(_all_shares(align, min_width))
    with pytest.raises(UsageError) as caught:
        _solve(tiny, torch.ones(51), torch.ones(51), align=align, min_width=min_width, macs=least - 0.001)
    assert f"budget macs={least - 0.001} cannot be reached" in caught.value.what
    assert f"{least:.3f} of the full network's macs is left" in caught.value.what
    advice = re.search(r"at least macs=([\d.]+)", caught.value.todo)
    assert advice is not None
    _solve(tiny, torch.ones(51), torch.ones(51), align=align, min_width=min_width, macs=float(advice[1]))


def test_the_budget_furthest_out_of_reach_is_named(tiny: GatedNetwork) -> None:
    state = smallest(tiny.sites, 1, 0.25)
    error = unreachable(_constraint(tiny, macs=0.05, params=0.001), state)
    assert "budget params=0.001" in error.what or "budget macs=0.05" in error.what
    shares = {"macs": _share(state) - 0.05, "params": _params_share(state) - 0.001}
    assert f"budget {max(shares, key=shares.__getitem__)}=" in error.what


def test_the_smallest_state_has_the_least_cost_of_all(tiny: GatedNetwork) -> None:
    for align, min_width, inner in ((1, 0.25, 4), (8, 0.25, 8), (1, 0.0, 1)):
        state = smallest(tiny.sites, align, min_width)
        assert _kept(state) == ((inner,) * 3, (False,) * 3)
        assert _share(state) == pytest.approx(min(_all_shares(align, min_width)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("start", ["open", "random"])
def test_the_budget_is_used_up_where_any_network_does(tiny: GatedNetwork, seed: int, start: str) -> None:
    utility, state, asked = _random(seed)
    assert any(asked - WINDOW <= share <= asked for share in _all_shares(1, 0.25))
    gates = _solve(tiny, utility, torch.ones(51) if start == "open" else state, macs=asked)
    assert asked - WINDOW <= _share(gates) <= asked
