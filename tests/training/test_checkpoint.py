"""Checkpoints: all that was saved comes back, and nothing that is damaged or somebody else's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from polar_deploy.documents.training_log import Epoch, LoggedFreeze
from polar_deploy.training.checkpoint import State, load, restore, save
from tests.support.tiny import net

FREEZE = LoggedFreeze(epoch=3, undecided=0.0, share=[0.5])
STATE = State(epoch=3, records=[Epoch(epoch=3, loss=0.25, val_score=None, freeze=FREEZE)])
# What a way of training may keep: all that JSON holds, and tensors of any type and shape, anywhere in it.
METHOD: dict[str, Any] = {
    "step": 17,
    "phase": "learning",
    "nothing": None,
    "nested": {"rate": 0.1, "empty": {}, "list": [1, [2.5, "a"], {"deep": torch.arange(3)}]},
    "opened": torch.tensor([True, False]),
    "a.name.with.dots": torch.tensor(2.5, dtype=torch.float64),
    "strided": torch.arange(6.0).reshape(2, 3).t(),
    "half": torch.ones(2, 2, dtype=torch.bfloat16),
}


def _trained(steps: int = 2, *, channels_last: bool = False) -> tuple[nn.Module, list[Optimizer]]:
    """A network after some steps, with three optimizers: momentum, none, and one with a step count."""
    torch.manual_seed(0)
    network = net(4)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    weights = list(network.parameters())
    optimizers: list[Optimizer] = [
        SGD(weights[:5], lr=0.1, momentum=0.9, nesterov=True),
        SGD(weights[5:8], lr=0.1),
        Adam(weights[8:], lr=0.01),
    ]
    for _ in range(steps):
        _step(network, optimizers)
    return network, optimizers


def _step(network: nn.Module, optimizers: list[Optimizer]) -> None:
    network.zero_grad()
    network(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def _load(path: Path, key: str, network: nn.Module, optimizers: list[Optimizer]) -> State:
    """As the loop does: what is no checkpoint of these settings changes nothing."""
    state, tensors = load(path, key)
    if tensors:
        restore(tensors, network, optimizers)
    return state


def _same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_run_takes_the_same_next_step(tmp_path: Path, channels_last: bool) -> None:
    network, optimizers = _trained(channels_last=channels_last)
    save(tmp_path / "c.safetensors", "key", STATE, network, optimizers)
    restored, theirs = _trained(0, channels_last=channels_last)
    assert _load(tmp_path / "c.safetensors", "key", restored, theirs) == STATE
    assert _same(network, restored)
    _step(network, optimizers)
    _step(restored, theirs)
    assert _same(network, restored)


def test_the_learning_rate_stays_that_of_the_new_run(tmp_path: Path) -> None:
    network, optimizers = _trained()
    save(tmp_path / "c.safetensors", "key", STATE, network, optimizers)
    restored, theirs = _trained(0)
    theirs[0].param_groups[0]["lr"] = 0.03
    _load(tmp_path / "c.safetensors", "key", restored, theirs)
    assert theirs[0].param_groups[0]["lr"] == 0.03


def test_shared_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = nn.Parameter(network[0].weight.detach().t())
    before = copy.deepcopy(network.state_dict())
    save(tmp_path / "c.safetensors", "key", State(), network, [])
    with torch.no_grad():
        network[0].weight.zero_()
    _load(tmp_path / "c.safetensors", "key", network, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_what_the_method_keeps_comes_back(tmp_path: Path) -> None:
    network, optimizers = _trained()
    save(tmp_path / "c.safetensors", "key", State(epoch=1, method=METHOD), network, optimizers)
    given = _load(tmp_path / "c.safetensors", "key", *_trained(0)).method
    _require_same(given, METHOD)


def _require_same(given: Any, expected: Any) -> None:
    assert type(given) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (given.dtype, given.shape) == (expected.dtype, expected.shape)
        assert torch.equal(given, expected)
    elif isinstance(expected, dict):
        assert list(given) == list(expected)
        for key, value in expected.items():
            _require_same(given[key], value)
    elif isinstance(expected, list):
        for one, other in zip(given, expected, strict=True):
            _require_same(one, other)
    else:
        assert given == expected


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert _load(tmp_path / "none.safetensors", "key", nn.Linear(1, 1), []) == State()


def test_a_checkpoint_of_other_settings_changes_nothing(tmp_path: Path) -> None:
    network, optimizers = _trained()
    save(tmp_path / "c.safetensors", "key", STATE, network, optimizers)
    other, theirs = _trained(0)
    before = copy.deepcopy(other)
    assert _load(tmp_path / "c.safetensors", "another key", other, theirs) == State()
    assert _same(other, before)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_changes_nothing(tmp_path: Path, kept: float) -> None:
    path, (network, optimizers) = tmp_path / "c.safetensors", _trained()
    save(path, "key", STATE, network, optimizers)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    other, theirs = _trained(0)
    before = copy.deepcopy(other)
    assert _load(path, "key", other, theirs) == State()
    assert _same(other, before)


def test_a_file_that_is_no_checkpoint_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"\x80\x04 not safetensors " * 50)
    assert _load(tmp_path / "c.safetensors", "key", nn.Linear(1, 1), []) == State()


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path, (network, optimizers) = tmp_path / "c.safetensors", _trained()
    save(path, "key", STATE, network, optimizers)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        save(path, "key", State(method={"set": {1}}), network, optimizers)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
