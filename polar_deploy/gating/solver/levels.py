"""A problem by levels: a site's level is the index of its width among the allowed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from polar_deploy.costs import Factor, Floats
from polar_deploy.gating.solver.problem import Problem, Site

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Blocks = frozenset[int]
EVERYWHERE: Blocks = frozenset()


@dataclass(frozen=True)
class Product:
    """price * the product of two factors while all of `blocks` are open; price: [K], shares of the full costs."""

    price: Floats
    factors: tuple[Factor, Factor]  # tables by level
    blocks: Blocks


@dataclass(frozen=True)
class Model:
    """A problem by levels; a site in a closed block is at level 0.

    utility: by site and level. inside: by site, the blocks that remove it. outer: by block, those it lies in.
    asked: [K].
    """

    widths: tuple[Floats, ...]
    utility: tuple[Floats, ...]
    inside: tuple[Blocks, ...]
    blocks: Floats
    outer: tuple[Blocks, ...]
    products: tuple[Product, ...]
    asked: Floats
    alive: tuple[Blocks, ...]

    def around(self, blocks: Blocks) -> Blocks:
        """Blocks with all that they lie in."""
        return blocks.union(*(self.outer[block] for block in blocks))

    def innermost(self, blocks: Blocks) -> Blocks:
        """The fewest of `blocks` that are open only where all of them are."""
        kept = set(blocks)
        for block in sorted(blocks):
            if any(block in self.outer[other] for other in kept - {block}):
                kept.discard(block)
        return frozenset(kept)

    def restricted(self, grid: Sequence[Integers]) -> Model:
        """The same with some of the levels: level k is what level `grid[site][k]` was."""
        widths, utility = (
            tuple(each[levels] for each, levels in zip(tables, grid, strict=True))
            for tables in (self.widths, self.utility)
        )
        return replace(self, widths=widths, utility=utility, products=tuple(_mapped(p, grid) for p in self.products))

    def relaxed(self, cells: Sequence[Integers]) -> Model | None:
        """A model of at most this cost and at least this utility, in which a site lies between the ends of a cell.

        Args:
            cells: by site, the levels where cells end, ascending, from the first level to the last.

        Returns:
            Levels 2k and 2k + 1 are the ends of cell k, of which a site is to take any mean; None where a product's
            factors may be negative, for which this holds no more.
        """
        products: list[Product] = []
        for product in self.products:
            if product.factors[1].tables and min(span(f.tables)[0] + f.constant for f in product.factors) < 0:
                return None
            for sign in (1.0, -1.0):
                price = np.where(product.price * sign > 0, product.price, 0.0)
                if price.any():
                    first, second = (self._lined(factor, cells, sign) for factor in product.factors)
                    products.append(Product(price, (first, second), product.blocks))
        ends = [np.repeat(each, 2)[1:-1] if len(each) > 1 else np.repeat(each, 2) for each in cells]
        sites = range(len(self.utility))
        return replace(
            self,
            widths=tuple(self.widths[site][ends[site]] for site in sites),
            utility=tuple(_lines(self.widths[s], self.utility[s], cells[s], -1.0) for s in sites),
            products=tuple(products),
        )

    def _lined(self, factor: Factor, cells: Sequence[Integers], sign: float) -> Factor:
        tables = {s: _lines(self.widths[s], table, cells[s], sign) for s, table in factor.tables.items()}
        return Factor(factor.constant, tables)


def _mapped(product: Product, grid: Sequence[Integers]) -> Product:
    first, second = (
        Factor(f.constant, {site: table[grid[site]] for site, table in f.tables.items()}) for f in product.factors
    )
    return replace(product, factors=(first, second))


def by_levels(problem: Problem) -> Model:
    """The problem by levels, with equal products merged."""
    names = list(problem.asked)
    merged: dict[Any, Product] = {}
    outer = _nesting(problem)
    for index, name in enumerate(names):
        for term in problem.costs[name].terms:
            scale, factors = _normal(term.factors, problem.sites)
            key = (term.blocks, tuple(key_of(factor) for factor in factors))
            price = np.zeros(len(names)) if key not in merged else merged[key].price
            price[index] += scale * term.coefficient / problem.costs[name].full
            merged[key] = Product(price, factors, term.blocks)
    return Model(
        widths=tuple(np.array(site.widths, dtype=np.float64) for site in problem.sites),
        utility=tuple(np.asarray(s.utility, dtype=np.float64)[list(s.widths)] for s in problem.sites),
        inside=tuple(site.blocks for site in problem.sites),
        blocks=np.asarray(problem.blocks, dtype=np.float64),
        outer=outer,
        products=tuple(product for product in merged.values() if product.price.any()),
        asked=np.array([problem.asked[name] for name in names]),
        alive=problem.alive,
    )


def _nesting(problem: Problem) -> tuple[Blocks, ...]:
    """For each block the others that hold all that it holds: those that it lies in."""
    held = [site.blocks for site in problem.sites]
    held += [term.blocks for name in problem.asked for term in problem.costs[name].terms]
    around: list[Blocks] = []
    for block in range(len(problem.blocks)):
        mine = [each for each in held if block in each]
        around.append(frozenset.intersection(*mine) - {block} if mine else EVERYWHERE)
    return tuple(around)


def _normal(factors: Sequence[Factor], sites: Sequence[Site]) -> tuple[float, tuple[Factor, Factor]]:
    """Two factors by level, each with 1 as its largest number, in a fixed order, and what to multiply them with."""
    scale, levelled = 1.0, []
    for factor in factors:
        tables = {s: np.asarray(t, dtype=np.float64)[list(sites[s].widths)] for s, t in sorted(factor.tables.items())}
        fixed = [site for site, table in tables.items() if np.ptp(table) == 0]
        constant = factor.constant + sum(float(tables.pop(site)[0]) for site in fixed)
        size = max([abs(constant), *(float(np.abs(table).max()) for table in tables.values())])
        if not tables or size == 0:
            scale *= constant
        else:
            scale *= size
            levelled.append(Factor(constant / size, {site: table / size for site, table in tables.items()}))
    levelled += [Factor(1.0)] * (2 - len(levelled))
    first, second = sorted(levelled, key=key_of)
    return scale, (first, second)


def key_of(factor: Factor) -> tuple[Any, ...]:
    return factor.constant, tuple((site, table.tobytes()) for site, table in factor.tables.items())


def _lines(widths: Floats, table: Floats, ends: Integers, sign: float) -> Floats:
    """Two numbers a cell: a straight line between its ends that is nowhere above (sign 1) or below (-1) the table."""
    lines: list[float] = []
    for first, last in pairwise(ends) if len(ends) > 1 else [(ends[0], ends[0])]:
        here, along = table[first : last + 1], widths[first : last + 1] - widths[first]
        slope = (here[-1] - here[0]) / along[-1] if last > first else 0.0
        shift = sign * float((sign * (here - here[0] - slope * along)).min())
        pair = [float(here[0]) + shift, float(here[-1]) + shift]
        flat = sign * float((sign * here).min())
        lines += [flat, flat] if min(pair) < 0 <= here.min() else pair
    return np.array(lines)


def span(tables: Mapping[int, Floats]) -> tuple[float, float]:
    """The least and the greatest sum of one number of each table."""
    return sum(float(t.min()) for t in tables.values()), sum(float(t.max()) for t in tables.values())


def rises(product: Product) -> bool:
    """Whether no cost falls where a width grows or a block opens."""
    tables = [table for factor in product.factors for table in factor.tables.values()]
    positive = all(factor.constant >= 0 for factor in product.factors) and bool((product.price >= 0).all())
    return positive and all(table[0] >= 0 and bool((np.diff(table) >= 0).all()) for table in tables)
