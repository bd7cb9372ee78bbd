"""Products of two computed tensors: the scores of attention heads, and what these weigh.

Queries and keys have a channel for each head and each of its dimensions, scores one a head, values again one for each
of both. A head goes where nobody needs what it makes; a dimension of queries and keys where in all heads one of both is
zero; a dimension of values where nobody needs it. What is left is a block: the same dimensions in every head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import every
from polar_deploy.surgery.dtype_limits import is_half
from polar_deploy.surgery.facts import Link, Unsupported
from polar_deploy.surgery.operator import Operator, Retained

if TYPE_CHECKING:
    from polar_deploy.surgery.facts import Bools, Channels, Step

NOT_FOLLOWED = "both of its factors are computed, and their channels are not those of attention heads"
PAIR = "queries and keys, or scores and values, keep the same heads"


@dataclass
class Spare:
    """Products that are zero: pairs of channels that nobody needs as long as one of both is zero. [channels]

    left, right: which of both are zero.
    """

    left: Bools
    right: Bools

    @property
    def pairs(self) -> Bools:
        """[channels] where any of both is zero."""
        return np.asarray(self.left | self.right)


def handler(step: Step) -> Operator:
    """The handler of a product of two computed tensors. Raises Unsupported."""
    left, right = step.inputs
    rank = len(step.graph.shape(step.made[0]) or ())
    if (
        step.graph.follows_heads
        and left is not None
        and right is not None
        and rank > 2
        and _ranks(step) == (rank, rank)
    ):
        heads = left.axes[0]
        if heads < rank - 2 and left.dims[0] == right.dims[0]:
            if left.axes == (heads, rank - 1) and right.axes == (heads, rank - 2) and left.dims == right.dims:
                return SCORES
            if left.axes == (heads,) and right.axes == (heads, rank - 1):
                return WEIGHED
    raise Unsupported(NOT_FOLLOWED)


def _ranks(step: Step) -> tuple[int, ...]:
    return tuple(len(step.graph.shape(tensor) or ()) for tensor in step.original)


def _is_zero(channels: Channels) -> Bools:
    return np.asarray(channels.constant & (channels.value == 0))


class Product(Operator[Spare]):
    """What both have in common."""

    can_be_nonfinite = True

    def nonfinite_risk(self, step: Step) -> Bools:
        return np.full(len(step.output), is_half(step.graph.dtype(step.made[0])))

    def constants(self, step: Step) -> None:
        target = step.output
        target.constant = self.is_zero(step)
        target.value[:] = 0.0
        target.nonnegative = target.constant.copy()

    def is_zero(self, step: Step) -> Bools:
        """[output channels] that are zero whatever comes in."""
        raise NotImplementedError


class Scores(Product):
    """Queries times keys: each head sums over its dimensions."""

    def couple(self, step: Step) -> None:
        left, right = step.require(0), step.require(1)
        step.create(left.axes[:1])
        numbers = every(len(left))
        step.ties.append(Link(left, right, numbers, numbers))

    def is_zero(self, step: Step) -> Bools:
        left, right = step.require(0), step.require(1)
        return np.asarray((_is_zero(left) | _is_zero(right)).reshape(left.dims).all(axis=1))

    def need(self, step: Step[Spare]) -> None:
        left, right = step.require(0), step.require(1)
        step.plan = Spare(_is_zero(left), _is_zero(right))
        needed = np.repeat(step.output.needed, left.dims[1]) & ~step.plan.pairs
        left.needed |= needed
        right.needed |= needed

    def must_keep_values(self, step: Step[Spare]) -> list[tuple[Channels, Bools]]:
        """Where a pair stays, the one that is zero has to be zero still."""
        left, right = step.require(0), step.require(1)
        still = _is_zero(left) | _is_zero(right)
        risk = step.plan.pairs & ~still & left.kept & np.repeat(step.output.kept, left.dims[1])
        found = [(left, risk & step.plan.left), (right, risk & ~step.plan.left)]
        return [(channels, which) for channels, which in found if (which & ~channels.needed).any()]

    def retain(self, step: Step) -> list[Retained]:
        left, right, target = step.require(0), step.require(1), step.output
        if target.is_removed:
            return []
        rows = left.kept.reshape(left.dims) | right.kept.reshape(right.dims)
        heads = target.kept | rows.any(axis=1)
        wanted = np.zeros(left.dims, bool)
        wanted[np.ix_(heads, rows.any(axis=0) if rows.any() else np.arange(left.dims[1]) == 0)] = True
        found = [
            (target, heads & ~target.kept),
            (left, wanted.ravel() & ~left.kept),
            (right, wanted.ravel() & ~right.kept),
        ]
        return [Retained(channels, np.flatnonzero(missing), PAIR) for channels, missing in found if missing.any()]


class Weighed(Product):
    """Scores times values: each dimension of each head by itself."""

    def couple(self, step: Step) -> None:
        right = step.require(1)
        target = step.create(right.axes)
        numbers = every(len(right))
        step.link(right, target, numbers, numbers)

    def is_zero(self, step: Step) -> Bools:
        left, right = step.require(0), step.require(1)
        return np.asarray(_is_zero(right) | np.repeat(_is_zero(left), right.dims[1]))

    def need(self, step: Step) -> None:
        left, right, needed = step.require(0), step.require(1), step.output.needed
        right.needed |= needed
        zero = _is_zero(right)
        left.needed |= (needed & ~zero).reshape(right.dims).any(axis=1)

    def retain(self, step: Step) -> list[Retained]:
        left, target = step.require(0), step.output
        if target.is_removed:
            return []
        rows = target.kept.reshape(target.dims)
        heads = left.kept | rows.any(axis=1)
        wanted = np.zeros(target.dims, bool)
        wanted[np.ix_(heads, rows.any(axis=0))] = True
        found = [(left, heads & ~left.kept), (target, wanted.ravel() & ~target.kept)]
        return [Retained(channels, np.flatnonzero(missing), PAIR) for channels, missing in found if missing.any()]


SCORES, WEIGHED = Scores(), Weighed()
