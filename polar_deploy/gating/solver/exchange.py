"""Improving a state by exchanges: what single changes, and pairs of them, do to utility and costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from polar_deploy.costs import WINDOW, Floats
from polar_deploy.gating.solver.levels import Blocks, Flags, Integers, Model

FITS = 1e-12  # a share this little above the budget is rounding


@dataclass(frozen=True)
class Point:
    """A state by levels, with the cost and utility that it has."""

    levels: Integers
    open: Flags
    utility: float
    costs: Floats  # [K], shares


def _incidence(sets: Sequence[Blocks], count: int) -> Flags:
    """[sets, count], whether a set holds a block."""
    return np.array([[block in each for block in range(count)] for each in sets], dtype=bool).reshape(len(sets), count)


@dataclass(frozen=True)
class Moves:
    """Changes of one site's level or of one block, each with what it adds to the utility and to the costs."""

    what: Integers  # [M], the site, or sites + block
    level: Integers  # [M], the new level; the level that the sites of an opening block get, -1 for closing it
    gain: Floats  # [M]
    price: Floats  # [M, K]


class Search:
    """What single changes of a state do, as tables."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sites, products, blocks = len(model.utility), model.products, range(len(model.blocks))
        around = [model.around(inside) for inside in model.inside]
        self.within = [[s for s in range(self.sites) if block in around[s]] for block in blocks]
        self.price = np.array([p.price for p in products]).reshape(len(products), len(model.asked))
        self._constant = np.array([f.constant for p in products for f in p.factors])
        self._lies_in = _incidence(around, len(blocks))
        self._needs = _incidence([p.blocks for p in products], len(blocks))
        self._tabulate()

    def _tabulate(self) -> None:
        """Tables of the products' factors: by site [2, products with it, levels], and all in a row."""
        products = self.model.products
        self.rows: list[Integers] = []
        self.tables: list[Floats] = []
        for site, utility in enumerate(self.model.utility):
            rows = [i for i, p in enumerate(products) if any(site in f.tables for f in p.factors)]
            zero = np.zeros(len(utility))
            tables = [[products[i].factors[side].tables.get(site, zero) for i in rows] for side in (0, 1)]
            self.rows.append(np.array(rows, dtype=np.int64))
            self.tables.append(np.array(tables).reshape(2, len(rows), len(utility)))
        entries = [
            (2 * i + side, site, t)
            for i, p in enumerate(products)
            for side in (0, 1)
            for site, t in p.factors[side].tables.items()
        ]
        self._row = np.array([entry[0] for entry in entries], dtype=np.int64)
        self._site = np.array([entry[1] for entry in entries], dtype=np.int64)
        self._flat = np.concatenate([np.zeros(0), *(entry[2] for entry in entries)])
        self._start = np.cumsum([0, *(len(entry[2]) for entry in entries)])[:-1]
        self._utility = np.concatenate([np.zeros(0), *self.model.utility])
        self._first = np.cumsum([0, *(len(each) for each in self.model.utility)])[:-1]

    def point(self, levels: Integers, blocks: Flags) -> Point:
        """A state, closed sites at level 0."""
        here = self.present(blocks)
        levels = np.where(here, levels, 0)
        costs = self.price.T @ (self.values(levels).prod(axis=0) * self.gates(blocks))
        utility = float(self._utility[self._first + levels][here].sum()) + float(self.model.blocks @ blocks)
        return Point(levels, blocks.copy(), utility, costs)

    def present(self, blocks: Flags) -> Flags:
        """Which sites are there."""
        return ~np.asarray((self._lies_in & ~blocks).any(axis=1))

    def gates(self, blocks: Flags) -> Flags:
        """Which products are there."""
        return ~np.asarray((self._needs & ~blocks).any(axis=1))

    def values(self, levels: Integers) -> Floats:
        """The factors of each product, [2, products]."""
        numbers = self._flat[self._start + levels[self._site]]
        sums = self._constant + np.bincount(self._row, numbers, minlength=len(self._constant))
        return np.ascontiguousarray(sums.reshape(-1, 2).T)

    def alive(self, point: Point) -> bool:
        """Whether it leaves one block of each set open that asks for one."""
        return all(any(point.open[block] for block in kept) for kept in self.model.alive)

    def fits(self, point: Point) -> bool:
        """Whether it is allowed and within the budgets."""
        return self.alive(point) and bool((point.costs <= self.model.asked + FITS).all())

    def in_window(self, point: Point) -> bool:
        """Whether the tightest budget is used up to `WINDOW`."""
        return float((self.model.asked - point.costs).min()) <= WINDOW + FITS

    def responses(self, level: int, site: int, values: Floats, weights: Floats) -> Floats:
        """What each level of a site, now at `level`, would add to the costs, [levels, K].

        values, weights: the factors [2, products] and the price [products, K] of each product as it stands.
        """
        rows, tables = self.rows[site], self.tables[site]
        moved = values[:, rows, None] + tables - tables[:, :, level, None]
        change = moved.prod(axis=0) - values[:, rows].prod(axis=0)[:, None]
        added: Floats = change.T @ weights[rows]
        return added

    def descended(self, point: Point, prices: Floats, sweeps: int = 6) -> Point:
        """From a state, site after site and block after block, to more utility - prices [K] @ costs."""
        for _ in range(sweeps):
            moved = self._swept(point, prices)
            for block in range(len(point.open)):
                worth = [(p.utility - prices @ p.costs, p) for _, p in self.toggled(moved, block) if self.alive(p)]
                best = max(worth, key=lambda each: float(each[0]), default=(-inf, moved))
                if best[0] > moved.utility - prices @ moved.costs:
                    moved = best[1]
            if moved.utility - prices @ moved.costs <= point.utility - prices @ point.costs + 1e-12:
                break
            point = moved
        return point

    def _swept(self, point: Point, prices: Floats) -> Point:
        """Every site at its best level, one after the other."""
        values, weights = self.values(point.levels), self.price * self.gates(point.open)[:, None]
        levels = point.levels.copy()
        for site in np.flatnonzero(self.present(point.open)):
            score = self.model.utility[site] - self.responses(int(levels[site]), int(site), values, weights) @ prices
            best = int(score.argmax())
            if score[best] > score[levels[site]]:
                tables = self.tables[site]
                values[:, self.rows[site]] += tables[:, :, best] - tables[:, :, levels[site]]
                levels[site] = best
        return self.point(levels, point.open)

    def moves(self, point: Point) -> Moves:
        """All changes of one site or one block."""
        values, gates, here = self.values(point.levels), self.gates(point.open), self.present(point.open)
        weights = self.price * gates[:, None]
        what, level, gain, price = [], [], [], []
        for site in np.flatnonzero(here):
            utility = self.model.utility[site]
            what.append(np.full(len(utility), site))
            level.append(np.arange(len(utility)))
            gain.append(utility - utility[point.levels[site]])
            price.append(self.responses(int(point.levels[site]), int(site), values, weights))
        for block in range(len(point.open)):
            for fraction, other in self.toggled(point, block):
                what.append(np.array([self.sites + block]))
                level.append(np.array([fraction]))
                gain.append(np.array([other.utility - point.utility]))
                price.append((other.costs - point.costs)[None])
        if not what:
            return Moves(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros((0, len(point.costs))))
        return Moves(np.concatenate(what), np.concatenate(level), np.concatenate(gain), np.concatenate(price))

    def toggled(self, point: Point, block: int) -> Iterator[tuple[int, Point]]:
        """The state with a block closed, or open with its sites at some widths (in quarters)."""
        if point.open[block]:
            yield -1, self.apply(point, self.sites + block, -1)
        elif all(point.open[other] for other in self.model.outer[block]):
            for quarter in range(5) if self.within[block] else (0,):
                yield quarter, self.apply(point, self.sites + block, quarter)

    def apply(self, point: Point, what: int, level: int) -> Point:
        """The state after a change (see `Moves`)."""
        levels, blocks = point.levels.copy(), point.open.copy()
        if what < self.sites:
            levels[what] = level
            return self.point(levels, blocks)
        block = what - self.sites
        blocks[block] = level >= 0
        if level < 0:
            for other, outer in enumerate(self.model.outer):
                blocks[other] &= block not in outer
        else:
            for site in self.within[block]:
                levels[site] = (len(self.model.utility[site]) - 1) * level // 4
        return self.point(levels, blocks)

    def polished(self, point: Point, rounds: int) -> Point:
        """A state that fits, improved by single changes and by pairs of them."""
        for _ in range(rounds):
            better = self._better(point)
            if better is None:
                break
            point = better
        return point

    def _better(self, point: Point) -> Point | None:
        moves = self.moves(point)
        slack = self.model.asked + FITS - point.costs
        least = point.utility + 1e-12 * max(1.0, abs(point.utility))
        best: Point | None = None
        for first, second in self._candidates(moves, slack):
            moved = self.apply(point, int(moves.what[first]), int(moves.level[first]))
            if second >= 0:
                moved = self.apply(moved, int(moves.what[second]), int(moves.level[second]))
            if moved.utility > (least if best is None else best.utility) and self.fits(moved):
                best = moved
        return best

    def _candidates(self, moves: Moves, slack: Floats) -> list[tuple[int, int]]:
        """The most promising single changes and pairs, were each pair's cost the sum of both."""
        single = np.flatnonzero((moves.price <= slack).all(axis=1) & (moves.gain > 0))
        single = single[np.argsort(-moves.gain[single], kind="stable")[:4]]
        weights = 1 / (np.maximum(slack, 0) + 0.02)
        price = moves.price @ (weights / weights.sum()) if len(slack) > 1 else moves.price[:, 0]
        room = float(slack @ (weights / weights.sum())) if len(slack) > 1 else float(slack[0])
        pairs = _pairs(moves, price, room)
        return [(int(each), -1) for each in single] + pairs


