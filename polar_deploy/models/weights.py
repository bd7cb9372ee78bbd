"""Weights from files that others made, and into files of ours. Nothing in a file is ever run.

A file holds the weights bare or somewhere in nested dictionaries, under names to which training tools have added. The
network's own names decide: what fits them is taken, wherever it lies.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from polar_deploy.data.arrays import read_npz
from polar_deploy.errors import ContentError, UsageError, one_line
from polar_deploy.models.unpickling import CouldRunError, Inert, InertPickle
from polar_deploy.workspace import atomic_path

# Parts of a name that a wrapper adds around a module: DataParallel, DDP, AveragedModel; compile; FSDP; checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow)(?![a-z])", re.IGNORECASE)
_SHOWN = 3  # offenders a message names
_SAVE_BARE = "save model.state_dict() alone, best as .safetensors"


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Fill `model` from .safetensors, .npz (one array a parameter) or a PyTorch file; it stays as it was on any error.

    Each parameter and buffer must be there with its shape and finite values; only BatchNorm's `num_batches_tracked`
    may be missing. Another precision is converted. The weights may lie in any entry of a checkpoint, in the names that
    torch.compile, DataParallel, DDP, FSDP and AveragedModel write, and behind one prefix that all of them share; what
    lies beside that prefix is ignored. Where plain and averaged (EMA, SWA) weights fit, the plain ones are taken.

    Raises:
        UsageError: there is no such file, or its suffix is none of these.
        ContentError: it is damaged, runs code, holds the weights of another network, or holds several that fit.
    """
    path = Path(path)
    read = next((read for suffix, read in _READERS.items() if path.name.lower().endswith(suffix)), None)
    if read is None:
        raise UsageError(f"{path} is no kind of weights file that is known", f"give one of {', '.join(_READERS)}")
    if not path.is_file():
        raise UsageError(f"the weights {path} do not exist or are not a file", "check the path")
    expected = model.state_dict()
    found = _weights(expected, read(path), path, type(model).__name__)
    model.load_state_dict({name: found.get(name, value) for name, value in expected.items()})


def save_weights(model_or_state: nn.Module | Mapping[str, Tensor], path: Path | str) -> None:
    """Write parameters and buffers as safetensors, atomically."""
    from safetensors.torch import save

    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    # Copies, since the format refuses two names for one memory.
    content = save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})
    with atomic_path(path) as tmp:
        tmp.write_bytes(content)


# --------------------------------------------------------------------------- reading


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
        return _load(path)
    except CouldRunError as error:
        problem = f"{path} holds Python objects beside tensors, and {error} could run code; nothing of it was run"
        raise ContentError(problem, _SAVE_BARE) from error
    except pickle.UnpicklingError as error:
        problem = f"{path} is damaged, or holds Python objects beside tensors, which could run code"
        raise ContentError(problem, _SAVE_BARE) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise ContentError(f"{path} is a TorchScript archive, which holds code", _SAVE_BARE) from error
        raise _damaged(path, "a PyTorch file", error) from error


def _load(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a protocol that PyTorch's own reader may not know
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # objects beside the tensors; an archive of code raises another error, and ends
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=InertPickle)


def _damaged(path: Path, kind: str, error: Exception) -> ContentError:
    first_line = f"{type(error).__name__}: {error}".splitlines()[0]
    return ContentError(f"{path} cannot be read as {kind}: {first_line}", "copy or save it again; it may be cut short")


_READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_pickle,
    ".pt": _read_pickle,
    ".ckpt": _read_pickle,
    ".bin": _read_pickle,
    ".th": _read_pickle,
    ".tar": _read_pickle,  # of .pth.tar, which is no tar archive
}


_Entry: TypeAlias = "tuple[str, ...]"


