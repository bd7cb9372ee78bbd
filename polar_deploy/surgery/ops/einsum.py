"""Einsum of a computed tensor and a constant matrix, a matrix product along any axis; or of two computed tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.facts import Unsupported
from polar_deploy.surgery.heads import NOT_FOLLOWED, follow
from polar_deploy.surgery.mixing import Mixing, MixingWeights, Plan, Trim, per_filter
from polar_deploy.surgery.quantization import Weight, is_stored, weight

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Step
    from polar_deploy.surgery.operator import Operator

REST = "..."


@dataclass(frozen=True)
class Product:
    """What an equation says, where it is a product with a matrix.

    data, matrix: the inputs. into, out: the axes of the data that is summed over, and of the result that comes instead.
    by_column: whether the matrix is stored as [inputs, outputs].
    """

    data: int
    matrix: int
    into: int
    out: int
    by_column: bool


class Einsum(Mixing):
    """`sum over k of x[..., k, ...] * matrix[k, n]`, in any order of axes."""

    bias_input = None

    def couple(self, step: Step[Plan]) -> None:
        terms, result = parse(step.node.attrs["equation"])
        if len(terms) != 2 or any(is_stored(step, index) for index in (0, 1)):
            super().couple(step)
        elif REST in "".join(terms) or any(len(set(term)) < len(term) for term in (*terms, result)):
            raise Unsupported(NOT_FOLLOWED)
        else:
            follow(step, terms[0], terms[1], result)

    def product(self, step: Step) -> Product:
        """What the equation says. Raises Unsupported where it is another one."""
        terms, result = parse(step.node.attrs["equation"])
        if len(terms) != 2 or len(step.node.inputs) != 2:
            raise Unsupported("its equation is no product of two tensors")
        matrix = next((index for index in (1, 0) if is_stored(step, index)), None)
        if matrix is None:
            raise Unsupported(NOT_FOLLOWED)
        held, given = terms[matrix], terms[1 - matrix]
        summed, made = ([letter for letter in held if (letter in given) is inside] for inside in (True, False))
        own = given.replace(REST, "")
        simple = len(held) == 2 and len(summed) == len(made) == 1 and len(set(own)) == len(own)
        if not simple or result.replace(REST, "").count(made[0]) != 1 or summed[0] in result:
            raise Unsupported("its equation is no product with a matrix")
        if sorted(given.replace(summed[0], "")) != sorted(result.replace(made[0], "")):
            raise Unsupported("its equation sums over several axes")
        rank = step.rank(1 - matrix)
        into, out = _axis(given, summed[0], rank), _axis(result, made[0], rank)
        return Product(1 - matrix, matrix, into, out, held[0] == summed[0])

    def data(self, step: Step) -> int:
        return self.product(step).data

    def input_axis(self, step: Step) -> int:
        return self.product(step).into

    def output_axis(self, step: Step) -> int:
        return self.product(step).out

    def matrix(self, step: Step) -> Weight:
        """The matrix as stored."""
        product = self.product(step)
        return weight(step, product.matrix, "matrix", axis=1 if product.by_column else 0)

    def read(self, step: Step) -> MixingWeights:
        matrix, product = self.matrix(step), self.product(step)
        rows = matrix.values.T if product.by_column else matrix.values
        zero, scale = per_filter(matrix, 1)
        return MixingWeights(
            weight=rows[None, :, :, None],
            bias=None,
            zero=zero,
            scale=scale,
            always_inside=np.ones(1, bool),
            sometimes_padded=np.full(1, matrix.unsure is not None),
            padded_by=matrix.unsure or "",
            bias_locked_because="an operator without a bias",
            plain=matrix.plain,
        )

    def write(self, step: Step, trim: Trim) -> None:
        if trim.weight is not None:
            rows = trim.weight[0, :, :, 0]
            values = rows.T if self.product(step).by_column else rows
            self.matrix(step).write(step.graph, values, trim.kept)


def parse(equation: str) -> tuple[list[str], str]:
    """The terms of the inputs, and that of the result: where it is left out, the dots and what stands once, sorted."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        times = Counter("".join(terms).replace(REST, ""))
        dots = REST if REST in left else ""
        result = dots + "".join(sorted(letter for letter in times if times[letter] == 1))
    return terms, result


def _axis(term: str, letter: str, rank: int) -> int:
    """Where a letter stands; behind the dots it is counted from the end."""
    before, dots, behind = term.partition(REST)
    if not dots or letter in before:
        return before.index(letter)
    return rank - len(behind) + behind.index(letter)


HANDLERS: dict[str, Operator] = {"Einsum": Einsum()}
