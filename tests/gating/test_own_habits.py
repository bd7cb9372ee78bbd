"""What networks and loops do that has nothing to do with gates: other hooks, frozen layers, things kept for later."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from polar_deploy import Gates
from polar_deploy.errors import UsageError
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


class Standardising(nn.Conv2d):
    """Weights are standardised where PyTorch's own layer computes, so that `forward` is still that of PyTorch."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def patched(layer: nn.Conv2d) -> nn.Module:
    """As programs change layers of a network that someone else has written."""
    layer.forward = partial(Standardising.forward, copy.copy(layer))  # type: ignore[method-assign]
    layer.forward.args[0].__class__ = Standardising
    return layer


@pytest.mark.parametrize("make", [lambda: Standardising(6, 4, 3), lambda: patched(nn.Conv2d(6, 4, 3))])
def test_layers_that_compute_with_something_else_than_their_weight_have_their_input_masked(
    make: Callable[[], nn.Module],
) -> None:
    """A weight with zeros in it has another mean; and which of both is masked depends on the size of the batch."""
    torch.manual_seed(0)
    model, mask = nn.Sequential(make()), torch.tensor([1.0, 0, 1, 1, 0, 1]).reshape(6, 1, 1)
    x = torch.randn(2, 6, 16, 16)
    expected = model(x * mask)
    masking.attach(model, [Place("0", 0, 1, 4)], [6])
    model[0].get_buffer(masking.INPUT).copy_(mask)
    torch.testing.assert_close(model(x), expected)


def test_norms_without_parameters_are_cut() -> None:
    """As many generators have them: nothing that is sliced tells their widths."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, norm in ((3, nn.GroupNorm(4, 16, affine=False)), (16, nn.InstanceNorm2d(16))):
        layers += [nn.Conv2d(before, 16, 3), norm, nn.ReLU()]
    model, x = nn.Sequential(*layers, nn.Conv2d(16, 4, 1)).eval(), torch.randn(2, 3, 12, 12)
    gates = Gates(model, x, rehearse=1)
    gates.freeze()
    small = gates.cut()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # InstanceNorm wonders about a number of channels that is not its own
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert small[0].out_channels == small[1].num_channels < 16
    assert small[1].num_groups * 4 == small[1].num_channels
    assert small[3].out_channels == small[4].num_features < 16


class Measuring(nn.Module):
    """Asks for the length of its input, of which an exporter makes a number."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x.reshape(len(x) if scale is None else x.shape[0], 6)
        y = self.two(torch.relu(self.one(x)))
        return y if scale is None else y * scale


def test_a_batch_that_is_fixed_is_told() -> None:
    """And it is as long as it was given, so that MACs are those of one picture."""
    with pytest.warns(UserWarning, match=r"the batch of Measuring is fixed at 1 in its graph.*x\.shape\[0\] leaves"):
        gates = Gates(Measuring(), torch.zeros(1, 2, 3), rehearse=1)
    assert gates.full["macs"] == 6 * 16 + 16 * 4


@pytest.mark.parametrize(("batch", "numbers"), [(1, 1), (4, 4)])
def test_numbers_that_are_as_many_as_samples_leave_the_batch_open(batch: int, numbers: int, tmp_path: Path) -> None:
    """A scale of all samples is no part of the batch, though it is as long in the example."""
    torch.manual_seed(0)
    model, scale = Measuring(), torch.randn(numbers)
    gates = Gates(model, (torch.zeros(batch, 2, 3), scale), rehearse=1)
    assert gates.full["macs"] == 6 * 16 + 16 * 4
    gates.freeze()
    gates.export(tmp_path / "gated.onnx", inputs=["x", "scale"])
    session, x = onnxruntime.InferenceSession(tmp_path / "gated.onnx"), torch.randn(7, 2, 3)
    (given,) = session.run(None, {"x": x.numpy(), "scale": scale.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), model(x, scale))


