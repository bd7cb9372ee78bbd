"""One gate: what it computes, which gradient flows back, and what it learns about its own usefulness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from polar_deploy.gating.gate import FIRST_LOGIT, HIDDEN, Gate

BATCH, CHANNELS, SOURCE = 5, 4, 6
Mode = Literal["batch", "sample"]


class _Given(Gate):
    """A gate whose logits [B, gates] are given instead of computed."""

    def __init__(self, logits: Tensor, mode: Mode, peers: int = 1) -> None:
        super().__init__(logits.shape[1], SOURCE, mode, peers)
        self.given = logits.clone().requires_grad_()
        self.phase = "learning"

    def _logits(self, source: Tensor) -> Tensor:
        self.logits = self.given[: len(source)]
        return self.logits


def _logits() -> Tensor:
    """Channel 0: all samples open; 1: three of five; 2: two of five; 3: none."""
    signs = [[1, 1, 1, -1], [1, 1, 1, -1], [1, 1, -1, -1], [1, -1, -1, -1], [1, -1, -1, -1]]
    size = torch.linspace(0.2, 2.0, BATCH * CHANNELS).reshape(BATCH, CHANNELS)
    return torch.tensor(signs) * size


def _features(channels: int = CHANNELS, *, seed: int = 0) -> Tensor:
    return torch.randn(BATCH, channels, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_off_returns_its_input_itself() -> None:
    x = _features()
    assert Gate(CHANNELS, SOURCE)(x, _features(SOURCE)) is x


def test_logits_are_a_small_network_on_the_pooled_source() -> None:
    gate, source = Gate(CHANNELS, SOURCE), _features(SOURCE)
    gate.phase = "learning"
    nn.init.normal_(gate.logit.weight)
    gate(_features(), source)
    for sample in range(BATCH):
        pooled = source[sample].mean((1, 2))
        normal = (pooled - pooled.mean()) / (pooled.var(unbiased=False) + 1e-5).sqrt()
        hidden = (gate.hidden.weight @ normal + gate.hidden.bias).clamp_min(0) / HIDDEN**0.5
        torch.testing.assert_close(gate.logits[sample], gate.logit.weight @ hidden + gate.logit.bias)


def test_a_source_without_positions_needs_no_pooling() -> None:
    gate, source = Gate(CHANNELS, SOURCE), _features(SOURCE)
    gate.phase = "learning"
    gate(_features(), source)
    pooled = gate.logits
    gate(_features().mean((2, 3)), source.mean((2, 3)))
    torch.testing.assert_close(gate.logits, pooled)


def test_a_new_gate_is_open_for_every_sample() -> None:
    gate, x = Gate(CHANNELS, SOURCE), _features()
    gate.phase = "learning"
    assert torch.equal(gate(x, _features(SOURCE)), x)
    assert gate.logits.mean().item() == pytest.approx(FIRST_LOGIT, abs=0.2)


def test_gates_do_not_shape_the_features_they_look_at() -> None:
    gate, x, source = Gate(CHANNELS, SOURCE), _features(), _features(SOURCE).requires_grad_()
    gate.phase = "learning"
    gate(x, source).sum().backward()
    assert source.grad is None
    assert gate.hidden.weight.grad is not None


def test_each_sample_is_gated_by_its_own_logit_in_sample_mode() -> None:
    gate, x = _Given(_logits(), "sample"), _features()
    expected = x * (_logits() > 0).float()[:, :, None, None]
    torch.testing.assert_close(gate(x, x), expected, rtol=1e-6, atol=1e-6)


def test_the_majority_of_the_batch_decides_for_all_in_batch_mode() -> None:
    gate, x = _Given(_logits(), "batch"), _features()
    expected = x * torch.tensor([1.0, 1.0, 0.0, 0.0])[None, :, None, None]
    torch.testing.assert_close(gate(x, x), expected, rtol=1e-6, atol=1e-6)
    assert gate.open.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(gate.share, torch.tensor([1.0, 0.6, 0.4, 0.0]))


def test_half_of_the_batch_is_enough_to_open() -> None:
    gate = _Given(torch.tensor([[1.0], [-1.0]]), "batch")
    gate(torch.ones(2, 3, 1, 1), torch.ones(2, SOURCE))
    assert gate.open.tolist() == [1]


def test_one_gate_holds_all_channels_of_a_block() -> None:
    gate, x = _Given(torch.tensor([[1.0], [-2.0], [3.0], [-4.0], [-5.0]]), "sample"), _features()
    expected = x * torch.tensor([1.0, 0, 1, 0, 0])[:, None, None, None]
    torch.testing.assert_close(gate(x, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_the_gradient_is_that_of_the_sigmoid_in_units_of_the_gates_own(mode: Mode, temperature: float) -> None:
    gate, x, weight = _Given(_logits(), mode, peers=7), _features(), _features(seed=1)
    gate.temperature = temperature
    (gate(x, x) * weight).sum().backward()

    own = (x * weight).sum((2, 3))  # of each sample's loss at its mask
    unit = own / own.square().mean(0).sqrt() / (BATCH * 7)
    logits = _logits().requires_grad_()
    soft = torch.sigmoid(logits / temperature)
    mask = soft if mode == "sample" else soft.mean(0, keepdim=True)
    (mask * unit).sum().backward()
    torch.testing.assert_close(gate.given.grad, logits.grad)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_gradient_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    gradients = []
    for factor in (1.0, scale):
        gate, x = _Given(_logits(), "batch"), _features()
        (_loss(gate(x, x)).mean() * factor).backward()
        gradients.append(gate.given.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_share_has_the_gradient_of_the_mean_sigmoid() -> None:
    gate, x = _Given(_logits(), "batch"), _features()
    gate(x, x)
    gate.share.sum().backward()
    soft = torch.sigmoid(_logits())
    torch.testing.assert_close(gate.given.grad, soft * (1 - soft) / BATCH)


def test_a_frozen_gate_only_multiplies() -> None:
    gate, x = Gate(CHANNELS, SOURCE), _features()
    chosen = torch.tensor([1.0, 0.0, 0.0, 1.0])
    gate.freeze(chosen)
    assert torch.equal(gate(x, _features(SOURCE)), x * chosen[None, :, None, None])
    assert torch.equal(gate(x.mean((2, 3)), x), x.mean((2, 3)) * chosen)
    assert gate(x.bfloat16(), x).dtype == torch.bfloat16


def _per_sample_utility(features: Tensor, mask: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Half the mean over samples of the squared derivative of the sample's own loss by its mask, one by one."""
    total = torch.zeros(mask.shape[1])
    for sample in range(len(features)):
        own = mask[sample].clone().requires_grad_()
        loss(features[sample] * own[:, None, None]).backward()
        assert own.grad is not None
        total += own.grad.square() / 2
    return total / len(features)


