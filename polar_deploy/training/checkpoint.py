"""Checkpoints: one safetensors file with all tensors, its header with the rest. No pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from polar_deploy.documents.training_log import Epoch, LoggedFreeze
from polar_deploy.workspace import atomic_path

FORMAT = 2  # raised when what ways of training keep has another form: a checkpoint of before is none then
_TENSOR = "tensor of the name"


@dataclass
class State:
    """Where a training run is: after `epoch` epochs, with one record an epoch for training.jsonl.

    method: what the way of training keeps besides weights and optimizers: nested dictionaries, lists, tensors, numbers.
    """

    epoch: int = 0
    records: list[Epoch] = field(default_factory=list)
    method: dict[str, Any] = field(default_factory=dict)

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16: as in its last epoch."""
        return bool(self.records[-1].bf16)

    @property
    def freeze(self) -> LoggedFreeze | None:
        """What fixing the gates changed, once they are."""
        return next((each.freeze for each in self.records if each.freeze), None)


def save(path: Path, key: str, state: State, network: nn.Module, optimizers: list[Optimizer]) -> None:
    """Write a checkpoint atomically. `key` names what it depends on; one with another key is not gone on from."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        tensors |= _optimizer_tensors(f"optimizer{number}", optimizer)
    method = _detach(state.method, tensors, "method")
    held = json.dumps({"epoch": state.epoch, "records": [each.as_json() for each in state.records], "method": method})
    with atomic_path(path) as temporary:
        save_file(_separate(tensors), temporary, metadata={"key": _stored_key(key), "state": held})


def load(path: Path, key: str) -> tuple[State, dict[str, Tensor]]:
    """Read a checkpoint: its state, and tensors for `restore`; a fresh `State` if there is none for these settings.

    A damaged checkpoint is none: training starts from the beginning.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != _stored_key(key):
                return State(), {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (FileNotFoundError, SafetensorError):
        return State(), {}
    held = json.loads(metadata["state"])
    records = [Epoch.model_validate_json(json.dumps(each)) for each in held["records"]]
    return State(held["epoch"], records, _attach(held["method"], tensors)), tensors


def fits(path: Path, key: str) -> bool:
    """Whether a checkpoint is there from which training with this key would go on."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("key") == _stored_key(key))
    except (FileNotFoundError, SafetensorError):
        return False


def _stored_key(key: str) -> str:
    return f"{key} checkpoint {FORMAT}"


def restore(tensors: dict[str, Tensor], network: nn.Module, optimizers: list[Optimizer]) -> None:
    """Write what `load` read into `network` and `optimizers`."""
    network.load_state_dict(_under(tensors, "network."))
    for number, optimizer in enumerate(optimizers):
        _restore_optimizer(_under(tensors, f"optimizer{number}."), optimizer)


def _detach(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A nested value as JSON takes it; its tensors go into `tensors`, their names stay in their places."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _detach(each, tensors, f"{name}.{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_detach(each, tensors, f"{name}.{index}") for index, each in enumerate(value)]
    return value


def _attach(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `_detach` was given."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _attach(each, tensors) for key, each in value.items()}
    return [_attach(each, tensors) for each in value] if isinstance(value, list) else value


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors wants contiguous tensors that share no memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _optimizer_tensors(prefix: str, optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{parameter}.{name}": torch.as_tensor(value)
        for parameter, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def _restore_optimizer(tensors: dict[str, Tensor], optimizer: Optimizer) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