class Branched(nn.Module):
    """Residual branches, one of which halves the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1, 2), nn.Linear(16, 4)
        self.same, self.less = (
            nn.Sequential(nn.Conv2d(16, 16, 3, stride, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))
            for stride in (1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.same(x))
        return self.head(torch.relu(self.short(x) + self.less(x)).mean((2, 3)))


def test_a_network_that_was_cut_can_be_exported_for_any_batch() -> None:
    """Whoever stays in PyTorch exports what is left by himself; nothing in place of a closed branch is in the way."""
    torch.manual_seed(0)
    gates = Gates(Branched().eval(), EXAMPLE, rehearse=0, budget=0.9)
    opened = gates.opened.copy()
    opened[[gates.sites[0].gates[3], *(block.gate for block in gates.blocks if block.name != "short:out")]] = False
    gates.freeze(opened)
    small, x = gates.cut(), torch.randn(3, 3, 8, 8)
    sizes = {0: torch.export.Dim("batch")}
    program = torch.export.export(small, (x,), dynamic_shapes=(sizes,))
    for images in (x, torch.randn(5, 3, 8, 8)):
        torch.testing.assert_close(program.module()(images), gates.model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small(torch.randn(2, 3, 9, 13)).shape, torch.Size([2, 4]))


class Mixed(nn.Module):
    """Says itself where autocast is on, whatever it is trained under."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.one, self.two, self.head, self.on = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4), on

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.on):
            x = torch.relu(self.two(x))
        return self.head(x.float())


@pytest.mark.parametrize("on", [False, True])
def test_layers_under_an_autocast_of_their_own_have_gates(on: bool, tmp_path: Path) -> None:
    """The graph is in float32."""
    torch.manual_seed(0)
    model = Mixed(on)
    gates = Gates(model, torch.zeros(1, 6), rehearse=1)
    assert [site.name for site in gates.sites] == ["one", "two"]
    assert gates.ungated.keys() == {"head"}
    gates.freeze()
    gates.export(tmp_path / "gated.onnx", inputs=["x"])
    x = torch.randn(3, 6)
    (given,) = onnxruntime.InferenceSession(tmp_path / "gated.onnx").run(None, {"x": x.numpy()})
    model.on = False
    torch.testing.assert_close(torch.from_numpy(given), model(x))
    with torch.autocast("cpu", torch.bfloat16):  # works as it did
        assert model.two(torch.randn(1, 16)).dtype == torch.bfloat16


def test_who_takes_the_network_before_the_gates_are_fixed_hears_of_it(tmp_path: Path) -> None:
    """While they close, masks lie between 0 and 1, and what is cut would compute something else."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    gates = Gates(model, EXAMPLE, budget="macs=0.5", steps=20, close_from=0.2, freeze_at=0.8)

    def step() -> None:
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        gates.step()

    step()
    with pytest.warns(UserWarning, match=r"all gates are open.*called 1 times, of 20, and fixes them at 16"):
        assert gates.cut()[0].out_channels == 16
    while gates.phase == "open":
        step()
    for take in (gates.cut, lambda: gates.export(tmp_path / "gated.onnx")):
        with pytest.raises(UsageError, match=r"the gates are closing: step\(\) was called 4 times"):
            take()
    assert not any(tmp_path.iterdir())
    gates.freeze()
    gates.export(tmp_path / "gated.onnx")
    assert gates.cut()[0].out_channels < 16


class ByKeyword(nn.Module):
    """Calls all that it is made of by keyword."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

        def forward(self, *, x: Tensor, scale: float = 0.5) -> Tensor:
            return scale * self.outer(input=self.inner(input=x).relu())

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16, affine=False)
        self.branch, self.last = self.Branch(), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(input=self.first(input=x)).relu()
        return self.last(input=x + self.branch(x=x))


@pytest.mark.parametrize("is_open", [True, False])
def test_layers_that_are_called_by_keyword_have_gates(is_open: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = ByKeyword().eval(), torch.randn(2, 3, 8, 8)
    gates = Gates(model, x, rehearse=0)
    assert {site.name: site.width for site in gates.sites} == {"first": 4, "branch.inner": 16}  # the norm has 4 groups
    assert gates.ungated.keys() == {"last"}
    (branch,) = gates.blocks
    opened = np.arange(21) % 4 > 0
    opened[branch.gate] = is_open
    before = model(x)
    gates.freeze(opened)
    assert not torch.allclose(model(x), before, atol=1e-3)
    small = gates.cut()
    assert tuple(small.first.weight.shape) == (12, 3, 3, 3)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    gates.export(tmp_path / "gated.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "gated.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
