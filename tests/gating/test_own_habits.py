"""What networks and loops do that has nothing to do with gates: other hooks, frozen layers, things kept for later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from polar_deploy import Gates
from polar_deploy.gating import masking
from polar_deploy.gating.places import Place

EXAMPLE = torch.zeros(1, 3, 8, 8)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.3)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, pruned])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # weight_norm is the old one, which many networks still have
def test_weights_that_other_hooks_make_are_left_to_them(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """They stand where a masked weight stands for the time of a call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), wrap(nn.Conv2d(6, 4, 3))).eval()
    x, place = torch.randn(2, 3, 8, 8), Place("2", 0, 1, 4)
    before = model(x)
    handles = masking.attach(model, [place], [6])
    torch.testing.assert_close(model(x), before)
    model[2].get_buffer(masking.INPUT).copy_(torch.tensor([1.0, 0, 1, 1, 0, 1]).reshape(6, 1, 1))
    with torch.no_grad():
        model[0].weight[[1, 4]], model[0].bias[[1, 4]] = 0, 0
    masked = model(x)
    masked.square().mean().backward()
    copied = masking.copied(model)
    masking.detach(model, [place], handles)
    torch.testing.assert_close(masked, model(x))
    torch.testing.assert_close(copied(x), masked)


def test_what_a_module_keeps_does_not_keep_it_from_being_cut() -> None:
    """PyTorch copies no tensor with a gradient behind it, such as the activations of the last pass."""

    class Keeping(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = [super().forward(x)]
            return self.kept[0]

    model = nn.Sequential(nn.Conv2d(3, 16, 3), Keeping(), nn.Conv2d(16, 4, 3))
    gates = Gates(model, EXAMPLE, rehearse=0)
    model(torch.randn(2, 3, 8, 8)).mean().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    gates.freeze()
    assert gates.cut()[0].out_channels == 8
    assert model[1].kept[0].requires_grad


def test_gates_behind_frozen_layers_are_worth_something() -> None:
    """No gradient of a parameter is needed there, but the gates' own: else whatever is frozen would be closed first."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU(inplace=True))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    gates = Gates(model, EXAMPLE, rehearse=0)
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    gates.step()
    assert all(float(gates.utility[site.gates.start : site.gates.stop].sum()) > 0.05 for site in gates.sites)
    assert model[0].weight.grad is None


class ByName(nn.Module):
    """One argument, a dictionary of tensors, as data loaders give them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.two(torch.relu(self.one(batch["x"]))) * batch["scale"]


def test_a_dictionary_can_be_an_argument(tmp_path: Path) -> None:
    """The exporter takes one at the end for named arguments."""
    model, example = ByName(), {"x": torch.randn(2, 6), "scale": torch.randn(2, 1)}
    gates = Gates(model, (example,), rehearse=1)
    gates.freeze()
    gates.export(tmp_path / "gated.onnx")
    torch.testing.assert_close(gates.cut()(example), model(example))


class Wrapped(nn.Module):
    """Hands on whatever it is given, as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args)


def test_the_batch_of_a_wrapper_stays_open() -> None:
    """MACs are those of one sample, and not of as many as the example has."""
    model = Wrapped(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)))
    gates = Gates(model, torch.randn(3, 6), rehearse=1)
    assert gates.full["macs"] == 6 * 16 + 16 * 4
