"""Weights from files that others made, and into files of ours. Nothing in a file is ever run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polar_deploy.data.arrays import read_npz
from polar_deploy.errors import ContentError, UsageError
from polar_deploy.workspace import atomic_path

_WRAPPERS = ("state_dict", "model_state", "model")  # entries of a checkpoint that hold the weights
_PREFIX = "module."  # of every name, where DataParallel was saved
_SHOWN = 3  # offenders a message names


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Fill `model` from .safetensors, .npz (one array a parameter), .pth or .pt; it stays as it was on any error.

    Each parameter and buffer must be there with its shape and finite values; only BatchNorm's `num_batches_tracked`
    may be missing.

    Raises:
        UsageError: there is no such file, or its suffix is none of these.
        ContentError: it is damaged, runs code, or holds the weights of another network.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise UsageError(f"{path} is no kind of weights file that is known", f"give one of {', '.join(_READERS)}")
    if not path.is_file():
        raise UsageError(f"the weights {path} do not exist or are not a file", "check the path")
    expected = model.state_dict()
    found = _unwrap(_READERS[path.suffix](path), path)
    problems = _mismatches(expected, found)
    if problems:
        todo = "give the weights of exactly this network, with this number of classes"
        raise ContentError(f"{path} does not fit the network ({type(model).__name__}): {'; '.join(problems)}", todo)
    model.load_state_dict({name: found.get(name, value) for name, value in expected.items()})


def save_weights(model_or_state: nn.Module | Mapping[str, Tensor], path: Path | str) -> None:
    """Write parameters and buffers as safetensors, atomically."""
    from safetensors.torch import save

    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    # Copies, since the format refuses two names for one memory.
    content = save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})
    with atomic_path(path) as tmp:
        tmp.write_bytes(content)


def _read_npz(path: Path) -> object:
    tensors = {}
    for name, array in read_npz(path).items():
        try:
            tensors[name] = torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            problem = f"{path}: '{name}' is {array.dtype}, which PyTorch does not know"
            raise ContentError(problem, "save it as float32, in this machine's byte order") from error
    return tensors


def _read_safetensors(path: Path) -> object:
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except Exception as error:
        raise _damaged(path, "safetensors", error) from error


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        problem = f"{path} is damaged, or holds Python objects beside tensors, which could run code"
        raise ContentError(problem, "save model.state_dict() alone, best as .safetensors") from error
    except Exception as error:
        raise _damaged(path, "a PyTorch file", error) from error


def _damaged(path: Path, kind: str, error: Exception) -> ContentError:
    first_line = f"{type(error).__name__}: {error}".splitlines()[0]
    return ContentError(f"{path} cannot be read as {kind}: {first_line}", "copy or save it again; it may be cut short")


_READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
}


def _unwrap(stored: Any, path: Path) -> dict[str, Tensor]:
    """The weights by name, out of a checkpoint's other entries and without DataParallel's prefix."""
    for _ in _WRAPPERS:  # not for ever: a dictionary in a pickle may hold itself
        inner = [stored[key] for key in _WRAPPERS if isinstance(stored, dict) and isinstance(stored.get(key), dict)]
        stored = inner[0] if inner else stored
    if not isinstance(stored, dict) or not stored:
        raise ContentError(f"{path} holds no weights by name ({type(stored).__name__})", "save model.state_dict()")
    odd = [name for name, value in stored.items() if not (isinstance(name, str) and _is_plain(value))]
    if odd:
        problem = f"{path}: '{odd[0]}' is a {type(stored[odd[0]]).__name__}, not a plain tensor"
        raise ContentError(problem, f"save model.state_dict() alone, or under one of {', '.join(_WRAPPERS)}")
    if all(name.startswith(_PREFIX) for name in stored):
        return {name.removeprefix(_PREFIX): value for name, value in stored.items()}
    return stored


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with all its values at hand: not sparse, not quantised, not on the meta device."""
    if not isinstance(value, Tensor):
        return False
    return value.layout is torch.strided and not value.is_quantized and not value.is_meta


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps `found` from filling a network of the `expected` state: one phrase for each kind of offence."""
    missing, shape, kind, infinite = [], [], [], []
    for name, wanted in expected.items():
        value = found.get(name)
        if value is None:
            if not name.endswith("num_batches_tracked"):
                missing.append(f"{name} {list(wanted.shape)}")
        elif value.shape != wanted.shape:
            shape.append(f"{name} {list(value.shape)} in the file, {list(wanted.shape)} in the network")
        elif value.is_floating_point() != wanted.is_floating_point() or value.is_complex() != wanted.is_complex():
            kind.append(f"{name} {value.dtype} in the file, {wanted.dtype} in the network")
        elif not torch.isfinite(value.to(wanted.dtype)).all():
            infinite.append(name)
    unexpected = [f"{name} {list(value.shape)}" for name, value in found.items() if name not in expected]
    offences = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shape,
        "of another type": kind,
        "with NaN or Inf": infinite,
    }
    return [f"{len(names)} {offence}: {_some(names)}" for offence, names in offences.items() if names]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
