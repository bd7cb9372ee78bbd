"""Functions of one tensor that are no activations: Exp, Log, Sqrt, rounding, trigonometry, tests of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.ops.activation import ROUNDS, Unary, erf

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.facts import Floats
    from polar_deploy.surgery.operator import Operator


def _plain(
    compute: Callable[[Floats], Floats],
    nonnegative: bool | None = False,
    *,
    can_be_nonfinite: bool = False,
    steady: float | None = None,
) -> Unary:
    """A function without attributes."""
    return Unary(lambda x, _: compute(x), nonnegative, can_be_nonfinite=can_be_nonfinite, steady=steady)


HANDLERS: dict[str, Operator] = {
    "Abs": _plain(np.abs, True),
    "Neg": _plain(np.negative),
    "Erf": _plain(erf, None),
    "Exp": _plain(np.exp, True, can_be_nonfinite=True),
    "Log": _plain(np.log, can_be_nonfinite=True),
    "Sqrt": _plain(np.sqrt, True, can_be_nonfinite=True),
    "Reciprocal": _plain(np.reciprocal, None, can_be_nonfinite=True),
    "Sign": _plain(np.sign, None, steady=ROUNDS),
    "Floor": _plain(np.floor, None, steady=ROUNDS),
    "Ceil": _plain(np.ceil, None, steady=ROUNDS),
    "Round": _plain(np.rint, None, steady=ROUNDS),
    "Sin": _plain(np.sin),
    "Cos": _plain(np.cos),
    "Tan": _plain(np.tan),
    "Asin": _plain(np.arcsin, None, can_be_nonfinite=True),
    "Acos": _plain(np.arccos, True, can_be_nonfinite=True),
    "Atan": _plain(np.arctan, None),
    "Sinh": _plain(np.sinh, None, can_be_nonfinite=True),
    "Cosh": _plain(np.cosh, True, can_be_nonfinite=True),
    "Asinh": _plain(np.arcsinh, None),
    "Acosh": _plain(np.arccosh, True, can_be_nonfinite=True),
    "Atanh": _plain(np.arctanh, None, can_be_nonfinite=True),
    "Not": _plain(lambda x: 1 - x, True),
    "IsNaN": _plain(np.zeros_like, True),
    "IsInf": _plain(np.zeros_like, True),
}
