"""Loops of other people: scaled losses, closures, several passes a step, averages, and what samples decide in them.

What a gate is worth is held against its definition, computed here: half the mean square of the samples' own gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from polar_deploy import Gates

STEPS = 20
INPUTS, TARGETS = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def analysis() -> Any:
    return Gates(network(), INPUTS[0], rehearse=0).analysis


def gated(analysis: Any, **how: Any) -> Gates:
    return Gates(network(), INPUTS[0], analysis=analysis, rehearse=0, steps=STEPS, close_from=0.3, freeze_at=0.8, **how)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - TARGETS).square().mean()


def worth(x: Tensor) -> Tensor:
    """Of the 16 gates, all together 1, by the definition."""
    first, _, second = network()
    mask = torch.ones(len(x), 16, requires_grad=True)
    loss = (second(torch.relu(first(x)) * mask) - TARGETS).square().mean()
    (gradient,) = torch.autograd.grad(loss, mask)
    return (len(x) * gradient).square().mean(0)


def shares(squares: Tensor) -> Tensor:
    return squares / squares.sum()


def test_a_scaled_loss_tells_the_same(analysis: Any) -> None:
    gates, scaler = gated(analysis), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    optimizer = torch.optim.SGD(gates.model.parameters(), lr=0.1)
    scaler.scale(loss_of(gates.model, INPUTS[0])).backward()
    scaler.step(optimizer)
    scaler.update()
    gates.step()
    torch.testing.assert_close(gates.utility, shares(worth(INPUTS[0])))


def test_a_scaler_that_goes_too_far_spoils_nothing(analysis: Any) -> None:
    """It finds its scale by gradients that are not finite, skips such steps, and nobody tells the gates."""
    gates, scaler = gated(analysis), torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    optimizer = torch.optim.SGD(gates.model.parameters(), lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(100 * loss_of(gates.model, INPUTS[0])).backward()
        scaler.step(optimizer)
        scaler.update()
        gates.step()
    assert scaler.get_scale() < 2.0**100
    torch.testing.assert_close(gates.utility, shares(worth(INPUTS[0])))


def test_a_closure_may_be_called_several_times_a_step(analysis: Any) -> None:
    gates = gated(analysis)
    optimizer = torch.optim.LBFGS(gates.model.parameters(), lr=0.0, max_iter=4, tolerance_change=0.0)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(gates.model, INPUTS[0]) + gates.loss()
        loss.backward()
        calls.append(loss)
        return loss

    optimizer.step(closure)
    gates.step()
    assert len(calls) > 1
    torch.testing.assert_close(gates.utility, shares(worth(INPUTS[0])))


def test_all_passes_of_a_step_count(analysis: Any) -> None:
    gates = gated(analysis)
    for x in INPUTS:
        (loss_of(gates.model, x) / 2).backward()
    gates.step()
    torch.testing.assert_close(gates.utility, shares(worth(INPUTS[0]) + worth(INPUTS[1])))


@pytest.mark.parametrize("loop", ["scaled", "closure", "accumulated"])
def test_samples_decide_in_any_loop(analysis: Any, loop: str) -> None:
    """In the end all agree on what was chosen, and nothing that is not finite is learned."""
    gates = gated(analysis, mode="sample", budget=0.6)
    parameters, scaler = gates.model.parameters(), torch.amp.GradScaler("cpu", enabled=loop == "scaled")
    closes = loop == "closure"
    optimizer = torch.optim.LBFGS(parameters, lr=0.1, max_iter=3) if closes else torch.optim.SGD(parameters, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        passes = [loss_of(gates.model, x) + gates.loss() for x in INPUTS[:1]]
        for loss in passes:
            loss.backward()
        return passes[0]

    for _ in range(STEPS):
        if closes:
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            for x in INPUTS if loop == "accumulated" else INPUTS[:1]:
                scaler.scale(loss_of(gates.model, x) + gates.loss()).backward()
            scaler.step(optimizer)
            scaler.update()
        gates.step()
    assert gates.phase == "frozen"
    assert gates.cost()["macs"] <= 0.6
    assert gates.utility.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in gates.model.parameters())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_weights_takes_the_masks_as_they_stand(analysis: Any, use_buffers: bool) -> None:
    """With its buffers averaged, an average's masks lie between those of many steps, until it is synced."""
    gates = gated(analysis)
    average = AveragedModel(gates.model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(gates.model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(gates.model, INPUTS[0]).backward()
        optimizer.step()
        gates.step()
        average.update_parameters(gates.model)
    gates.sync(average.module)
    opened = torch.from_numpy(gates.opened).float()
    assert 0 < opened.sum() < 16
    first, _, second = average.module
    expected = torch.relu(nn.functional.linear(INPUTS[1], first.weight, first.bias)) * opened
    expected = nn.functional.linear(expected, second.weight, second.bias)
    torch.testing.assert_close(average(INPUTS[1]), expected)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_a_batch_of_nothing_tells_nothing(analysis: Any, mode: str) -> None:
    """As a detector's head has it, in a picture without a box."""
    gates = gated(analysis, mode=mode)
    optimizer = torch.optim.SGD(gates.model.parameters(), lr=0.0)
    for step in range(STEPS):
        x = INPUTS[0][:0] if step % 4 > 1 else INPUTS[0]
        (gates.model(x).square().sum() + gates.loss()).backward()
        optimizer.step()
        gates.step()
    assert gates.phase == "frozen"
    assert gates.utility.isfinite().all()


class TokensInFront(nn.Module):
    """PyTorch's transformers take [tokens, batch, channels] unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.back, self.head = (
            *(nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.embed(x)).transpose(0, 1)
        hidden = torch.relu(self.hidden(x))
        if mask is not None:
            hidden = hidden * mask
        return self.head(torch.relu(self.back(hidden)).mean(0))


@pytest.mark.parametrize("tokens", [5, 8])  # as many as there are samples, too: nothing but the graph tells them apart
def test_samples_may_lie_on_another_axis_inside(tokens: int) -> None:
    """Each sample's own gradient is squared there, too, and samples decide for themselves."""
    torch.manual_seed(0)
    model = TokensInFront()
    gates = Gates(model, torch.zeros(2, tokens, 6), rehearse=0, steps=STEPS, close_from=0.3, freeze_at=0.8, budget=0.8)
    x = torch.randn(8, tokens, 6)
    model(x).square().mean().backward()
    gates.step()
    mask = torch.ones(8, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x, mask).square().mean(), mask)
    known = {site.name: gates.utility[site.gates.start : site.gates.stop] for site in gates.sites}
    assert known.keys() == {"embed", "hidden", "back"}
    torch.testing.assert_close(shares(known["hidden"]), shares(gradient.square().mean(0)))

    gates.detach()
    how = {"mode": "sample", "steps": STEPS, "close_from": 0.1, "rehearse": 0}
    deciding = Gates(model, torch.zeros(2, tokens, 6), budget=0.8, analysis=gates.analysis, **how)  # type: ignore[arg-type]
    while deciding.phase == "open":
        model(x).square().mean().backward()
        deciding.step()
    for parameter in deciding._sampler.deciders.parameters():  # type: ignore[union-attr]
        nn.init.normal_(parameter)
    with torch.no_grad():
        everyone = model(x)
    whole, alone = model(x), torch.cat([model(each[None]) for each in x])
    torch.testing.assert_close(whole, alone)
    assert (whole - everyone).abs().max() > 1e-3  # under no_grad nobody decides


def test_what_a_program_makes_may_lie_on_another_device(analysis: Any) -> None:
    """As `torch.set_default_device("cuda")` has it; here it is a device without values."""
    model = network()
    with torch.device("meta"):
        gates = Gates(model, INPUTS[0], analysis=analysis, rehearse=0, steps=STEPS, close_from=0.3, freeze_at=0.8)
        for _ in range(STEPS):
            (loss_of(model, INPUTS[0]) + gates.loss()).backward()
            gates.step()
        gates.sync(model)
        small = gates.cut()
    assert gates.phase == "frozen"
    torch.testing.assert_close(small(INPUTS[1]), model(INPUTS[1]))
