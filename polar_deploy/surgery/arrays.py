"""Small arrays with an entry a channel, of which a graph has tens of thousands."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Ints

WIDTHS = 1 << 10  # different numbers of channels that are kept in mind


def any_of(which: Bools) -> bool:
    """Whether any is true. Searching bytes takes a fraction of the time that numpy takes to reduce a few."""
    return 1 in which.tobytes()


def all_of(which: Bools) -> bool:
    """Whether all are true, see `any_of`."""
    return 0 not in which.tobytes()


@lru_cache(WIDTHS)
def yes(width: int) -> Bools:
    """True for all channels, shared as `every` is."""
    return frozen(np.ones(width, bool))


@lru_cache(WIDTHS)
def no(width: int) -> Bools:
    """False for all channels, shared as `every` is."""
    return frozen(np.zeros(width, bool))


@lru_cache(WIDTHS)
def every(width: int) -> Ints:
    """The numbers of all channels of a tensor: the same array for the same width, which nobody may write to."""
    return frozen(np.arange(width))


def frozen(array: Array) -> Array:
    """An array that several may share, because nobody can write to it."""
    array.flags.writeable = False
    return array


def same_bits(one: Array | None, other: Array | None) -> bool:
    """Whether two constants hold the same bits, shape and type included."""
    a, b = np.asarray(one), np.asarray(other)
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())
