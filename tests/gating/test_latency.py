"""The latency of a gated network from a table, and the knapsack under it against every choice there is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polar_deploy.errors import ContentError, UsageError
from polar_deploy.gating.cost import WINDOW, Constraint
from polar_deploy.gating.freeze import Knapsack, smallest
from polar_deploy.gating.latency import LatencyModel
from polar_deploy.gating.network import GatedNetwork
from polar_deploy.latency import Entry, LatencyTable
from tests.tiny import net

# What the three inner layers of the tiny network save by width, in ms; their blocks save BLOCKS in all, of 10 ms.
SMOOTH = {4: 1.5, 8: 1.0, 12: 0.5, 16: 0.0}
CLIFF = {4: 1.5, 8: 0.0, 12: 0.0, 16: 0.0}  # as where a device pads to multiples
STEPS = {4: 1.5, 8: 1.4, 12: 0.2, 16: 0.0}
BLOCKS = (2.0, 2.5, 3.0)


@pytest.fixture(scope="module")
def tiny() -> GatedNetwork:
    return GatedNetwork(net(10), 16)


def _table(*curves: Mapping[int, float], overlaps: tuple[tuple[int, int, float], ...] = ()) -> LatencyTable:
    sites = []
    for index, (curve, block) in enumerate(zip(curves, BLOCKS, strict=True)):
        name, width = f"block{index + 1}", (12, 24, 24)[index]
        inner = Entry(f"{name}.relu1", "channel", 16, tuple(curve), tuple(curve.values()), (2 * index + 1,))
        sites += [inner, Entry(f"{name}.add", "block", width, (0, 1), (block, 0.0), ())]
    return LatencyTable("ort-fp32", 1, 10.0, tuple(sites), overlaps)


def _gates(inner: tuple[int, ...], blocks: tuple[bool, ...]) -> Tensor:
    parts = [torch.cat([torch.arange(16) < n, torch.tensor([b])]) for n, b in zip(inner, blocks, strict=True)]
    return torch.cat(parts).double()


def _opened(gates: Tensor) -> dict[str, int]:
    counts = gates.reshape(3, 17)
    return {
        f"block{row + 1}.{name}": int(value)
        for row in range(3)
        for name, value in (("relu1", counts[row, :16].sum()), ("add", counts[row, 16]))
    }


def _solve(
    tiny: GatedNetwork, table: LatencyTable, utility: Tensor, state: Tensor, align: int = 4, **asked: float
) -> Tensor:
    constraint = tiny.constraint(asked, table)
    return Knapsack(tiny.sites, constraint, utility, state, align=align, min_width=0.25).solve()


OVERLAPS = ((0, 2, 0.4), (2, 5, 0.1))  # the first two layers meet; the second one and the last block


@pytest.mark.parametrize("overlaps", [(), OVERLAPS])
def test_value_is_the_tables(tiny: GatedNetwork, overlaps: tuple[tuple[int, int, float], ...]) -> None:
    table = _table(SMOOTH, CLIFF, STEPS, overlaps=overlaps)
    model, generator = LatencyModel(table, tiny.sites), torch.Generator().manual_seed(0)
    states = [(torch.rand(51, generator=generator) > p).double() for p in torch.rand(50, generator=generator)]
    states += [_gates((4, 8, 12), (True, True, True)), _gates((4, 4, 4), (False, True, False)), torch.ones(51)]
    expected = torch.tensor([table.predicted_ms(_opened(state)) / 10 for state in states], dtype=torch.float64)
    for state, share in zip(states, expected, strict=True):
        assert float(model(state)) == pytest.approx(float(share))
    assert torch.allclose(model(torch.stack(states)), expected)  # many at once


def test_a_table_in_another_order_gives_the_same(tiny: GatedNetwork) -> None:
    table = _table(SMOOTH, CLIFF, STEPS, overlaps=OVERLAPS)
    place = {old: new for new, old in enumerate(reversed(range(6)))}
    turned = replace(
        table,
        sites=tuple(replace(s, within=tuple(place[b] for b in s.within)) for s in reversed(table.sites)),
        overlaps=tuple((place[s], place[t], k) for s, t, k in table.overlaps),
    )
    for state in (_gates((4, 8, 12), (True, False, True)), _gates((8, 4, 4), (True, True, True))):
        one, other = (LatencyModel(each, tiny.sites)(state) for each in (table, turned))
        assert float(one) == pytest.approx(float(other))


def test_gradient_sees_beyond_flat_stretches(tiny: GatedNetwork) -> None:
    """A channel of a layer that saves nothing before it has 4 left is worth a twelfth of what it then saves."""
    constraint = tiny.constraint({"latency": 0.5}, _table(SMOOTH, CLIFF, STEPS))
    marginal = constraint.marginal(torch.ones(51))
    assert marginal[:16].tolist() == pytest.approx([0.5 / 4 / 10 / 0.5] * 16)
    assert marginal[17:33].tolist() == pytest.approx([1.5 / 12 / 10 / 0.5] * 16)
    assert marginal[34:50].tolist() == pytest.approx([1.4 / 8 / 10 / 0.5] * 16)  # the hull skips 12
    assert marginal[[16, 33, 50]].tolist() == pytest.approx([block / 10 / 0.5 for block in BLOCKS])


def test_nothing_is_gained_inside_a_closed_block(tiny: GatedNetwork) -> None:
    constraint = tiny.constraint({"latency": 0.5}, _table(SMOOTH, CLIFF, STEPS, overlaps=OVERLAPS))
    gates = _gates((16, 16, 8), (False, True, False))
    assert constraint.resting(gates).tolist() == [True] * 16 + [False] * 18 + [True] * 16 + [False]
    assert constraint.marginal(gates)[:16].tolist() == [0.0] * 16
    assert float(constraint.marginal(gates)[50]) == pytest.approx((3.0 - 1.4) / 5)  # opens at the width it has inside


def test_soft_gates_are_differentiable(tiny: GatedNetwork) -> None:
    model = LatencyModel(_table(SMOOTH, SMOOTH, SMOOTH, overlaps=OVERLAPS), tiny.sites)  # its own hull
    generator = torch.Generator().manual_seed(0)
    gates = (0.3 + 0.6 * torch.rand(51, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(model, (gates,))


def test_changes_are_exact(tiny: GatedNetwork) -> None:
    """Of costs that are linear in a site's gates and of those that are not."""
    table = _table(STEPS, CLIFF, SMOOTH, overlaps=OVERLAPS)
    constraint = tiny.constraint({"macs": 0.5, "latency": 0.7}, table)
    gates = _gates((12, 8, 16), (True, True, False))
    groups = [torch.arange(4), torch.arange(12), torch.arange(17, 21), torch.tensor([33])]
    excess, changes = constraint.changes(gates, groups, -1)
    for column, group in enumerate(groups):
        closed = gates.clone()
        closed[group] = 0
        for row, name in enumerate(("macs", "latency")):
            share = float(constraint.models[name](closed))
            asked = constraint.asked[name]
            assert float(excess[row] + changes[row, column]) == pytest.approx((share - asked) / (1 - asked))