def _loss(x: Tensor) -> Tensor:
    return (x.sin() * 3 + x.square()).sum((-1, -2, -3))


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_utility_is_half_the_mean_squared_gradient_of_each_samples_loss(mode: Mode) -> None:
    gate, x = _Given(_logits(), mode), _features()
    _loss(gate(x, x)).mean().backward()
    mask = (_logits() > 0).float() if mode == "sample" else torch.tensor([1.0, 1, 0, 0]).expand(BATCH, -1)
    expected = _per_sample_utility(x, mask, _loss)
    torch.testing.assert_close(gate.utility, expected)
    assert (expected > 0).all()  # closed gates too: they can come back


def test_utility_of_a_block_sums_the_derivatives_of_its_channels() -> None:
    logits = torch.tensor([[1.0], [-1.0], [1.0], [1.0], [-1.0]])
    gate, x = _Given(logits, "sample"), _features()
    _loss(gate(x, x)).mean().backward()
    torch.testing.assert_close(gate.utility, _per_sample_utility(x, (logits > 0).float(), _loss))


def test_utility_is_a_plain_mean_first_and_a_slow_average_later() -> None:
    gate, expected, seen = _Given(_logits(), "batch"), torch.zeros(CHANNELS), []
    for step in range(60):
        x = _features(seed=step)
        _loss(gate(x, x)).mean().backward()
        seen.append(_per_sample_utility(x, torch.tensor([1.0, 1, 0, 0]).expand(BATCH, -1), _loss))
        expected = torch.stack(seen).mean(0) if step < 50 else 0.98 * expected + 0.02 * seen[-1]
        torch.testing.assert_close(gate.utility, expected, rtol=1e-4, atol=1e-4)


def test_utility_is_kept_while_the_block_around_is_closed() -> None:
    gate, x = _Given(_logits(), "batch"), _features()
    _loss(gate(x, x)).mean().backward()
    known = gate.utility.clone()
    (_loss(gate(x, x)).mean() * 0).backward()  # what a closed block lets through
    assert torch.equal(gate.utility, known)
    assert known.sum() > 0


def test_a_loss_that_overflows_leaves_utility_finite() -> None:
    gate, x = _Given(_logits(), "batch"), _features()
    (_loss(gate(x, x)).mean() * torch.tensor([1e38])).sum().backward()
    assert gate.utility.isfinite().all()


def test_nothing_is_observed_without_gradients() -> None:
    gate, x = _Given(_logits(), "batch"), _features()
    with torch.no_grad():
        gate(x, x)
    assert gate.observed.item() == 0
    assert gate.utility.sum() == 0


@pytest.mark.parametrize("size", [1e-15, 1e-22, 1e-25, 1e-30])
def test_no_gate_moves_faster_than_in_units_of_its_own(size: float) -> None:
    gate, x = _Given(_logits(), "batch"), _features()
    (gate(x * size, x) * _features(seed=1)).sum().backward()
    # |g_i| / rms <= sqrt(B), the sigmoid's slope <= 1/4, a mean over B
    assert gate.given.grad.abs().max() <= BATCH**0.5 / 4 / BATCH + 1e-6
