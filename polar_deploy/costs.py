"""What a network costs as a function of what is kept of it: a sum of products, exact at every state.

A layer's multiply-accumulates are a product of its widths, so that every cost has the form

    cost(state) = sum over terms of coefficient * product of factors        (while all the term's blocks are open)

where a factor is a constant plus one tabulated number a site, by the site's width. Parameters have the same form, and
so has a measured latency, whose tables are no straight lines. `polar_deploy.surgery.choices` says which terms there
are. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
WINDOW = 0.01  # a budget counts as used up within 1 % of the full network's cost


def rounded_up(share: float) -> float:
    """The smallest share that can be reached as it is told, in thousandths: one that can be asked for."""
    return ceil(share * 1000) / 1000


@dataclass(frozen=True)
class State:
    """What is kept: open gates of each site (0 <= width <= the site's own), and which blocks are open."""

    widths: tuple[int, ...]
    blocks: tuple[bool, ...]


@dataclass(frozen=True)
class Factor:
    """A number that depends on widths: `constant` + the sum over sites of `tables[site][width of the site]`.

    tables: by the site's index, float [full width + 1].
    """

    constant: float = 0.0
    tables: Mapping[int, Floats] = field(default_factory=dict)

    def __call__(self, widths: Sequence[int]) -> float:
        return self.constant + sum(float(table[widths[site]]) for site, table in self.tables.items())


@dataclass(frozen=True)
class Term:
    """`coefficient` * the product of at most two factors, while all of `blocks` (indices) are open; else 0."""

    coefficient: float
    factors: tuple[Factor, ...] = ()
    blocks: frozenset[int] = frozenset()

    def __call__(self, state: State) -> float:
        if not all(state.blocks[block] for block in self.blocks):
            return 0.0
        return self.coefficient * float(np.prod([factor(state.widths) for factor in self.factors]))


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies and accumulates.

    Attributes:
        macs: its multiply-accumulates: a product of the channels that it writes and, where each of them is made of
            all that it reads, of those.
        kernel: elements of the kernel, 9 for 3 x 3; 1 for matrix products.
        weights: of each product of the widths; 0 where it multiplies two computed tensors.
    """

    macs: Term
    kernel: int = 1
    weights: float = 0.0

    @property
    def depthwise(self) -> bool:
        """Whether each channel is made of one."""
        return len(self.macs.factors) < 2


@dataclass(frozen=True)
class Cost:
    """A cost in its own unit (MACs, parameters, milliseconds). full: of the whole network."""

    full: float
    terms: tuple[Term, ...]

    def absolute(self, state: State) -> float:
        """The cost of a state in the cost's unit."""
        return sum(term(state) for term in self.terms)

    def share(self, state: State) -> float:
        """The cost of a state as a share of the full network's."""
        return self.absolute(state) / self.full