@pytest.mark.parametrize("curves", [(SMOOTH,) * 3, (CLIFF,) * 3, (STEPS, CLIFF, SMOOTH)])
@pytest.mark.parametrize("seed", range(6))
def test_choice_is_near_the_best_there_is(
    tiny: GatedNetwork, curves: tuple[Mapping[int, float], ...], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    utility, state = torch.rand(51, generator=generator).double(), torch.ones(51)
    utility[[16, 33, 50]] = 0  # a block is worth what it holds
    asked, table = 0.5 + 0.4 * torch.rand(1, generator=generator).item(), _table(*curves, overlaps=OVERLAPS)
    order = [torch.argsort(part[:16], descending=True) for part in utility.reshape(3, 17)]
    worth, slack = [], []
    for inner in itertools.product((4, 8, 12, 16), repeat=3):
        for blocks in itertools.product((False, True), repeat=3):
            share = table.predicted_ms(_opened(_gates(inner, blocks))) / 10
            if share <= asked:
                kept = [utility[17 * i + order[i][: inner[i]]].sum() for i in range(3) if blocks[i]]
                worth.append(float(sum(kept)))
                slack.append(asked - share)
    solved = _solve(tiny, table, utility, state, latency=asked)
    share = table.predicted_ms(_opened(solved)) / 10
    parts = (solved * utility).reshape(3, 17)
    kept = float(sum(part.sum() for part, gates in zip(parts, solved.reshape(3, 17), strict=True) if gates[16]))
    assert share <= asked
    assert kept >= 0.75 * max(worth)
    assert asked - share <= min(slack) + 2 * WINDOW


def test_a_cliff_is_jumped(tiny: GatedNetwork) -> None:
    """Closing one group saves nothing; closing three saves what is asked for."""
    utility = torch.ones(51).double()
    utility[[16, 33, 50]] = 1000  # no block shall go
    solved = _solve(tiny, _table(CLIFF, CLIFF, CLIFF), utility, torch.ones(51), latency=0.855)
    widths = sorted(_opened(solved)[f"block{i}.relu1"] for i in (1, 2, 3))
    assert widths == [4, 16, 16]


def test_what_costs_nothing_is_opened(tiny: GatedNetwork) -> None:
    state = _gates((8, 12, 4), (True, True, True))
    asked = 0.85  # what the last layer at width 4 leaves
    solved = _solve(tiny, _table(CLIFF, CLIFF, CLIFF), torch.rand(51).double(), state, latency=asked)
    assert _opened(solved) == {"block1.relu1": 16, "block1.add": 1, "block2.relu1": 16, "block2.add": 1} | {
        "block3.relu1": 4,
        "block3.add": 1,
    }


def test_two_budgets_hold_together(tiny: GatedNetwork) -> None:
    table, asked = _table(STEPS, CLIFF, SMOOTH), {"macs": 0.6, "latency": 0.7}
    for seed in range(3):
        utility = torch.rand(51, generator=torch.Generator().manual_seed(seed)).double()
        solved = _solve(tiny, table, utility, torch.ones(51), align=1, **asked)
        shares = tiny.constraint(asked, table).achieved(solved)
        assert shares["macs"] <= 0.6
        assert shares["latency"] == pytest.approx(table.predicted_ms(_opened(solved)) / 10)
        assert shares["latency"] <= 0.7


def test_a_budget_out_of_reach_is_refused(tiny: GatedNetwork) -> None:
    table = _table(SMOOTH, SMOOTH, SMOOTH)
    assert float(tiny.constraint({"latency": 0.5}, table).models["latency"](smallest(tiny.sites, 8, 0.25))) == 0.25
    with pytest.raises(UsageError, match=r"budget latency=0.2 cannot be reached.* 0.250 of the full network's latency"):
        _solve(tiny, table, torch.ones(51), torch.ones(51), latency=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sites: sites[1:], "'block1.relu1' is a channel site of width 16, the table has none there"),
        (lambda sites: (replace(sites[0], width=24), *sites[1:]), "the table has a channel site of width 24 there"),
        (lambda sites: (*sites, replace(sites[0], name="more")), "it has a site 'more', the network has none there"),
    ],
)
def test_a_table_of_another_network_is_refused(tiny: GatedNetwork, change, message: str) -> None:  # type: ignore[no-untyped-def]
    table = _table(SMOOTH, SMOOTH, SMOOTH)
    with pytest.raises(ContentError, match=message):
        LatencyModel(replace(table, sites=change(table.sites)), tiny.sites)


def test_constraint_tells_whether_it_is_linear(tiny: GatedNetwork) -> None:
    table = _table(SMOOTH, SMOOTH, SMOOTH)
    assert tiny.constraint({"macs": 0.5, "params": 0.5}).linear
    assert not tiny.constraint({"macs": 0.5, "latency": 0.5}, table).linear
    assert isinstance(tiny.constraint({"macs": 0.5}), Constraint)
