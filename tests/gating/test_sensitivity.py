"""What the outputs miss where a site is narrower, or a block closed: measured, and what is chosen by it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polar_deploy import Gates
from polar_deploy.export import Example
from polar_deploy.gating.analysis import analyse
from polar_deploy.gating.choice import Limits, choose
from polar_deploy.gating.sensitivity import Call, Sensitivity, measure


class _Residual(nn.Module):
    """A stem, and two residual branches of two layers each; `noise` is a dropout in front of the last layer."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.stem, self.drop, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(noise), nn.Linear(8, 5)
        self.first, self.second = (
            nn.Sequential(
                *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
                *(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.first(x)).relu()
        x = (x + self.second(x)).relu()
        return self.head(self.drop(x.mean((2, 3))))


def _given(model: nn.Module) -> tuple[Gates, Tensor, list[list[int]], np.ndarray]:
    """Gates on a model, a batch, widths to try, and an order in which later channels close first."""
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    gates = Gates(model, x[:2], budget=0.6, steps=10, rehearse=0)
    widths = [[site.width // 4, site.width // 2, site.width] for site in gates.sites]
    return gates, x, widths, -np.arange(float(len(gates.opened)))


def test_an_error_is_what_zeroing_by_hand_gives() -> None:
    torch.manual_seed(0)
    model = _Residual().train()
    by_hand = copy.deepcopy(model)
    gates, x, widths, worth = _given(model)
    found = measure(model, gates.analysis, [Call(Example((x,), {}), None)], widths, worth)
    assert found is not None

    def error(module: str, closed: slice) -> float:
        """With some channels of what a module of the copy gives set to zero."""
        with torch.no_grad():
            whole = by_hand(x)
            handle = by_hand.get_submodule(module).register_forward_hook(
                lambda *given: given[2].index_fill(1, torch.arange(given[2].shape[1])[closed], 0.0)
            )
            less = by_hand(x)
            handle.remove()
        return float(((less - whole) ** 2).sum() / ((whole - whole.mean()) ** 2).sum())

    index = next(i for i, site in enumerate(gates.sites) if site.name == "first.0")
    expected = [error("first.2", slice(4, None)), error("first.2", slice(8, None)), 0.0]
    np.testing.assert_allclose(found.sites[index], expected, rtol=1e-4)
    np.testing.assert_allclose(found.blocks, [error("first.4", slice(None)), error("second.4", slice(None))], rtol=1e-4)


def test_the_model_stays_as_it_is() -> None:
    model = _Residual(0.5).train()
    model.second.eval()
    gates, x, widths, worth = _given(model)
    modes = [module.training for module in model.modules()]
    before, random = copy.deepcopy(dict(model.named_buffers())), torch.get_rng_state()
    assert measure(model, gates.analysis, [Call(Example((x,), {}), None)], widths, worth) is not None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    after = dict(model.named_buffers())
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_channel_that_does_nothing_is_not_missed_whatever_is_random() -> None:
    model = _Residual(0.5).train()
    with torch.no_grad():
        model.first[3].weight[:, 8:] = 0.0  # nothing reads these
    gates, x, widths, worth = _given(model)
    found = measure(model, gates.analysis, [Call(Example((x,), {}), None)], widths, worth)
    assert found is not None
    index = next(i for i, site in enumerate(gates.sites) if site.name == "first.0")
    assert found.sites[index][1] == 0.0
    assert found.sites[index][0] > 0.0


class _Awkward(_Residual):
    def __init__(self, made: Callable[[Tensor, int], Any]) -> None:
        super().__init__()
        self.made, self.calls = made, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.made(super().forward(x), self.calls)


def _no_gradient(y: Tensor, calls: int) -> Tensor:
    if not torch.is_grad_enabled():
        raise RuntimeError("needs gradients\nand more")
    return y


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (_no_gradient, r"cannot be called again \(RuntimeError: needs gradients\): how many channels stay where"),
        (lambda y, calls: y[: calls % 7 + 1], "outputs cannot be compared"),
        (lambda y, calls: y.argmax(1), "outputs cannot be compared"),
        (lambda y, calls: y * math.nan, "outputs cannot be compared"),
    ],
)
def test_what_cannot_be_measured_is_said(made: Callable[[Tensor, int], Any], says: str) -> None:
    x = torch.randn(8, 3, 6, 6)
    analysis = analyse(_Residual(), Example.of(x[:2]))
    model = _Awkward(made)
    gates = Gates(model, x[:2], steps=10, analysis=analysis, rehearse=0)
    calls = [Call(Example((x,), {}), None)]
    with pytest.warns(UserWarning, match=says):
        assert measure(model, analysis, calls, gates._limits.widths, np.ones(len(gates.opened))) is None


def test_outputs_may_be_anything_that_holds_numbers() -> None:
    model = _Awkward(lambda y, calls: {"loss": y.square().mean(), "all": (y, [y[:, 0].long()])})
    x = torch.randn(8, 3, 6, 6)
    analysis = analyse(_Residual(), Example.of(x[:2]))
    gates = Gates(model, x[:2], steps=10, analysis=analysis, rehearse=0)
    calls = [Call(Example((), {"x": x}), None)] * 2
    found = measure(model, analysis, calls, gates._limits.widths, np.ones(len(gates.opened)))
    assert found is not None
    assert (found.blocks > 0).all()


class _Pair(nn.Module):
    """Two layers side by side: `alike` has 16 times the same channel, `apart` 16 weaker ones of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.alike, self.apart = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.of_alike, self.of_apart = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        with torch.no_grad():
            self.alike.weight.copy_(torch.ones(16, 1) * torch.eye(16)[:1])
            self.of_alike.weight.fill_(1 / 16)
            self.apart.weight.copy_(torch.eye(16))
            self.of_apart.weight.copy_(0.6 * torch.eye(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.of_alike(self.alike(x).relu()) + self.of_apart(self.apart(x).relu())


def test_a_loop_closes_what_is_missed_least_and_not_what_gradients_say() -> None:
    """Half of `alike` halves what it gives: an error of 0.25 of its energy, of which gradients tell an eighth."""
    torch.manual_seed(0)
    model = _Pair()
    gates = Gates(
        model, torch.zeros(2, 16), budget=0.75, steps=20, align=8, min_width=0.5, close_from=0.2, freeze_at=0.8
    )
    assert [site.name for site in gates.sites] == ["alike", "apart"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            x = torch.randn(64, 16).abs() * 2
            y = model(x)
            F.mse_loss(y, y.detach() + torch.randn_like(y)).backward()
            gates.step()
    widths = [int(gates.opened[site.gates.start : site.gates.stop].sum()) for site in gates.sites]
    assert widths == [16, 8]
    worth = gates.utility.double().numpy()
    limits = Limits.of(gates.analysis.choices, 8, 0.5)
    added_up = choose(gates.analysis.choices, limits, gates.analysis.choices.costs, {"macs": 0.75}, worth)
    assert [int(added_up[site.gates.start : site.gates.stop].sum()) for site in gates.sites] == [8, 16]


def test_a_block_that_is_hardly_missed_goes_however_much_its_width_is() -> None:
    gates = Gates(_Residual(), torch.zeros(2, 3, 6, 6), budget=0.6, steps=10, rehearse=0)
    choices, limits = gates.analysis.choices, gates._limits
    errors = {"stem": 9.0, "first.0": 4.0, "second.0": 4.0}
    sites = tuple(
        np.linspace(errors[site.name], 0.0, len(allowed))
        for site, allowed in zip(choices.sites, limits.widths, strict=True)
    )
    names = [block.name for block in choices.blocks]
    blocks = np.array([0.01 if "second" in name else 5.0 for name in names])
    expected = np.ones(choices.gates, bool)
    expected[[block.gate for block in choices.blocks if "second" in block.name]] = False
    asked = choices.costs["macs"].share(choices.state(expected)) + 0.004
    worth = np.ones(choices.gates)
    opened = choose(choices, limits, choices.costs, {"macs": asked}, worth, Sensitivity(sites, blocks))
    assert [bool(opened[block.gate]) for block in choices.blocks] == ["second" not in name for name in names]
    assert [int(opened[site.gates.start : site.gates.stop].sum()) for site in choices.sites[:2]] == [8, 16]
