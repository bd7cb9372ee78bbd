"""Reading pickles of PyTorch files without running anything: tensors come out, and inert stand-ins of all else."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any, ClassVar

import torch

from polar_deploy.errors import one_line


class Inert(dict[Any, Any]):
    """Stands for an object of a class that is not known: it takes all that a pickle does to one, and calls nothing.

    Attributes:
        origin: "module.Name" of the class in the file.
        is_network: whether its state is that of an nn.Module.
    """

    origin: ClassVar[str] = "object"
    is_network = False

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()  # empty; a dictionary's own entries are set one by one, afterwards

    def __setstate__(self, state: object = None) -> None:
        """Also called on the class itself, with the state as `self`: a pickle can change neither."""
        if isinstance(self, Inert) and isinstance(state, dict):
            self.is_network = {"_parameters", "_modules"} <= state.keys()

    def __hash__(self) -> int:  # type: ignore[override]  # it may be a key or an element, as what it stands for was
        return id(self)

    def __call__(self, *_: object) -> Inert:
        return self

    def append(self, *_: object) -> None:
        """What a pickle does to a list or a set."""

    extend = add = append


class _InertAttribute(Inert):
    """Stands for `getattr`, by which pickles name a class within a class."""

    def __new__(cls, *_: object) -> type[Inert]:  # type: ignore[misc]
        return Inert


class _Rebuild:
    """One of PyTorch's own functions that make a tensor of a storage; a pickle can call it and not change it."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: object) -> object:
        return getattr(torch._utils, self._name)(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"it changes {self._name}")


_REBUILDS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}
# Such names are not in a file by accident. They would do nothing here either, but the user should know of them.
_RUN_CODE = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "commands", "_posixsubprocess", "pty", "shutil", "socket"}
    | {"importlib", "runpy", "ctypes", "pdb", "webbrowser", "pip"}
)
_BUILTINS = frozenset({"builtins", "__builtin__", "io", "_io"})
_RUN_CODE_BUILTINS = frozenset({"eval", "exec", "execfile", "compile", "open", "FileIO", "breakpoint", "__import__"})


class CouldRunError(pickle.UnpicklingError):
    """The name of something in a file whose only use is to act."""


class _Unpickler(pickle.Unpickler):
    """Makes tensors, and an `Inert` of all else."""

    def find_class(self, module: str, name: str) -> Any:
        """Nothing is ever imported. Storages do not come here: PyTorch's subclass of this class answers for them."""
        root, is_builtin = module.partition(".")[0], module in _BUILTINS
        if root in _RUN_CODE or (is_builtin and name in _RUN_CODE_BUILTINS):
            raise CouldRunError(one_line(f"{module}.{name}"))
        if module == "torch._utils" and name in _REBUILDS:
            return _Rebuild(name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if is_builtin and name == "getattr":
            return _InertAttribute
        return type(name.rpartition(".")[2], (Inert,), {"origin": one_line(f"{module}.{name}")})

    def __setattr__(self, attribute: str, value: Any) -> None:
        """PyTorch sets `persistent_load`; of what that reads, only storages are let through.

        The other kind is the source code of a network, which PyTorch compares with the code here, and may write a file.
        """
        if attribute == "persistent_load":
            load = value

            def value(saved: Any) -> Any:
                return load(saved) if saved[0] in ("storage", b"storage") else saved[1]

        super().__setattr__(attribute, value)


class InertPickle:
    """What `torch.load` takes for the module pickle."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> object:
        """The next object in the file."""
        return _Unpickler(file, **options).load()
