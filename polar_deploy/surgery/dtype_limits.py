"""Which results of an operator on constants can be trusted: types have ranges, and some functions jump."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.facts import Bools, Floats

EXACT = 2**53  # whole numbers up to here are what they seem in float64, in which constants are computed here
NEAR = 1e-2, 1e-6  # how far off, relative and absolute, a constant may be that a layer computes in its own precision


def is_whole(dtype: np.dtype[Any]) -> bool:
    """Whether a type holds integers or truth values only."""
    return dtype.kind in "biu"


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether a type overflows at 65504 or below, so that squares of usual numbers do."""
    return dtype == np.float16 or (dtype.kind == "V" and dtype.name != "bfloat16")


def fits(values: Floats, dtype: np.dtype[Any]) -> Bools:
    """Where a tensor of that type can hold the values: finite, and in its range. Of 8-bit floats only zero is known.

    Those that it cannot hold make numpy warn, unless `np.errstate` says otherwise.
    """
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        inside = (values >= max(limits.min, -EXACT)) & (values <= min(limits.max, EXACT))
        return np.asarray(inside & (values == np.rint(values)))
    if dtype.kind == "f":
        return np.asarray(np.isfinite(values.astype(dtype)))
    if dtype.kind == "b" or dtype.name == "bfloat16":
        with np.errstate(all="ignore"):
            return np.isfinite(values.astype(dtype).astype(np.float64))
    return np.asarray(values == 0)


def holding(constant: Bools, values: Floats, dtype: np.dtype[Any]) -> tuple[Bools, Floats]:
    """Which of the constants a tensor of that type can hold, and what they are; zero elsewhere."""
    held: Bools = constant & fits(values, dtype)
    return held, only(values, held)


def only(values: Floats, which: Bools) -> Floats:
    """The values where `which` says so, zero elsewhere."""
    found = np.zeros(len(values))
    np.copyto(found, values, where=which)
    return found


def is_steady(compute: Callable[..., Floats], values: list[Floats], change: float) -> Bools:
    """Where a function that jumps does not jump near `values`: it changes by at most `change`, relative to its value.

    A constant comes from float64 here and from the layer's own precision in a runtime; only zero is the same in both.
    """
    relative, absolute = NEAR
    at = np.asarray(compute(*values), np.float64)
    steady = np.ones(at.shape, bool)
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        near = [v + sign * (relative * np.abs(v) + absolute * (v != 0)) for v, sign in zip(values, signs, strict=False)]
        steady &= np.abs(compute(*near) - at) <= change * np.abs(at)
    return steady
