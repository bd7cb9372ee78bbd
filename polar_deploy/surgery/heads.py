"""Products of two computed tensors: the scores of attention heads, and what these weigh.

Axes go by labels, as in the equation of an Einsum: *batch* labels stand in both factors and in the result, *summed*
ones in both factors, the others in one factor and in the result. Queries and keys have channels along heads (batch)
and dimensions (summed), scores along heads, values again along both. A head goes where nobody needs what it makes; a
dimension of queries and keys where in all heads one of both is zero; a dimension of values where nobody needs it. What
is left is a block: the same dimensions in every head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polar_deploy.surgery.arrays import all_of, any_of, every, frozen
from polar_deploy.surgery.dtype_limits import is_half
from polar_deploy.surgery.facts import Bools, Ints, Link, Unsupported
from polar_deploy.surgery.operator import Operator, Retained

if TYPE_CHECKING:
    from polar_deploy.surgery.detached import Array
    from polar_deploy.surgery.facts import Channels, Step

NOT_FOLLOWED = "both of its factors are computed, and their channels are not those of attention heads"
PAIR = "queries and keys, or scores and values, keep the same heads"
MOST = 1 << 24  # pairs of channels that are looked at one by one

Labels = tuple[Hashable, ...]
NOWHERE, EVERYWHERE = frozen(np.zeros((), bool)), frozen(np.ones((), bool))  # pairs


@dataclass
class Terms:
    """Which channels of a product meet.

    factors: the labels of the axes that the channels of each factor lie on, in their order; one whose channels all stay
        and do not meet the other's has none. result: those of the result, which lie on `axes`.
    sizes: of all labels, in an order in which arrays of pairs have them.
    zero: [pairs] where each factor is zero whatever comes in, before the cut.
    """

    factors: tuple[Labels, Labels]
    result: Labels
    axes: tuple[int, ...]
    sizes: dict[Hashable, int]
    zero: tuple[Bools, Bools] = (NOWHERE, NOWHERE)

    @property
    def is_summed(self) -> bool:
        """Whether it sums over channels."""
        return any(label not in self.result for label in self.sizes)

    def spread(self, values: Array, labels: Labels) -> Array:
        """[pairs] facts about the channels of one tensor; of size 1 along the labels that it does not have."""
        order = list(self.sizes)
        array = values.reshape([self.sizes[label] for label in labels])
        array = array.transpose(np.argsort([order.index(label) for label in labels]))
        return array.reshape([size if label in labels else 1 for label, size in self.sizes.items()])

    def any(self, pairs: Array, labels: Labels) -> Bools:
        """[channels] of one tensor for which any of the pairs that they are in is true."""
        return self._gathered(np.any, pairs, labels)

    def heads(self, labels: Labels, shared: Labels) -> Ints:
        """[channels] of one tensor: the number of the indices that each has along `shared` labels."""
        numbers = np.arange(math.prod(self.sizes[label] for label in shared))
        return self._gathered(np.max, self.spread(numbers, shared), labels)

    def _gathered(self, reduce: Callable[..., Array], pairs: Array, labels: Labels) -> Array:
        """[channels] of one tensor what the pairs that they are in come to."""
        order = list(self.sizes)
        full = np.broadcast_to(pairs, list(self.sizes.values()))
        array = reduce(full, axis=tuple(at for at, label in enumerate(order) if label not in labels))
        inside = [label for label in order if label in labels]
        return np.asarray(array.transpose([inside.index(label) for label in labels]).ravel())


def follow(step: Step, left: Sequence[Hashable], right: Sequence[Hashable], result: Sequence[Hashable]) -> None:
    """Couples a product of two computed tensors, given the labels of all of their axes. Raises Unsupported."""
    step.plan = _terms(step, (left, right), result)
    step.handler = PRODUCT
    step.handler.couple(step)


def _terms(step: Step, factors: tuple[Sequence[Hashable], Sequence[Hashable]], result: Sequence[Hashable]) -> Terms:
    shapes = [step.graph.shape(tensor) or () for tensor in step.original]
    if not step.graph.follows_heads or [len(shape) for shape in shapes] != [len(term) for term in factors]:
        raise Unsupported(NOT_FOLLOWED)
    sizes = [_sizes(step.inputs[index], factors[index], factors[1 - index]) for index in (0, 1)]
    for own, other in ((0, 1), (1, 0)):
        for label, size in list(sizes[own].items()):
            if size == 1 and label in result and sizes[other].get(label) != 1:
                del sizes[own][label]  # what has one head goes with every head of the other factor
            elif label in factors[other]:
                repeated = label in result and shapes[other][list(factors[other]).index(label)] == 1
                if sizes[other].get(label) != size and not repeated:
                    raise Unsupported(NOT_FOLLOWED)
            elif label not in result:
                raise Unsupported(NOT_FOLLOWED)
    both = sizes[0] | sizes[1]
    if not both or math.prod(both.values()) > MOST:
        raise Unsupported(NOT_FOLLOWED)
    axes = tuple(axis for axis, label in enumerate(result) if label in both)
    return Terms((tuple(sizes[0]), tuple(sizes[1])), tuple(result[axis] for axis in axes), axes, both)


def _sizes(channels: Channels | None, own: Sequence[Hashable], other: Sequence[Hashable]) -> dict[Hashable, int]:
    """The labels of the axes that a factor has channels on, and how many there are."""
    found = {} if channels is None else dict(zip([own[axis] for axis in channels.axes], channels.dims, strict=True))
    if channels is not None and all_of(channels.pinned) and not any(label in other for label in found):
        return {}
    return found


class Product(Operator[Terms]):
    """Handler of a product of two computed tensors; `follow` makes its plan."""

    can_be_nonfinite = True

    def couple(self, step: Step[Terms]) -> None:
        terms, (left, right) = step.plan, step.inputs
        target = step.create(terms.axes) if terms.axes else None
        for index in (1, 0):
            if target is not None and terms.factors[index] == terms.result:
                step.link(step.require(index), target, every(len(target)), every(len(target)))
                break
        if left is not None and right is not None and terms.factors[0] == terms.factors[1]:
            step.ties.append(Link(left, right, every(len(left)), every(len(left))))

    def nonfinite_risk(self, step: Step[Terms]) -> Bools:
        return np.full(len(step.output), is_half(step.graph.dtype(step.made[0])))

    def constants(self, step: Step[Terms]) -> None:
        for target in step.outputs:
            left, right = self._zero(step)
            target.constant = ~step.plan.any(~(left | right), step.plan.result)
            target.value[:] = 0.0
            target.nonnegative = target.constant.copy()

    def need(self, step: Step[Terms]) -> None:
        terms = step.plan
        terms.zero = left, right = self._zero(step)
        needed = terms.spread(step.output.needed, terms.result) if step.outputs else EVERYWHERE
        if terms.is_summed:
            read = [needed & ~(left | right)] * 2
        else:  # where values are zero, scores are not read; values are, so that they stay zero
            widest = 0 if len(terms.factors[0]) > len(terms.factors[1]) else 1
            read = [needed & ~terms.zero[widest]] * 2
            read[widest] = needed
        for source, labels, pairs in zip(step.inputs, terms.factors, read, strict=True):
            if source is not None:
                source.needed |= terms.any(pairs, labels) if labels else True

    def must_keep_values(self, step: Step[Terms]) -> list[tuple[Channels, Bools]]:
        """Where a pair stays, the one that is zero has to be zero still."""
        terms, found = step.plan, super().must_keep_values(step)
        if terms.is_summed:
            (left, right), (left_now, right_now) = terms.zero, self._zero(step)
            risk = (left | right) & ~(left_now | right_now)
            for channels, labels in self._tensors(step):
                risk = risk & terms.spread(channels.kept, labels)
            for source, labels, pairs in zip(step.inputs, terms.factors, (risk & left, risk & ~left), strict=True):
                if source is not None and labels:
                    found.append((source, terms.any(pairs, labels)))
        return [(channels, which) for channels, which in found if any_of(which & ~channels.needed)]

    def retain(self, step: Step[Terms]) -> list[Retained]:
        """The same indices along a label in all tensors that have it."""
        terms = step.plan
        if any(channels.is_removed for channels in step.outputs):
            return []
        left = {label: np.zeros(size, bool) for label, size in terms.sizes.items()}
        for channels, labels in self._tensors(step):
            kept = channels.kept.reshape([terms.sizes[label] for label in labels])
            for at, label in enumerate(labels):
                left[label] |= kept.any(axis=tuple(other for other in range(len(labels)) if other != at))
        for kept in left.values():
            kept[0] |= not kept.any()
        found = []
        for channels, labels in self._tensors(step):
            wanted = np.ones(1, bool)
            for label in labels:
                wanted = np.logical_and.outer(wanted, left[label]).ravel()
            if any_of(missing := wanted & ~channels.kept):
                found.append(Retained(channels, np.flatnonzero(missing), PAIR))
        return found

    def heads(self, step: Step[Terms]) -> list[tuple[Channels, Ints]]:
        """By what all of its tensors have an index along, if they have one."""
        terms, tensors = step.plan, self._tensors(step)
        shared = tuple(label for label in terms.result if all(label in labels for _, labels in tensors))
        return [(channels, terms.heads(labels, shared)) for channels, labels in tensors] if shared else []

    def _tensors(self, step: Step[Terms]) -> list[tuple[Channels, Labels]]:
        """The factors and the result, as far as their channels matter, with the labels of these."""
        factors = zip(step.inputs, step.plan.factors, strict=True)
        found = [(channels, labels) for channels, labels in factors if channels is not None and labels]
        return [*found, *((channels, step.plan.result) for channels in step.outputs)]

    def _zero(self, step: Step[Terms]) -> tuple[Bools, Bools]:
        """[pairs] where each factor is zero whatever comes in."""
        found = [
            step.plan.spread(channels.constant & (channels.value == 0), labels)
            if channels is not None and labels
            else NOWHERE
            for channels, labels in zip(step.inputs, step.plan.factors, strict=True)
        ]
        return found[0], found[1]


PRODUCT: Operator = Product()
