"""`Gates` on a user's own module: whatever people do to a network that they train, gates do not mind.

Most tests look at one small chain, whose parts can be written out by hand; what is special about other networks is one
test a network. Nothing is compared with the code under test alone: the cut module is counted by PyTorch's own counter,
the gated one compared with a network whose weights were set to zero by hand.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from polar_deploy import Gates
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.gating import masking
from polar_deploy.surgery import compress_file, cost
from tests.support.processes import together

STEPS = 32


class Chain(nn.Module):
    """One channel in, two convolutions, a head; for pictures that are not square."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)
        self.fails = False

    def features(self, x: Tensor) -> Tensor:
        """The layers before the head, [B, 8]."""
        return torch.relu(self.two(torch.relu(self.norm(self.one(x))))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        if self.fails:
            raise RuntimeError("in the middle of it")
        return y


EXAMPLE = torch.zeros(1, 1, 6, 10)
Batch = tuple[Tensor, Tensor]

QUICK = {"freeze_at": 0.5, "rehearse": 0}


@pytest.fixture(scope="module")
def analysis() -> Any:
    """What is known of `Chain`: looked at once, since that takes a second."""
    gates = Gates(Chain(), EXAMPLE, rehearse=1)
    gates.detach()
    return gates.analysis


@pytest.fixture
def make(analysis: Any) -> Iterator[Callable[..., Gates]]:
    """Makes gates on a new `Chain`, of the same start values each time."""
    made = []
    others = list(masking._listeners)  # tests of other files break off in the middle of a step

    def gates(model: nn.Module | None = None, **options: Any) -> Gates:
        torch.manual_seed(1)
        model = shaken(Chain()) if model is None else model
        made.append(Gates(model, EXAMPLE, **{"steps": STEPS, **QUICK, "analysis": analysis, **options}))
        return made[-1]

    yield gates
    for each in made:
        each.detach()
    assert not [held for held in masking._listeners if held not in others], "a test left somebody listening"


@torch.no_grad()
def shaken(network: nn.Module) -> nn.Module:
    """With BatchNorms as they are after some training."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
    return network


def batch(step: int) -> Batch:
    """Noise, and which third of it is the brightest."""
    x = torch.randn(12, 1, 6, 10, generator=torch.Generator().manual_seed(step))
    return x, torch.stack([part.mean((1, 2, 3)) for part in x.chunk(3, 3)], 1).argmax(1)


def optimizer_of(gates: Gates) -> torch.optim.Optimizer:
    return torch.optim.SGD(gates.model.parameters(), 0.05, momentum=0.9)


def train(
    gates: Gates, optimizer: torch.optim.Optimizer, steps: range, call: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Steps of an ordinary loop."""
    for step in steps:
        x, y = batch(step)
        made = gates.model(x) if call is None else call(x)
        loss = nn.functional.cross_entropy(made, y) + gates.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gates.step()


def half(gates: Gates, seed: int = 0) -> np.ndarray:
    """A state in which about half of each site is open, and every block."""
    rng = np.random.default_rng(seed)
    opened = np.ones(len(gates.opened), bool)
    for site in gates.sites:
        opened[site.gates.start : site.gates.stop] = rng.permutation(site.width) < max(1, site.width // 2)
    return opened


@torch.no_grad()
def outputs(network: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """All tensors that a network gives back in evaluation mode."""
    made = network.eval()(*args, **kwargs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def equal(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Whether two networks give back the same bits."""
    pairs = zip(outputs(one, x), outputs(other, x), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def states_equal(one: Any, other: Any) -> bool:
    """Whether two nested states hold the same numbers."""
    leaves = [torch.utils._pytree.tree_leaves(state) for state in (one, other)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*leaves, strict=True)
    )


@torch.no_grad()
def by_hand(model: Chain, opened: np.ndarray) -> Chain:
    """A `Chain` without gates that knows nothing of its closed channels: their columns in the next layer are zero."""
    bare = Chain()
    bare.load_state_dict(model.state_dict())
    keep = torch.from_numpy(opened).float()
    bare.two.weight *= keep[:6].reshape(1, 6, 1, 1)
    bare.head.weight *= keep[6:].reshape(1, 8)
    return bare


def macs(network: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates at batch 1, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        outputs(network, *args, **kwargs)
    return int(counter.get_total_flops()) // 2


PHASES = {"open": 1, "learning": 8, "frozen": 20}


@pytest.fixture(params=sorted(PHASES))
def trained(request: pytest.FixtureRequest, make: Callable[..., Gates]) -> tuple[Gates, torch.optim.Optimizer, int]:
    """Gates in each phase, their optimizer, and the steps that were made."""
    gates = make()
    optimizer, steps = optimizer_of(gates), PHASES[request.param]
    train(gates, optimizer, range(steps))
    assert gates.phase == request.param
    return gates, optimizer, steps


Trained = tuple[Gates, torch.optim.Optimizer, int]


# ---- copies and files


def test_a_copy_gives_the_same_outputs_in_every_phase_and_is_its_own(trained: Trained) -> None:
    gates, optimizer, steps = trained
    x, _ = batch(100)
    twin = copy.deepcopy(gates.model)
    assert equal(twin, gates.model, x)
    before = outputs(twin, x)
    train(gates, optimizer, range(steps, steps + 4))
    gates.freeze(half(gates))
    assert torch.equal(outputs(twin, x)[0], before[0])
    assert not equal(twin, gates.model, x)


def test_training_a_copy_teaches_the_gates_nothing(make: Callable[..., Gates]) -> None:
    gates = make()
    twin = copy.deepcopy(gates.model)
    x, y = batch(0)
    nn.functional.cross_entropy(twin(x), y).backward()
    gates.step()
    assert not gates.utility.any()


def test_a_gated_network_goes_through_a_file_in_every_phase(trained: Trained, tmp_path: Path) -> None:
    gates, _, _ = trained
    torch.save(gates.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert equal(loaded, gates.model, batch(100)[0])
    masks = [buffer for name, buffer in loaded.named_buffers() if "polar_deploy" in name]
    assert len(masks) == 2  # one a layer, but for the first: it reads the input


def test_an_averaged_network_follows_the_masks(make: Callable[..., Gates]) -> None:
    gates = make()
    average = AveragedModel(gates.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = optimizer_of(gates)
    for step in range(20):
        train(gates, optimizer, range(step, step + 1))
        average.update_parameters(gates.model)
    assert gates.phase == "frozen"
    assert equal(average.module, by_hand(average.module, gates.opened), batch(100)[0]) or torch.allclose(
        outputs(average.module, batch(100)[0])[0],
        outputs(by_hand(average.module, gates.opened), batch(100)[0])[0],
        atol=1e-6,
    )
    assert not equal(average.module, gates.model, batch(100)[0])


def test_sync_gives_a_copy_the_masks_of_the_moment(make: Callable[..., Gates]) -> None:
    gates = make()
    twin = copy.deepcopy(gates.model)
    gates.freeze(half(gates))
    assert not equal(twin, gates.model, batch(0)[0])
    gates.sync(twin)
    assert equal(twin, gates.model, batch(0)[0])


def test_the_state_dict_of_the_network_is_that_of_one_without_gates(trained: Trained) -> None:
    gates, _, _ = trained
    assert list(gates.model.state_dict()) == list(Chain().state_dict())
    Chain().load_state_dict(gates.model.state_dict())


def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(trained: Trained, make: Callable[..., Gates]) -> None:
    gates, optimizer, steps = trained
    file = io.BytesIO()
    state = {"model": gates.model.state_dict(), "optimizer": optimizer.state_dict(), "gates": gates.state_dict()}
    torch.save(state, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(gates, optimizer, range(steps, STEPS))

    again = make(steps=7, budget=0.9)  # budget and schedule come from the state
    again.model.load_state_dict(saved["model"])
    again.load_state_dict(saved["gates"])
    other = optimizer_of(again)
    other.load_state_dict(saved["optimizer"])
    assert states_equal(again.state_dict(), saved["gates"])
    again.model.train()
    train(again, other, range(steps, STEPS))
    assert states_equal(again.model.state_dict(), gates.model.state_dict())
    assert states_equal(again.state_dict(), gates.state_dict())
    assert equal(again.model, gates.model, batch(100)[0])


def test_a_state_of_other_gates_is_refused(make: Callable[..., Gates]) -> None:
    state = make().state_dict()
    state["sites"][0][2] += 1
    with pytest.raises(ContentError, match="other gates than those of Chain"):
        make().load_state_dict(state)
    with pytest.raises(ContentError, match="not of mode 'sample'"):
        make(mode="sample").load_state_dict(make().state_dict())


# ---- what a closed gate means


def test_frozen_gates_do_what_zero_weights_do(make: Callable[..., Gates]) -> None:
    gates = make()
    gates.freeze(half(gates))
    x, y = batch(0)
    hand = by_hand(gates.model, gates.opened)
    torch.testing.assert_close(outputs(gates.model, x), outputs(hand, x))
    for model in (gates.model.train(), hand.train()):
        nn.functional.cross_entropy(model(x), y).backward()
    kept = torch.from_numpy(gates.opened[:6])
    torch.testing.assert_close(gates.model.one.weight.grad, hand.one.weight.grad)
    assert not gates.model.one.weight.grad[~kept].any()
    assert not gates.model.two.weight.grad[:, ~kept].any()  # weight decay aside, a closed column stays what it is


def test_a_closed_channel_has_no_influence(make: Callable[..., Gates]) -> None:
    gates = make()
    gates.freeze(half(gates))
    before = outputs(gates.model, batch(0)[0])
    closed = torch.from_numpy(~gates.opened[:6])
    with torch.no_grad():
        gates.model.one.weight[closed], gates.model.norm.bias[closed] = 1e3, -7.0
        gates.model.two.weight[:, closed] = 1e3
    assert torch.equal(outputs(gates.model, batch(0)[0])[0], before[0])


def test_open_gates_change_no_bit_of_the_outputs(make: Callable[..., Gates]) -> None:
    gates = make()
    bare = Chain()
    bare.load_state_dict(gates.model.state_dict())
    assert equal(gates.model, bare, batch(0)[0])


def test_detach_leaves_the_network_as_it_was(analysis: Any) -> None:
    torch.manual_seed(0)
    model = Chain()
    keys = {name: sorted(vars(module)) for name, module in model.named_modules()}
    for mode in ("batch", "sample"):
        gates = Gates(model, EXAMPLE, steps=STEPS, rehearse=0, mode=mode, analysis=analysis)  # type: ignore[arg-type]
        train(gates, optimizer_of(gates), range(8))
        gates.detach()
        assert {name: sorted(vars(module)) for name, module in model.named_modules()} == keys
        for module in model.modules():
            assert not module._forward_pre_hooks
            assert not module._forward_hooks
            assert not module._forward_pre_hooks_with_kwargs
            assert not module._forward_hooks_always_called
            assert not module._non_persistent_buffers_set
        assert [name for name, _ in model.named_buffers()] == [name for name, _ in Chain().named_buffers()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_within_forward_leaves_the_weights_as_they_are(
    make: Callable[..., Gates], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = make()
    gates.freeze(half(gates))
    x, y = batch(0)
    expected = outputs(gates.model, x)
    convolution = nn.Conv2d._conv_forward

    def broken(self: nn.Conv2d, *args: Any) -> Tensor:
        if self is gates.model.two:
            raise error
        return convolution(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "_conv_forward", broken)
        with pytest.raises(error):
            gates.model(x)
    if error is RuntimeError:  # PyTorch calls no hook after an interrupt: the next pass, or `cut`, clears up
        assert "weight" not in vars(gates.model.two)
    gates.cut()
    assert torch.equal(outputs(gates.model, x)[0], expected[0])
    assert isinstance(gates.model.two.weight, nn.Parameter)
    nn.functional.cross_entropy(gates.model(x), y).backward()


def test_a_rehearsal_that_fails_leaves_no_hook(analysis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polar_deploy.gating import rehearsal

    def fails(*args: Any) -> None:
        raise ContentError("no", "never")

    monkeypatch.setattr(rehearsal, "rehearse", fails)
    model, others = Chain(), list(masking._listeners)
    with pytest.raises(ContentError):
        Gates(model, EXAMPLE, analysis=analysis)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert masking._listeners == others


def test_who_listens_does_not_take_other_modules_for_its_own(analysis: Any) -> None:
    """Modules are known by their ids, which Python gives to others when a module is gone."""
    gates = Gates(Chain(), EXAMPLE, analysis=analysis, mode="sample", **QUICK)
    listening, module = (gates._observer, gates._sampler), weakref.ref(gates.model.get_submodule("two"))
    gates.detach()
    del gates
    gc.collect()
    assert all(listening)
    assert module() is not None


# ---- ways to train


def test_frozen_norms_stay_frozen(analysis: Any) -> None:
    model = shaken(Chain())
    model.train()
    model.norm.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gates = Gates(model, EXAMPLE, rehearse=1, steps=STEPS)
    gates.cut()
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    train(gates, optimizer_of(gates), range(20))
    gates.cut()
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(dict(model.named_buffers())[name], buffer) for name, buffer in before.items())
    gates.detach()


def test_autocast_trains_and_ends_within_the_budget(make: Callable[..., Gates]) -> None:
    gates = make()

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return gates.model(x).float()

    train(gates, optimizer_of(gates), range(STEPS), call)
    assert gates.phase == "frozen"
    assert bool(torch.isfinite(gates.utility).all())
    assert float(gates.utility.sum()) == pytest.approx(1, abs=1e-4)
    assert macs(gates.cut(), EXAMPLE) <= 0.5 * macs(Chain(), EXAMPLE)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_overflows_does_not_ruin_the_utilities(make: Callable[..., Gates], bad: float, mode: str) -> None:
    gates = make(mode=mode)
    optimizer = optimizer_of(gates)
    train(gates, optimizer, range(6))
    before = gates.utility.clone()
    x, y = batch(6)
    (nn.functional.cross_entropy(gates.model(x), y) * bad + gates.loss()).backward()
    optimizer.zero_grad()  # a GradScaler leaves the step of the optimizer out
    gates.step()
    assert torch.equal(gates.utility, before)
    train(gates, optimizer, range(7, STEPS))
    assert bool(torch.isfinite(gates.utility).all())
    assert all(bool(p.isfinite().all()) for p in gates.model.parameters())
    assert states_equal(gates.state_dict(), gates.state_dict())  # no NaN in it


def test_the_scale_of_the_loss_does_not_matter(make: Callable[..., Gates]) -> None:
    seen = []
    for scale in (1.0, 65536.0):
        gates = make()
        x, y = batch(0)
        (scale * nn.functional.cross_entropy(gates.model(x), y)).backward()
        gates.step()
        seen.append(gates.utility)
    torch.testing.assert_close(seen[0], seen[1])


def test_utilities_are_the_mean_square_of_each_samples_derivative_by_the_gate(make: Callable[..., Gates]) -> None:
    gates = make()
    gates.model.eval()  # no sample shall change another's
    x, y = batch(0)
    nn.functional.cross_entropy(gates.model(x), y).backward()
    gates.step()
    bare = Chain().eval()
    bare.load_state_dict(gates.model.state_dict())
    expected = torch.zeros(14)
    for one, label in zip(x, y, strict=True):
        a, b = torch.ones(6, requires_grad=True), torch.ones(8, requires_grad=True)
        hidden = torch.relu(bare.norm(bare.one(one[None]))) * a.reshape(1, 6, 1, 1)
        made = bare.head(torch.relu(bare.two(hidden)).mean((2, 3)) * b)
        expected += torch.cat(torch.autograd.grad(nn.functional.cross_entropy(made, label[None]), (a, b))) ** 2
    torch.testing.assert_close(gates.utility, expected / expected.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(make: Callable[..., Gates], reentrant: bool) -> None:
    plain, sparing = make(), make()

    def call(x: Tensor) -> Tensor:
        held = checkpoint(sparing.model.features, x.requires_grad_(), use_reentrant=reentrant)
        return sparing.model.head(held)

    for gates in (plain, sparing):  # a BatchNorm that counts its batches would count twice: PyTorch's own doing
        gates.model.norm.momentum = 0.0
    sparing.model.forward = call  # type: ignore[method-assign]
    for gates in (plain, sparing):
        train(gates, optimizer_of(gates), range(STEPS))
    assert plain.phase == sparing.phase == "frozen"
    assert states_equal(plain.state_dict(), sparing.state_dict())
    torch.testing.assert_close(dict(plain.model.named_parameters()), dict(sparing.model.named_parameters()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_learns_and_computes_what_the_eager_one_does(
    make: Callable[..., Gates], backend: str
) -> None:
    plain, gates = make(close_from=0.4), make(close_from=0.4)  # the first step is compiled before it is known to be
    torch.compiler.reset()
    compiled = torch.compile(gates.model, backend=backend)
    train(plain, optimizer_of(plain), range(STEPS))
    train(gates, optimizer_of(gates), range(STEPS), compiled)
    assert gates.phase == "frozen"
    x, _ = batch(100)
    torch.testing.assert_close(outputs(compiled, x), outputs(gates.model, x))
    torch.testing.assert_close(outputs(compiled, x), outputs(by_hand(gates.model, gates.opened), x))
    assert gates.utility.any(), "nothing was learned about the gates"
    assert np.array_equal(gates.opened, plain.opened)


def test_gradients_that_are_accumulated_make_one_step(make: Callable[..., Gates]) -> None:
    gates = make()
    optimizer = optimizer_of(gates)
    for step in range(0, 2 * STEPS, 2):
        for part in (step, step + 1):
            x, y = batch(part)
            nn.functional.cross_entropy(gates.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
    assert gates.phase == "frozen"
    assert macs(gates.cut(), EXAMPLE) == gates.promise()["macs"] <= gates.full["macs"] // 2


def test_passes_without_gradient_teach_nothing(make: Callable[..., Gates]) -> None:
    gates = make()
    with torch.no_grad():
        gates.model(batch(0)[0])
    gates.step()
    assert not gates.utility.any()


def test_sample_mode_ends_frozen_within_the_budget_and_all_samples_agree(make: Callable[..., Gates]) -> None:
    gates = make(mode="sample")
    optimizer = optimizer_of(gates)
    train(gates, optimizer, range(8))
    assert gates.phase == "learning"
    x, _ = batch(8)
    gates.model(x)
    assert float(gates.loss().detach()) > 0
    gates.step()
    train(gates, optimizer, range(9, STEPS))
    assert gates.phase == "frozen"
    assert float(gates.loss()) == 0
    together = outputs(gates.model, x)[0]
    alone = torch.cat([outputs(gates.model, sample[None])[0] for sample in x])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, outputs(by_hand(gates.model, gates.opened), x)[0])
    assert macs(gates.cut(), EXAMPLE) <= 0.5 * gates.full["macs"]


def test_layers_to_be_ignored_keep_all_that_they_read() -> None:
    gates = Gates(Chain(), EXAMPLE, rehearse=0, ignore=["hea*"])
    assert [site.name for site in gates.sites] == ["one"]
    assert gates.ungated["head"] == "it is to be ignored"
    gates.freeze(half(gates))
    small = gates.cut()
    assert small.one.out_channels < 6
    assert small.head.in_features == 8
    gates.detach()
    with pytest.raises(UsageError, match="no place for a gate"):
        Gates(Chain(), EXAMPLE, ignore=["*"])


# ---- networks of all kinds


class Called(nn.Module):
    """Control flow on Python values, an optional argument and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, times: int = 1) -> Tensor:
        y = torch.relu(self.one(x))
        if mask is not None:
            y = y * mask
        for _ in range(times):
            y = torch.relu(self.two(y))
        return self.three(y)


class Several(nn.Module):
    """Two inputs; a tuple, in it a dictionary, comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Conv1d(2, 6, 3), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        both = torch.relu(self.a(x)) + torch.relu(self.b(y)).mean(2)
        return self.c(both), {"d": self.d(both)}


class Tied(nn.Module):
    """Two convolutions that share one parameter, and one module that is called twice."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)
        self.right.weight = self.left.weight
        self.last, self.twice = nn.Conv2d(6, 2, 1), twice

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.left(torch.relu(self.first(x))))
        return self.last(torch.relu((self.left if self.twice else self.right)(y)))


class Named(nn.Module):
    """Submodules that are called as gates call their own things."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.mask = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3)
        self.sites = nn.ModuleDict({"opened": nn.Conv2d(6, 2, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.sites["opened"](torch.relu(self.mask(torch.relu(self.gates(x)))))


class ChannelsLast(nn.Module):
    """Channels on the last axis: norm and linear layers there, a depthwise convolution between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = x.permute(0, 2, 3, 1) + self.down(nn.functional.gelu(self.up(y)))
        return self.head(y.mean((1, 2)))


def line(layer: Any, norm: Any, pool: Any) -> nn.Module:
    """Two convolutions of any rank, and a head."""
    first, second = (layer(2, 6, 3), norm(6), nn.ReLU()), (layer(6, 6, 3), nn.ReLU(), pool(1), nn.Flatten())
    return nn.Sequential(*first, *second, nn.Linear(6, 2))


def tokens() -> nn.Module:
    """A multi-layer perceptron on tokens."""
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def shape(*sizes: int) -> Tensor:
    return torch.zeros(1, *sizes)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "one dimension": (lambda: line(nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d), shape(2, 9)),
    "two dimensions": (lambda: line(nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d), shape(2, 6, 9)),
    "three dimensions": (lambda: line(nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d), shape(2, 5, 6, 7)),
    "channels-last memory": (lambda: shaken(Chain()).to(memory_format=torch.channels_last), shape(1, 6, 10)),
    "tokens": (tokens, shape(7, 6)),
    "channels on the last axis": (ChannelsLast, shape(1, 6, 8)),
    "an optional argument": (Called, (shape(5), None, 2)),
    "an optional argument that is given": (Called, {"x": shape(5), "mask": torch.ones(1, 8)}),
    "several inputs and outputs": (Several, (shape(4), shape(2, 7))),
    "a shared parameter": (lambda: Tied(twice=False), shape(1, 7, 9)),
    "a module called twice": (lambda: Tied(twice=True), shape(1, 7, 9)),
    "names that gates use": (Named, shape(1, 7, 9)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_any_kind_is_cut_to_what_was_promised(kind: str) -> None:
    torch.manual_seed(0)
    build, example = NETWORKS[kind]
    model = shaken(build())
    bare = copy.deepcopy(model)
    gates = Gates(model, example, rehearse=1)
    given = example if isinstance(example, dict) else (example if isinstance(example, tuple) else (example,))
    noise = torch.utils._pytree.tree_map(
        lambda leaf: torch.randn(5, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf, given
    )
    args, kwargs = ((), noise) if isinstance(noise, dict) else (noise, {})
    torch.testing.assert_close(outputs(model, *args, **kwargs), outputs(bare, *args, **kwargs))
    gates.freeze(half(gates))
    small = gates.cut()
    ours, gated = outputs(small, *args, **kwargs), outputs(model, *args, **kwargs)
    torch.testing.assert_close(ours, gated, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(gated[0], outputs(bare, *args, **kwargs)[0], atol=1e-4), "nothing was closed"

    one = torch.utils._pytree.tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    assert macs(bare, *one[0], **one[1]) == gates.full["macs"]
    assert macs(small, *one[0], **one[1]) == gates.promise()["macs"] < gates.full["macs"]
    sum(each.square().mean() for each in torch.utils._pytree.tree_leaves(small.train()(*args, **kwargs))).backward()
    gates.detach()


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_that_are_computed_are_masked_where_they_are_read(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Chain()
    wrap(model.two)
    gates = Gates(model, EXAMPLE, steps=STEPS, rehearse=1)
    train(gates, optimizer_of(gates), range(STEPS))
    assert gates.phase == "frozen"
    closed = next(g for site in gates.sites if site.name == "one" for g in range(6) if not gates.opened[site.gates[g]])
    model.eval()
    x, _ = batch(0)
    before = outputs(model, x)
    model.one.register_forward_hook(lambda module, args, y: y.index_fill(1, torch.tensor(closed), 1e3))
    torch.testing.assert_close(outputs(model, x), before)
    model.one._forward_hooks.popitem()
    gates.export(tmp_path / "gated.onnx")
    compress_file(tmp_path / "gated.onnx", tmp_path / "small.onnx")
    assert cost(onnx.load(tmp_path / "small.onnx")).macs == gates.promise()["macs"] < gates.full["macs"]
    gates.detach()


# ---- several processes


def _worker(rank: int, port: int, folder: str) -> None:
    """One of two processes: it trains `Chain` on data of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        known = None
        for mode in ("batch", "sample"):
            torch.manual_seed(rank)  # so that start values differ, until DDP sends those of the first process
            gates = Gates(Chain(), EXAMPLE, steps=STEPS, rehearse=0, mode=mode, analysis=known)  # type: ignore[arg-type]
            known = gates.analysis
            whole = nn.parallel.DistributedDataParallel(gates.model)
            optimizer = optimizer_of(gates)
            for step in range(STEPS):
                train(gates, optimizer, range(step + 1000 * rank, step + 1000 * rank + 1), whole)
            torch.save(
                {"gates": gates.state_dict(), "model": gates.model.state_dict(), "promise": gates.promise()},
                Path(folder, f"{mode}{rank}.pt"),
            )
            gates.detach()
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_on_different_data_agree_bit_for_bit(tmp_path: Path) -> None:
    together(_worker, str(tmp_path))
    for mode in ("batch", "sample"):
        first, second = (torch.load(tmp_path / f"{mode}{rank}.pt", weights_only=True) for rank in range(2))
        assert first["gates"]["phase"] == "frozen"
        assert first["gates"]["observer"]["utility"].any()
        assert states_equal(first["gates"], second["gates"])
        weights = [name for name, _ in Chain().named_parameters()]  # each process has its own running statistics
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in weights)
        assert first["promise"]["macs"] <= 0.5 * macs(Chain(), EXAMPLE)