@dataclass(frozen=True)
class _Reading:
    """One way to read the file.

    Attributes:
        entry: keys that lead to the dictionary.
        prefix: of every name there that belongs to the network, with its dot; "": of none.
        found: values under the names of the network; a name that the network does not have is as in the file.
    """

    entry: _Entry
    prefix: str
    found: dict[str, Any]

    @property
    def is_averaged(self) -> bool:
        """Whether its names say that it is a moving average of the weights."""
        return bool(_AVERAGED.search(" ".join([*self.entry, self.prefix])))

    def matches(self, expected: Mapping[str, Tensor]) -> int:
        """How many of the expected tensors it has, with their shapes."""
        return sum(getattr(self.found.get(name), "shape", None) == value.shape for name, value in expected.items())

    def fits(self, expected: Mapping[str, Tensor]) -> bool:
        """Whether it has exactly the expected names and shapes; values are looked at afterwards."""
        absent = [name for name in expected if name not in self.found and not _is_optional(name)]
        return not absent and self.matches(expected) == len(self.found)

    def same(self, other: _Reading) -> bool:
        """Whether both hold the same values; both fit."""
        if self.found.keys() != other.found.keys():
            return False
        return all(value is other.found[name] or _equal(value, other.found[name]) for name, value in self.found.items())

    def __str__(self) -> str:
        start = f"names that start with '{self.prefix}'" if self.prefix else ""
        return " with ".join(part for part in (_shown(self.entry), start) if part)


def _weights(expected: Mapping[str, Tensor], stored: object, path: Path, network: str) -> dict[str, Tensor]:
    """The tensors in a file that fill a network of the `expected` state; ContentError if there is no such set, or two.

    The sets are compared by names and shapes; the one that is taken must also have finite values of the right type.
    """
    mappings = list(_mappings(stored))
    readings = [reading for entry, values in mappings for reading in _readings(entry, values, expected)]
    if not readings:
        raise _no_weights(stored, path)
    chosen = _only([reading for reading in readings if reading.fits(expected)], path, network)
    if chosen is None:
        chosen = max(readings, key=lambda reading: (reading.matches(expected), -len(reading.found)))
        if not chosen.matches(expected):
            _refuse_network(stored, path)
            _refuse_several(mappings, path, network)
    where = f"{path} ({chosen})" if str(chosen) else str(path)
    odd = [name for name, value in chosen.found.items() if not _is_plain(value)]
    if odd:
        problem = f"{where}: '{odd[0]}' is a {type(chosen.found[odd[0]]).__name__}, not a plain tensor"
        raise ContentError(problem, "save model.state_dict() alone, or as an entry of its own")
    problems = _mismatches(expected, chosen.found)
    if problems:
        todo = "give the weights of exactly this network, with this number of classes"
        raise ContentError(f"{where} does not fit the network ({network}): {'; '.join(problems)}", todo)
    return chosen.found


def _dictionaries(stored: object) -> Iterator[tuple[_Entry, dict[Any, Any]]]:
    """Every dictionary, with the keys that lead to it, the outermost first; each once, since one may hold itself."""
    seen: set[int] = set()
    waiting: deque[tuple[_Entry, object]] = deque([((), stored)])
    while waiting:
        entry, value = waiting.popleft()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        yield entry, value
        waiting.extend(((*entry, one_line(key)), inner) for key, inner in value.items())


def _mappings(stored: object) -> Iterator[tuple[_Entry, dict[str, Any]]]:
    """The dictionaries that have tensors by name."""
    for entry, values in _dictionaries(stored):
        named = {name: value for name, value in values.items() if isinstance(name, str)}
        if any(isinstance(value, Tensor) for value in named.values()):
            yield entry, named


def _readings(entry: _Entry, values: dict[str, Any], expected: Mapping[str, Tensor]) -> Iterator[_Reading]:
    """A reading of one dictionary for each prefix with which a name of it is one of the network's."""
    own = {bare: name for name, bare in _bare(expected).items()}
    for prefix in _prefixes(values, {*own, *expected}):
        inside = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        outside = _bare(name for name in values if not name.startswith(prefix)).values()
        if not any(name in own for name in outside):  # else a prefix of some names only, which is none
            bare = _bare(inside)
            yield _Reading(entry, prefix, {own.get(bare[name], name): value for name, value in inside.items()})


def _prefixes(names: Iterable[str], wanted: set[str]) -> list[str]:
    """What lies before a wanted name in any of `names`, with its dot; "" in any case."""
    found = {"": True}
    for name in names:
        parts = name.split(".")
        for start in range(1, len(parts)):
            rest = parts[start:]
            if ".".join(rest) in wanted or ".".join(part for part in rest if part not in _WRAPPERS) in wanted:
                found[".".join(parts[:start]) + "."] = True
    return list(found)