def _pairs(moves: Moves, price: Floats, room: float, count: int = 60) -> list[tuple[int, int]]:
    """Pairs of changes of different sites with the most gain whose prices together fit in `room`, best first."""
    order = np.argsort(price, kind="stable")
    best, other = _prefixes(moves.gain[order], moves.what[order])
    free = np.flatnonzero((price < 0) | (moves.gain > 0))
    place = np.searchsorted(price[order], room - price[free], side="right") - 1
    free, place = free[place >= 0], place[place >= 0]
    partner = order[best[place]]
    clash = moves.what[partner] == moves.what[free]
    fallback = other[place]
    partner = np.where(clash, np.where(fallback >= 0, order[fallback], -1), partner)
    free, partner = free[partner >= 0], partner[partner >= 0]
    gain = moves.gain[free] + moves.gain[partner]
    ranked = np.argsort(-gain, kind="stable")
    ranked = ranked[gain[ranked] > 0][:count]
    return [(int(free[i]), int(partner[i])) for i in ranked]


def _prefixes(gain: Floats, what: Integers) -> tuple[Integers, Integers]:
    """For each prefix the index of the most gain in it, and of the most gain of another site; -1 for none."""
    best, other = np.full(len(gain), -1), np.full(len(gain), -1)
    first = second = -1
    for index, (value, site) in enumerate(zip(gain.tolist(), what.tolist(), strict=True)):
        if first < 0 or value > gain[first]:
            if first >= 0 and what[first] != site:
                second = first
            first = index
        elif site != what[first] and (second < 0 or value > gain[second]):
            second = index
        best[index], other[index] = first, second
    return best, other
