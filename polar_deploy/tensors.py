"""Named arrays, as networks take and give them. The first axis of each is the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]  # name -> [B, …], the same B for all

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a network.

    Attributes:
        shape: of one sample, without the batch; None: any length (outputs only).
        dtype: numpy's name of the element type, such as "float32" or "int64".
    """

    shape: tuple[int | None, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        np.dtype(self.dtype)  # TypeError where there is none of that name

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of one sample where all of it is known; 1 for what may be of any length."""
        return tuple(size or 1 for size in self.shape)

    def takes(self, shape: Sequence[int | None]) -> bool:
        """Whether samples of this shape fit."""
        return len(shape) == len(self.shape) and all(
            wanted in (None, found) for wanted, found in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(['B', *('?' if size is None else str(size) for size in self.shape)])}]"


def count(arrays: Mapping[str, Any]) -> int:
    """How many samples there are, of arrays or tensors."""
    return len(next(iter(arrays.values())))


def take(arrays: Mapping[str, T], rows: npt.NDArray[Any] | slice) -> dict[str, T]:
    """Some of the samples, of arrays or tensors: those at the indices, in the slice, or where a mask is true."""
    return {name: values[rows] for name, values in arrays.items()}  # type: ignore[index]


def joined(parts: Sequence[Arrays]) -> dict[str, npt.NDArray[Any]]:
    """Several batches as one."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def finite(arrays: Arrays) -> npt.NDArray[np.bool_]:
    """Which samples have no NaN and no Inf in any array, [B]."""
    whole = np.ones(count(arrays), bool)
    for values in arrays.values():
        if values.dtype.kind in "fc":
            whole &= np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    return whole
