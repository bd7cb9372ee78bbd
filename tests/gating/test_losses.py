"""The polarizing loss, the steering loss and the price, against the numbers their formulas promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polar_deploy.gating.cost import Constraint
from polar_deploy.gating.losses import MARGIN, SHARPNESS, find_price, polarization, steering
from polar_deploy.gating.network import GatedNetwork
from tests.tiny import net


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ([0.0, 1.0, 1.0, 0.0], 0.0),
        ([0.5, 0.5], 0.25),
        ([0.5, 1.0], 0.125),
        ([0.1, 0.9, 0.4], (0.09 + 0.09 + 0.24) / 3),
    ],
)
def test_polarization_is_zero_at_consensus_and_a_quarter_at_half(share: list[float], expected: float) -> None:
    assert polarization(torch.tensor(share)).item() == pytest.approx(expected)


def test_polarization_drives_split_gates_apart_and_leaves_the_others() -> None:
    share = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], requires_grad=True)
    polarization(share).backward()
    expected = [0, (1 - 0.4) / 5, 0, (1 - 1.8) / 5, 0]  # d/dm m(1 - m) = 1 - 2m, over the number of gates
    torch.testing.assert_close(share.grad, torch.tensor(expected))


def _steer(
    logit: float, utility: float, *, price: float = 1.0, marginal: float = 1.0, protected: bool = False
) -> tuple[float, float]:
    """Loss of one gate and one sample, and its gradient at the logit."""
    logits = torch.tensor([[logit]], requires_grad=True)
    doubles = [torch.tensor(value, dtype=torch.float64) for value in ([utility], price, [marginal])]
    loss = steering(logits, *doubles, torch.tensor([protected]))
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad.item()


def _drift(utility: float, worth: float) -> float:
    """The quotient in the docstring."""
    u, w = utility**SHARPNESS, worth**SHARPNESS
    return (u - w) / (u + w)


@pytest.mark.parametrize("utility", [0.3, 0.9, 1.1, 2.0])
@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_steering_is_its_formula(logit: float, utility: float) -> None:
    drift = _drift(utility, 0.5 * 2.0)
    loss, gradient = _steer(logit, utility, price=0.5, marginal=2.0)
    left = MARGIN - math.copysign(1, drift) * logit
    assert loss == pytest.approx(abs(drift) * max(0, left))
    assert gradient == pytest.approx(-drift if left > 0 else 0)


def test_gates_worth_more_than_the_price_open_and_the_others_close() -> None:
    assert _steer(0.0, 2.0)[1] < 0  # gradient descent raises the logit
    assert _steer(0.0, 0.5)[1] > 0
    assert _steer(0.0, 1.0)[1] == pytest.approx(0)


def test_the_drift_does_not_depend_on_the_scale_of_the_loss() -> None:
    for scale in (1e-12, 1e9):
        assert _steer(0.0, 0.7 * scale, price=scale) == pytest.approx(_steer(0.0, 0.7))


def test_no_gate_is_pushed_beyond_the_margin() -> None:
    assert _steer(MARGIN + 0.01, 2.0) == (0, 0)
    assert _steer(-MARGIN - 0.01, 0.5) == (0, 0)


def test_protected_gates_open_whatever_they_are_worth() -> None:
    assert _steer(0.0, 0.0, protected=True) == (pytest.approx(MARGIN), pytest.approx(-1))


def test_a_gate_that_nothing_depends_on_rests() -> None:
    assert _steer(0.3, 0.0, marginal=0.0) == (0, 0)
    assert _steer(0.3, 0.0)[1] == pytest.approx(1)  # no use, but a cost: closes at full speed


def test_steering_is_a_mean_over_samples_and_gates() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator)
    utility, marginal = torch.rand(2, 4, generator=generator, dtype=torch.float64) + 0.1
    price = torch.tensor(0.8, dtype=torch.float64)
    each = [
        _steer(logits[sample, gate].item(), utility[gate].item(), price=0.8, marginal=marginal[gate].item())[0]
        for sample in range(3)
        for gate in range(4)
    ]
    loss = steering(logits, utility, price, marginal, torch.zeros(4, dtype=torch.bool))
    assert loss.item() == pytest.approx(sum(each) / 12)


@pytest.fixture(scope="module")
def tiny() -> GatedNetwork:
    return GatedNetwork(net(10), 16)


def _problem(tiny: GatedNetwork, seed: int) -> tuple[Constraint, Tensor, Tensor, Tensor]:
    constraint = Constraint({"macs": tiny.cost_model("macs")}, {"macs": 0.5})
    utility = torch.rand(tiny.masks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    marginal = constraint.marginal(torch.ones(tiny.masks))
    return constraint, utility, marginal, tiny.floor(utility, 0.25)


@pytest.mark.parametrize("target", [0.9, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gates_worth_the_price_meet_the_target_and_one_more_does_not(
    tiny: GatedNetwork, target: float, seed: int
) -> None:
    constraint, utility, marginal, protected = _problem(tiny, seed)
    price = find_price(constraint, utility, marginal, protected, target)
    ratio = utility / marginal
    kept = protected | (ratio > price)
    next_best = torch.where(kept, -torch.inf, ratio).argmax()
    assert float(constraint(kept.double())) <= target
    kept[next_best] = True
    assert float(constraint(kept.double())) > target


def test_where_all_gates_fit_all_are_worth_the_price(tiny: GatedNetwork) -> None:
    constraint, utility, marginal, protected = _problem(tiny, 0)
    price = find_price(constraint, utility, marginal, protected, 1.0)
    assert (utility / marginal > price).all()


def test_where_nothing_fits_none_is_worth_the_price(tiny: GatedNetwork) -> None:
    constraint, utility, marginal, protected = _problem(tiny, 0)
    price = find_price(constraint, utility, marginal, protected, -10.0)
    assert (utility / marginal < price).all()


def test_there_is_no_price_before_anything_is_known(tiny: GatedNetwork) -> None:
    constraint, utility, marginal, protected = _problem(tiny, 0)
    assert find_price(constraint, 0 * utility, marginal, protected, 0.5).item() == 0
