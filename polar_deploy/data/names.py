"""What a name on the command line stands for: an entry of a table, a folder, the user's "package.module:function"."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from polar_deploy.config import LOCAL_PATHS
from polar_deploy.errors import ContentError, PolarDeployError, UsageError, innermost

if TYPE_CHECKING:
    from polar_deploy.config import Settings

# The word before the colon in "folder:DIR": a folder for each class, pictures and masks, pictures and boxes.
FOLDER, PAIRS, COCO = "folder", "pairs", "coco"
_PLACES = (FOLDER, PAIRS, COCO)


def is_reference(name: str) -> bool:
    """Whether `name` has the form "package.module:function"."""
    return ":" in name and name.partition(":")[0] not in _PLACES


def folder_of(name: str, kind: str = FOLDER) -> Path | None:
    """DIR, if `name` has the form "folder:DIR", or that of another `kind`.

    Raises:
        UsageError: nothing stands behind the colon, which as a path would be the current folder.
    """
    word, colon, place = name.partition(":")
    if not colon or word != kind:
        return None
    if not place.strip():
        raise UsageError(f"'{name}' names no folder", f"write {kind}:DIR; {kind}:. is the current folder")
    return Path(place).expanduser()


def without_place(name: str) -> str:
    """`name` as others may see it: of "folder:DIR", DIR's own name without the folders that it lies in."""
    for kind in _PLACES:
        if (folder := folder_of(name, kind)) is not None:
            return f"{kind}:{folder.name or folder.resolve().name}"
    return name


def without_places(settings: Settings) -> dict[str, Any]:
    """All settings, as JSON has them, but those that say where somebody's files lie."""
    return settings.model_dump(mode="json", exclude=LOCAL_PATHS) | {
        "data": settings.data and without_place(settings.data)
    }


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a `name` that is none of the `known` ones; it suggests the nearest."""
    choices = list(known)
    nearest = difflib.get_close_matches(name.lower(), choices, n=3, cutoff=0.5)
    listed = " or ".join(nearest) if nearest else ", ".join(choices[:12])
    return UsageError(f"there is no {kind} called '{name}'", f"use {listed}, or your own as package.module:function")


def call_reference(reference: str, synonyms: Mapping[str, str] | None = None, **arguments: object) -> object:
    """Import "package.module:function", the current folder included, and return `function(**arguments)`.

    Args:
        synonyms: what others call an argument, by our name: functions that have that, or take any (`**kwargs`), and
            do not have ours, are called with it.

    Raises:
        UsageError: there is no such module or function.
        ContentError: the function takes other arguments, or the user's code failed, on import or in the call.
    """
    function = _import_function(reference)
    if (signature := signature_of(function)) is not None:
        for ours, theirs in (synonyms or {}).items():
            if ours in arguments and _takes_only(signature, theirs, ours):
                arguments[theirs] = arguments.pop(ours)
        _require_signature(reference, signature, arguments)
    try:
        return function(**arguments)
    except PolarDeployError:
        raise
    except Exception as error:
        raise _failed(reference, error) from error


def _import_function(reference: str) -> Callable[..., object]:
    module_name, _, function_name = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise UsageError(f"'{reference}' is not of the form package.module:function", "write for example my_code:make")
    if str(Path.cwd()) not in sys.path:  # `python -m` has it already, the console script does not
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            problem = f"'{reference}': there is no module {error.name} here ({Path.cwd()}), and none is installed"
            plain = module_name.removesuffix(".py")
            todo = "start in the folder that holds it, or install it"
            if plain != module_name:
                todo = f"write {plain}:{function_name}"
            raise UsageError(problem, todo) from error
        raise _failed(reference, error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        place = getattr(module, "__file__", None) or "a part of Python"  # perhaps not the file that was meant
        known = ", ".join(_functions(module)) or "none"
        problem = f"'{reference}': {module_name} has no function {function_name}"
        raise UsageError(problem, f"name one that it defines ({place} has {known})")
    return function  # type: ignore[no-any-return]


def _functions(module: ModuleType) -> list[str]:
    """The functions and classes that a module defines itself, and does not hide."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]


def signature_of(function: Callable[..., object]) -> inspect.Signature | None:
    """How a function is called; None of one that is not Python's."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _takes_only(signature: inspect.Signature, name: str, other: str) -> bool:
    """Whether it has an argument of the one name, or takes any, and has none of the other."""
    parameters = signature.parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return other not in parameters and (name in parameters or takes_any)


def _require_signature(reference: str, signature: inspect.Signature, arguments: Mapping[str, object]) -> None:
    try:
        signature.bind(**arguments)
    except TypeError as error:
        name, given = reference.rpartition(":")[2], ", ".join(arguments)
        problem = f"'{reference}' is defined as {name}{signature}, which cannot be called with {given}: {error}"
        raise ContentError(
            problem, f"define it as `def {name}({given}):`, or give its other arguments defaults"
        ) from error


def _failed(reference: str, error: Exception) -> ContentError:
    if isinstance(error, SyntaxError):
        where = f" at {error.filename}, line {error.lineno}"
    else:
        place = innermost(error, (__file__,))
        where = f" at {place.filename}, line {place.lineno}" if place else ""
    problem = f"'{reference}' failed{where}: {type(error).__name__}: {error}"
    return ContentError(problem, "correct it and start again")
