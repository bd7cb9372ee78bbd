"""CIFAR's own format: pickles, of which only numbers and text are read, so that a hostile one can run nothing."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from polar_deploy.errors import ContentError


def _encode(text: str, encoding: str) -> bytes:
    """What protocol 2 of Python 3 writes for bytes, `_codecs.encode`, without its other codecs."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


# By hand, not by import: numpy 2 warns where the old module name that the files hold is imported.
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Only what arrays, bytes and text are made of."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no data")
        return _ALLOWED[module, name]


def read_pickle(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of numpy arrays, lists, numbers and text (Python 2's strings read as latin1).

    Raises:
        ContentError: it is damaged, no dictionary, or asks for any other object; `where` names the file.
    """
    try:
        stored = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle fails in every way there is
        problem = f"{where} was not read: {type(error).__name__}: {error}"
        raise ContentError(problem, "get the file again from where it is published") from error
    if not isinstance(stored, dict):
        raise ContentError(f"{where} holds a {type(stored).__name__}, not a dictionary", "get the published file again")
    return stored
