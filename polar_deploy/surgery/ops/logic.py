"""Comparisons and logic: their results are truth values, 0 and 1 among the facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.elementwise import Absorbing, Elementwise, Operand
from polar_deploy.surgery.ops.activation import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Bools, Step
    from polar_deploy.surgery.operator import Operator


class Or(Absorbing):
    """Or: true wins."""

    absorbing_value = 1.0

    def is_nonnegative(self, step: Step, operands: list[Operand]) -> Bools:
        return np.ones(len(step.output), bool)


def _comparison(compute: Callable[[Array, Array], Array]) -> Elementwise:
    """Of numbers that are computed, only those that differ clearly have a known order."""
    return Elementwise(compute, steady=ROUNDS)


HANDLERS: dict[str, Operator] = {
    "And": Absorbing(np.logical_and, 1.0, nonnegative=True),
    "Or": Or(np.logical_or, 0.0),
    "Xor": Elementwise(np.logical_xor, 0.0, nonnegative=True),
    "Greater": _comparison(np.greater),
    "GreaterOrEqual": _comparison(np.greater_equal),
    "Less": _comparison(np.less),
    "LessOrEqual": _comparison(np.less_equal),
    "Equal": _comparison(np.equal),
}