def _bare(names: Iterable[str]) -> dict[str, str]:
    """Each name and what it is without wrappers, all unchanged if a wrapper is around some names of a module only.

    A wrapper is put around a module, so the names of all that is in it show it: "module.conv.weight" beside "fc.bias"
    is a mixture of two files, and "layer1._orig_mod.0.bias" beside it a network of which one module was compiled.
    """
    names = list(names)
    bare = {}
    wrapped: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        path: tuple[str, ...] = ()
        wrappers: list[str] = []
        *modules, last = name.split(".")
        for part in modules:
            if part in _WRAPPERS:
                wrappers.append(part)
            elif wrapped.setdefault(path, wrappers) != wrappers:
                return {each: each for each in names}
            else:
                path, wrappers = (*path, part), []
        if wrapped.setdefault(path, wrappers) != wrappers:
            return {each: each for each in names}
        bare[name] = ".".join((*path, last))
    return bare


def _only(fitting: list[_Reading], path: Path, network: str) -> _Reading | None:
    """The one of the readings that fit; the plain weights where averaged ones fit too."""
    plain = [reading for reading in fitting if not reading.is_averaged] or fitting
    different = [reading for reading in plain if not reading.same(plain[0])]
    if different:
        listed = "; ".join(str(reading) or "the file itself" for reading in (plain[0], *different[:_SHOWN]))
        count = len(different) + 1
        problem = f"{path} holds {count} different sets of weights that fit the network ({network}): {listed}"
        raise ContentError(problem, "save the one that is meant alone")
    return plain[0] if plain else None


def _no_weights(stored: object, path: Path) -> ContentError:
    _refuse_network(stored, path)
    kind = type(stored).__name__
    if isinstance(stored, dict) and stored:
        name, value = next(iter(stored.items()))
        kind = f"'{one_line(name)}' is a {type(value).__name__}, not a plain tensor"
    return ContentError(f"{path} holds no weights by name ({kind})", "save model.state_dict()")


def _refuse_network(stored: object, path: Path) -> None:
    """ContentError if the file is a Python object, or one of its entries a network, pickled whole."""
    for entry, value in _dictionaries(stored):
        if isinstance(value, Inert) and (value.is_network or not entry):
            whole = f"a whole pickled {'network' if value.is_network else 'object'} ({value.origin})"
            where = f", {_shown(entry)}" if entry else ""
            problem = f"{path}{where} holds Python objects beside tensors, which could run code: {whole}"
            raise ContentError(problem, "where its code is, save model.state_dict(), and give that file")


def _refuse_several(mappings: list[tuple[_Entry, dict[str, Any]]], path: Path, network: str) -> None:
    """ContentError that names the entries with tensors, if there are several; of one, its misfits say more."""
    if len(mappings) > 1:
        listed = _some([f"{_shown(entry) or 'the file itself'} ({len(values)})" for entry, values in mappings])
        problem = (
            f"{path} holds tensors in {len(mappings)} entries, of which none fits the network ({network}): {listed}"
        )
        raise ContentError(problem, "give the weights of exactly this network, best as model.state_dict() alone")


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with all its values at hand: not sparse, not quantised, not on the meta device."""
    if not isinstance(value, Tensor):
        return False
    return value.layout is torch.strided and not value.is_quantized and not value.is_meta


def _equal(one: Tensor, other: Tensor) -> bool:
    return _is_plain(one) and _is_plain(other) and one.dtype == other.dtype and torch.equal(one, other)


def _converts(value: Tensor, wanted: Tensor) -> bool:
    return value.is_floating_point() == wanted.is_floating_point() and value.is_complex() == wanted.is_complex()


def _is_optional(name: str) -> bool:
    """Whether it is a count of batches, which changes nothing computed; some halve it with the rest."""
    return name.endswith("num_batches_tracked")


def _mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps `found` from filling a network of the `expected` state: one phrase for each kind of offence."""
    missing, shape, kind, infinite = [], [], [], []
    for name, wanted in expected.items():
        value = found.get(name)
        if value is None:
            if not _is_optional(name):
                missing.append(f"{name} {list(wanted.shape)}")
        elif value.shape != wanted.shape:
            shape.append(f"{name} {list(value.shape)} in the file, {list(wanted.shape)} in the network")
        elif not _converts(value, wanted) and not (_is_optional(name) and value.is_floating_point()):
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


def _shown(entry: _Entry) -> str:
    return f"entry '{'.'.join(entry)}'" if entry else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
